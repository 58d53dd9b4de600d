"""One fused distribution per position: whose it is, and that no mass is lost or invented."""

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.strategies import STRATEGIES, Aligned
from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.distributions import Kept
from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.config import FusionSettings
from fusellm.fusion.cross_entropy import nats_by_byte, span_nats
from fusellm.fusion.functions import FUNCTIONS, Compared, avgce, avgce_paper, bayes, mince
from fusellm.fusion.fuse import Counts, FusionRules, Reading, fuse_blocks
from fusellm.tokens.encode import Encoder

quick = settings(max_examples=80, deadline=None, derandomize=True)
SCHEMES = ("top", "sampled")
NOTHING = np.zeros(0)
NONE = np.zeros(0, dtype=np.int64)


def top(
    rows: list[dict[int, float]], tails: list[float], true_log_prob: list[float] | None = None
) -> Kept:
    """Distributions as `top` keeps them."""
    masses = [m for row in rows for m in row.values()]
    return Kept(
        offsets_of(np.array([len(row) for row in rows])),
        np.array([id_ for row in rows for id_ in row], dtype=np.int64),
        np.log(np.array(masses, dtype=np.float64)).astype(np.float32),
        NOTHING.astype(np.uint8),
        np.array(tails, dtype=np.float32),
        np.array(true_log_prob or [-1.0] * len(rows), dtype=np.float32),
    )


def sampled(rows: list[dict[int, int]], true_log_prob: list[float] | None = None) -> Kept:
    """Distributions as `sampled` keeps them."""
    return Kept(
        offsets_of(np.array([len(row) for row in rows])),
        np.array([id_ for row in rows for id_ in sorted(row)], dtype=np.int64),
        NOTHING.astype(np.float32),
        np.array([row[id_] for row in rows for id_ in sorted(row)], dtype=np.uint8),
        np.zeros(len(rows), dtype=np.float32),
        np.array(true_log_prob or [-1.0] * len(rows), dtype=np.float32),
    )


def random_kept(chance: np.random.Generator, positions: int, scheme: str, vocabulary: int) -> Kept:
    """Random distributions over a vocabulary, kept by either scheme."""
    true = np.log(chance.uniform(0.01, 1, positions)).tolist()
    whole = chance.dirichlet(np.full(vocabulary, 0.4), positions) + 1e-6
    whole /= whole.sum(1, keepdims=True)
    if scheme == "sampled":
        draws = [chance.multinomial(16, row) for row in whole]
        return sampled([{n: int(c) for n, c in enumerate(row) if c} for row in draws], true)
    rows = []
    for row in whole:
        ids = np.argsort(-row)[: chance.integers(1, vocabulary)]
        rows.append({int(n): float(row[n]) for n in ids})
    return top(rows, [1 - sum(row.values()) for row in rows], true)


def random_ends(chance: np.random.Generator, length: int, bos: bool, eos: bool) -> np.ndarray:
    count = int(chance.integers(0, max(length - 1, 0) + 1))
    inner = sorted(chance.choice(np.arange(1, length), count, replace=False)) if length > 1 else []
    return np.array([*([0] if bos else []), *inner, length, *([length] if eos else [])])


def random_translation(chance: np.random.Generator, source: int, complete: bool) -> VocabularyMap:
    outcomes = 4
    return VocabularyMap(
        chance.integers(-1, outcomes, source),
        np.array([0, 0, 1, 2, 3, 3, -1]),
        outcomes,
        complete,
    )


@dataclass(frozen=True)
class Blocks:
    """One model's reading of some blocks, block by block."""

    ends: list[np.ndarray]

    @property
    def tokens(self) -> Tokens:
        flat = np.concatenate([np.zeros(0, np.int64), *self.ends])
        offsets = offsets_of(np.array([len(ends) for ends in self.ends], dtype=np.int64))
        return Tokens(offsets, np.arange(len(flat)) % 7, flat)

    @property
    def positions(self) -> list[int]:
        return [max(len(ends) - 1, 0) for ends in self.ends]


def reading_of(
    target: Blocks, source: Blocks, kept: Kept, translation: VocabularyMap, from_start: bool = True
) -> Reading:
    """A reading aligned by boundaries."""
    theirs, mine = target.tokens, source.tokens
    found, situations = align_shard(theirs.ends, theirs.offsets, mine.ends, mine.offsets)
    read = np.concatenate([NONE, *(ends[:-1] for ends in target.ends)])
    first = (read == 0) & (found >= 0) & (not from_start)
    found[first], situations[first] = -1, Situation.UNALIGNED
    aligned = Aligned(found, situations, first)
    return Reading(mine, kept.distributions(), kept.true_log_prob, translation, aligned)


@dataclass(frozen=True)
class World:
    """Some blocks as a target and its sources read them."""

    target: Blocks
    lengths: list[int]
    sources: list[Reading]
    rules: FusionRules

    def fuse(self) -> tuple[Fused, Counts, list[Counts]]:
        byte_offsets = offsets_of(np.array(self.lengths))
        return fuse_blocks(self.target.tokens, byte_offsets, self.sources, self.rules)

    @property
    def block(self) -> np.ndarray:
        """[N] the block of each position."""
        return np.repeat(np.arange(len(self.lengths)), self.target.positions)


@st.composite
def fused_worlds(
    draw: st.DrawFn, functions: tuple[str, ...] = tuple(f for f in FUNCTIONS if f != "route")
) -> World:
    """Without `route`, which may hear nobody where others are aligned."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    blocks = int(chance.integers(1, 4))
    lengths = chance.integers(1, 14, blocks).tolist()
    eos = [bool(chance.integers(2)) for _ in lengths]
    scheme = draw(st.sampled_from(SCHEMES))
    complete = draw(st.booleans())

    def read(miss: float) -> Blocks:
        bos = bool(chance.integers(2))
        return Blocks(
            [
                NONE if chance.random() < miss else random_ends(chance, length, bos, e)
                for length, e in zip(lengths, eos, strict=True)
            ]
        )

    target = read(0.1)
    readings = []
    for _ in range(int(chance.integers(1, 4))):
        source = read(0.2)
        kept = random_kept(chance, sum(source.positions), scheme, 9)
        translation = random_translation(chance, 9, complete)
        readings.append(reading_of(target, source, kept, translation, bool(chance.integers(2))))
    reach = draw(st.sampled_from([None, 1, 3, 64]))
    rules = FusionRules(FUNCTIONS[draw(st.sampled_from(functions))], reach, beta=2.0)
    return World(target, lengths, readings, rules)


Parts = list[list[tuple[int, dict[int, float], float]]]
"""Of each position its parts: source, outcomes with masses, rest."""


def parts_of(fused: Fused) -> Parts:
    offsets = offsets_of(fused.lengths)
    assert offsets[-1] == len(fused.outcomes) == len(fused.masses)
    assert len(fused.lengths) == len(fused.source) == len(fused.rest) == fused.parts.sum()
    found, part = [], 0
    for count in fused.parts.tolist():
        position = []
        for r in range(part, part + count):
            entries = slice(offsets[r], offsets[r + 1])
            outcomes, masses = fused.outcomes[entries].tolist(), fused.masses[entries].tolist()
            assert len(set(outcomes)) == len(outcomes)
            row = dict(zip(outcomes, masses, strict=True))
            position.append((int(fused.source[r]), row, float(fused.rest[r])))
        found.append(position)
        part += count
    return found


def slow_row(source: Reading, position: int) -> tuple[dict[int, float], float]:
    """(outcomes with masses, rest) that a source's distribution becomes, id by id."""
    given, translation = source.distributions, source.translation
    row: dict[int, float] = {}
    rest = float(given.tail[position])
    for e in range(int(given.offsets[position]), int(given.offsets[position + 1])):
        outcome = int(translation.outcome_of_source[given.ids[e]])
        if outcome < 0 and translation.complete and given.sampled:
            outcome = translation.outcomes  # drawn ids without a class are themselves an outcome
        if outcome < 0:
            rest += float(given.masses[e])
        else:
            row[outcome] = row.get(outcome, 0.0) + float(given.masses[e])
    return row, rest


# Masses


@given(world=fused_worlds())
@quick
def test_masses_and_rests_are_one_where_a_source_is_aligned_and_nothing_elsewhere(
    world: World,
) -> None:
    fused, _, _ = world.fuse()
    assert len(fused.parts) == sum(world.target.positions)
    aligned = np.array([source.aligned.source >= 0 for source in world.sources]).any(axis=0)
    for n, parts in enumerate(parts_of(fused)):
        masses = [m for _, row, rest in parts for m in (rest, *row.values())]
        assert (len(parts) > 0) == aligned[n]
        if parts:
            assert sum(masses) == pytest.approx(1, abs=1e-5)
            assert min(masses) >= 0


@given(world=fused_worlds())
@quick
def test_a_part_is_its_source_where_it_has_read_the_same_times_its_weight(world: World) -> None:
    fused, _, _ = world.fuse()
    for n, parts in enumerate(parts_of(fused)):
        assert len({s for s, _, _ in parts}) == len(parts)
        for s, row, rest in parts:
            source = world.sources[s]
            at = int(source.aligned.source[n])
            block = world.block[n]
            assert at >= 0
            here = world.target.tokens.ends[world.target.tokens.predicting[n]]
            there = source.tokens.ends[source.tokens.offsets[block] + at]
            assert here == there
            weight = sum(row.values()) + rest
            expected, expected_rest = slow_row(source, source.tokens.position_offsets[block] + at)
            assert row == pytest.approx({k: m * weight for k, m in expected.items()}, abs=1e-6)
            assert rest == pytest.approx(expected_rest * weight, abs=1e-6)


def one_position(
    kept: Kept, translation: VocabularyMap, **rules: bool
) -> tuple[dict[int, float], float]:
    block = Blocks([np.array([0, 1])])
    world = World(
        block, [1], [reading_of(block, block, kept, translation)], FusionRules(mince, **rules)
    )
    ((part,),) = parts_of(world.fuse()[0])
    return part[1], part[2]


MEETING = VocabularyMap(np.array([0, 0, 1, -1]), np.array([0, 1, 1]), 2, complete=False)


def test_masses_that_meet_are_added() -> None:
    """Ids 0 and 1 both become outcome 0; id 3 becomes nothing and joins the tail."""
    kept = top([{0: 0.5, 1: 0.125, 2: 0.25, 3: 0.0625}], [0.0625])
    row, rest = one_position(kept, MEETING)
    assert row == pytest.approx({0: 0.625, 1: 0.25})
    assert rest == pytest.approx(0.125)


def test_the_authors_drop_all_but_the_first_of_masses_that_meet() -> None:
    kept = top([{0: 0.5, 1: 0.125, 2: 0.25, 3: 0.0625}], [0.0625])
    row, rest = one_position(kept, MEETING, as_authors=True)
    assert row == pytest.approx({0: 0.5, 1: 0.25})
    assert rest == pytest.approx(0.25)


def test_the_authors_put_all_mass_on_the_token_just_read_where_nothing_is_aligned() -> None:
    """Their fall-back; ours has no distribution there."""
    target, source = Blocks([np.array([0, 1, 3])]), Blocks([np.array([0, 2, 3])])
    kept = top([{0: 1.0}, {0: 1.0}], [0.0, 0.0])
    reading = reading_of(target, source, kept, MEETING)
    ours = World(target, [3], [reading], FusionRules(mince)).fuse()[0]
    theirs = World(target, [3], [reading], FusionRules(mince, as_authors=True)).fuse()[0]
    assert parts_of(ours) == [[(0, {0: 1.0}, 0.0)], []]
    just_read = int(target.tokens.ids[1])
    assert parts_of(theirs) == [[(0, {0: 1.0}, 0.0)], [(0, {just_read: 1.0}, 0.0)]]


@pytest.mark.parametrize(
    ("complete", "row", "rest"),
    [(False, {0: 0.75, 1: 0.125}, 0.125), (True, {0: 0.75, 1: 0.125, 2: 0.125}, 0.0)],
)
def test_draws_without_an_outcome(complete: bool, row: dict[int, float], rest: float) -> None:
    """Astray in a map; in a partition they are one more outcome, numbered after the others."""
    leftover = replace(MEETING, complete=complete, outcome_of_target=np.array([0, 1, 1, -1]))
    found = one_position(sampled([{0: 5, 1: 1, 2: 1, 3: 1}]), leftover)
    assert found[0] == pytest.approx(row)
    assert found[1] == pytest.approx(rest)


def test_draws_that_no_target_id_is_left_for_join_the_tail() -> None:
    """An outcome without a target id would have probability 0 under the target."""
    row, rest = one_position(sampled([{0: 7, 3: 1}]), replace(MEETING, complete=True))
    assert row == pytest.approx({0: 0.875})
    assert rest == pytest.approx(0.125)


def test_the_tail_of_top_stays_with_what_has_no_outcome() -> None:
    """Nobody knows which outcomes an unkept tail belongs to."""
    kept = top([{0: 0.5, 3: 0.25}], [0.25])
    row, rest = one_position(kept, replace(MEETING, complete=True))
    assert row == pytest.approx({0: 0.5})
    assert rest == pytest.approx(0.5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masses_kept(scheme: str) -> None:
    kept = (
        top([{3: 0.5, 1: 0.25}, {2: 1.0}], [0.25, 0.0])
        if scheme == "top"
        else sampled([{3: 2, 1: 1, 0: 1}, {2: 7}])
    )
    expected = [0.5, 0.25, 1.0] if scheme == "top" else [0.25, 0.25, 0.5, 1.0]
    assert kept.masses() == pytest.approx(expected)


# Which source wins


def slow_spans(world: World) -> tuple[np.ndarray, np.ndarray]:
    """(nats [S, N], bytes [N]) around each position, byte by byte."""
    nats = np.zeros((len(world.sources), len(world.block)))
    scored = np.zeros(len(world.block))
    ends, reach = world.target.tokens.ends, world.rules.reach
    for n, block in enumerate(world.block.tolist()):
        token = int(world.target.tokens.predicting[n])
        here, after = int(ends[token]), int(ends[token + 1])
        readers = [
            (s, block_nats(source, block, world.lengths[block]))
            for s, source in enumerate(world.sources)
            if np.diff(source.tokens.offsets)[block] > 0
        ]
        for b in range(world.lengths[block]):
            inside = reach is None or here - reach <= b < max(here + reach, after)
            if inside and all(np.isfinite(by_byte[b]) for _, by_byte in readers):
                scored[n] += 1
                for s, by_byte in readers:
                    nats[s, n] += by_byte[b]
    return nats, scored


def block_nats(source: Reading, block: int, length: int) -> np.ndarray:
    first, last = source.tokens.offsets[block : block + 2]
    ends = source.tokens.ends[first:last]
    log_p = source.true_log_prob[slice(*source.tokens.position_offsets[block : block + 2])]
    return nats_by_byte(ends, np.array([0, len(ends)]), log_p, np.array([0, length]))


@given(world=fused_worlds(functions=("mince",)))
@settings(quick, max_examples=150)
def test_sources_are_compared_over_the_bytes_that_all_of_them_scored(world: World) -> None:
    """The winner is of least cross-entropy, to rounding, and first of exact equals."""
    nats, scored = slow_spans(world)
    fused, _, _ = world.fuse()
    for n, parts in enumerate(parts_of(fused)):
        cost = {
            s: nats[s, n] / max(scored[n], 1)
            for s, source in enumerate(world.sources)
            if source.aligned.source[n] >= 0
        }
        assert len(parts) == bool(cost)
        for s, _, _ in parts:
            assert cost[s] == pytest.approx(min(cost.values()), abs=1e-9)
            if scored[n] == 0:
                assert s == min(cost)


def compared_of(
    cross_entropy: list[list[float]], aligned: list[list[bool]] | None = None, beta: float = 1.0
) -> Compared:
    cost = np.array(cross_entropy)
    usable = np.ones(cost.shape, bool) if aligned is None else np.array(aligned)
    so_far = np.concatenate([np.zeros_like(cost[:, :1]), cost.cumsum(1)[:, :-1]], axis=1)
    return Compared(usable, cost, cost * 2, cost[:, ::-1], so_far, None, beta)


@st.composite
def comparisons(draw: st.DrawFn) -> Compared:
    """Costs that are quarters, so that ties are many and exact."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = int(chance.integers(1, 5)), int(chance.integers(1, 9))
    costs = [chance.integers(0, 8, shape) / 4 for _ in range(4)]
    beta = draw(st.sampled_from([0.0, 1.0, 50.0]))
    routed = chance.integers(-1, shape[0], shape[1])
    return Compared(chance.random(shape) < 0.7, *costs, routed, beta)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(compared=comparisons())
@quick
def test_weights_are_of_aligned_sources_and_sum_to_one(name: str, compared: Compared) -> None:
    weights = FUNCTIONS[name](compared)
    assert (weights >= 0).all()
    assert (weights[~compared.aligned] == 0).all()
    there = compared.aligned.any(axis=0)
    if name == "route":  # hears one source or none
        assert compared.routed is not None
        on = compared.routed >= 0
        there = on & compared.aligned[compared.routed, np.arange(len(there))]
    assert weights.sum(0) == pytest.approx(there.astype(float))


@pytest.mark.parametrize("name", FUNCTIONS)
@given(compared=comparisons(), seed=st.integers(0, 1000))
@quick
def test_the_order_of_the_sources_changes_nothing_but_ties(
    name: str, compared: Compared, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(compared.aligned))
    assert compared.routed is not None
    permuted = Compared(
        compared.aligned[order],
        compared.cross_entropy[order],
        compared.nats_per_token[order],
        compared.next_nats[order],
        compared.nats_so_far[order],
        np.argsort(order)[compared.routed] * (compared.routed >= 0) - (compared.routed < 0),
        compared.beta,
    )
    weights, again = FUNCTIONS[name](compared), FUNCTIONS[name](permuted)
    cost = compared.next_nats if name == "best" else compared.cross_entropy
    for n in range(weights.shape[1]):
        costs = cost[compared.aligned[:, n], n].tolist()
        if name in ("mince", "best") and costs.count(min(costs, default=0)) > 1:
            continue
        assert weights[order, n] == pytest.approx(again[:, n])


@pytest.mark.parametrize(("name", "cost"), [("mince", "cross_entropy"), ("best", "next_nats")])
@given(compared=comparisons())
@quick
def test_the_least_wins_and_of_equals_the_one_named_first(
    name: str, cost: str, compared: Compared
) -> None:
    weights = FUNCTIONS[name](compared)
    for n in range(weights.shape[1]):
        costs = {
            s: getattr(compared, cost)[s, n] for s in range(len(weights)) if compared.aligned[s, n]
        }
        expected = min(costs, key=lambda s: (costs[s], s)) if costs else None
        assert np.nonzero(weights[:, n])[0].tolist() == ([] if expected is None else [expected])


def test_avgce_by_hand() -> None:
    """Weights 1 : e⁻² of 1 and 2 bits per byte at β = 2."""
    weights = avgce(compared_of([[1.0], [2.0]], beta=2.0))
    assert weights[:, 0] == pytest.approx([1 / (1 + np.exp(-2)), np.exp(-2) / (1 + np.exp(-2))])


def test_the_authors_average_is_nearly_a_plain_mean() -> None:
    """1.8, 2.4 and 3.0 nats per token."""
    weights = avgce_paper(compared_of([[0.9], [1.2], [1.5]]))
    assert weights[:, 0].round(3).tolist() == [0.355, 0.329, 0.316]


@given(compared=comparisons())
@quick
def test_avgce_of_no_sharpness_is_uniform_and_of_great_sharpness_mince(compared: Compared) -> None:
    plain = avgce(replace(compared, beta=0.0))
    assert plain == pytest.approx(FUNCTIONS["uniform"](compared))
    sharp, first = avgce(replace(compared, beta=1e4)), mince(compared)
    cost = np.where(compared.aligned, compared.cross_entropy, np.inf)
    alone = (cost == cost.min(axis=0)).sum(axis=0) == 1
    assert sharp[:, alone] == pytest.approx(first[:, alone])


@given(st.integers(0, 2**32))
@quick
def test_a_bayes_mixture_costs_no_more_than_the_best_source_and_log_s(seed: int) -> None:
    """Σₜ −log Σₛ wₛ pₛ = −log (1/S) Σₛ exp(−nats of s), which telescopes."""
    chance = np.random.default_rng(seed)
    nats = chance.exponential(size=(int(chance.integers(1, 5)), int(chance.integers(1, 30))))
    weights = bayes(compared_of(nats.tolist()))
    assert weights[:, 0] == pytest.approx(1 / len(nats))
    mixture = -np.log((weights * np.exp(-nats)).sum(0)).sum()
    assert mixture == pytest.approx(-np.log(np.exp(-nats.sum(1)).mean()))
    assert mixture <= nats.sum(1).min() + np.log(len(nats)) + 1e-9


@given(st.integers(0, 2**32), st.sampled_from([1, 3, None]))
@quick
def test_without_hindsight_what_comes_after_a_position_changes_nothing(
    seed: int, reach: int | None
) -> None:
    chance = np.random.default_rng(seed)
    size, ends = 12, np.array([0, 1, 4, 5, 9, 12])
    where = np.ones((2, 1), bool), ends, np.array([0, len(ends)]), np.array([0, size])
    by_byte = chance.exponential(size=(2, size))
    nats, scored = span_nats(by_byte, *where, reach, hindsight=False)
    for n in range(len(ends) - 1):
        start = 0 if reach is None else max(ends[n] - reach, 0)
        assert nats[:, n] == pytest.approx(by_byte[:, start : ends[n]].sum(1))
        assert scored[n] == ends[n] - start
        later = by_byte.copy()
        later[:, ends[n] :] = chance.exponential(size=(2, size - ends[n]))
        again, _ = span_nats(later, *where, reach, hindsight=False)
        assert again[:, n].tolist() == nats[:, n].tolist()


def test_the_window_has_the_next_token_in_it_however_long() -> None:
    """Within 1 byte the first source is better, over the whole next token the second."""
    by_byte = np.array([[0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    where = np.array([[True], [True]]), np.array([0, 4]), np.array([0, 2]), np.array([0, 4])
    assert span_nats(by_byte, *where, 1)[0][:, 0].tolist() == [9.0, 4.0]
    shorter = np.array([[True], [True]]), np.array([0, 3]), np.array([0, 2]), np.array([0, 4])
    assert span_nats(by_byte, *shorter, 1)[0][:, 0].tolist() == [0.0, 3.0]


def test_the_window_reaches_to_both_sides_and_no_farther() -> None:
    for byte in range(7):
        by_byte = np.zeros((1, 7))
        by_byte[0, byte] = 1.0
        where = np.ones((1, 1), bool), np.arange(8), np.array([0, 8]), np.array([0, 7])
        nats, scored = span_nats(by_byte, *where, 2)
        assert nats[0].tolist() == [int(n - 2 <= byte < n + 2) for n in range(7)]
        assert scored.tolist() == [2, 3, 4, 4, 4, 4, 3]


def test_bytes_that_one_source_did_not_score_are_not_compared() -> None:
    where = np.ones((2, 1), bool), np.array([0, 2]), np.array([0, 2]), np.array([0, 2])
    nats, scored = span_nats(np.array([[np.nan, 2.0], [50.0, 1.0]]), *where, None)
    assert (nats[:, 0].tolist(), scored.tolist()) == ([2.0, 1.0], [1.0])
    nats, scored = span_nats(np.array([[np.nan, 2.0], [1.0, np.nan]]), *where, None)
    assert (nats[:, 0].tolist(), scored.tolist()) == ([0.0, 0.0], [0.0])


def test_a_source_that_did_not_read_the_block_is_no_part_of_the_comparison() -> None:
    read = np.array([[True], [False]])
    by_byte = np.array([[3.0, 2.0], [np.nan, np.nan]])
    nats, scored = span_nats(by_byte, read, np.array([0, 2]), np.array([0, 2]), np.array([0, 2]), 0)
    assert (nats[:, 0].tolist(), scored.tolist()) == ([5.0, 0.0], [2.0])


def test_functions_and_strategies_are_those_that_a_recipe_can_name() -> None:
    assert set(FUNCTIONS) == set(get_args(FusionSettings.model_fields["function"].annotation))
    assert set(STRATEGIES) == set(get_args(FusionSettings.model_fields["strategy"].annotation))


# Cross-entropy by byte


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(ends, log-probabilities, length): tokens without bytes anywhere, EOS or not."""
    widths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    widths[0] *= draw(st.integers(0, 1))  # BOS has read nothing
    ends = np.cumsum(widths)
    log_p = draw(
        st.lists(
            st.integers(-400, 0).map(lambda n: n / 32),
            min_size=len(ends) - 1,
            max_size=len(ends) - 1,
        )
    )
    return ends, np.array(log_p, dtype=np.float32), int(ends[-1])


def alone(ends: np.ndarray, log_p: np.ndarray, length: int) -> np.ndarray:
    """`nats_by_byte` of one block."""
    return nats_by_byte(ends, np.array([0, len(ends)]), log_p, np.array([0, length]))


@given(block=scored())
@settings(quick, max_examples=200)
def test_a_blocks_nats_are_spread_over_its_bytes(block: tuple[np.ndarray, np.ndarray, int]) -> None:
    """The total stays, but for what follows the last byte; each token's bytes share alike."""
    ends, log_p, length = block
    found = alone(ends, log_p, length)
    assert found.shape == (length,)
    assert np.isnan(found[: ends[0]]).all()
    pending = 0.0
    for n in range(len(log_p)):
        pending -= float(log_p[n])
        start, end = ends[n], ends[n + 1]
        if end > start:
            assert found[start:end] == pytest.approx(np.full(end - start, pending / (end - start)))
            pending = 0.0
    total = -float(log_p.sum(dtype=np.float64)) - pending
    if length > ends[0]:
        assert found[ends[0] :].sum() == pytest.approx(total)
    else:
        assert np.isnan(found).all()


def test_a_dummy_prefix_adds_its_nats_to_the_token_after_it_and_eos_to_none() -> None:
    """BOS, an empty `▁`, two bytes, one byte, EOS."""
    found = alone(np.array([0, 0, 2, 3, 3]), np.array([-1.0, -2.0, -4.0, -99.0]), 3)
    assert found.tolist() == [1.5, 1.5, 4.0]


def test_tokens_that_are_put_before_a_text_are_asked_of_no_model() -> None:
    """Of `[gMASK]`, `<sop>`, two bytes, one byte: the nats of `<sop>` count nowhere."""
    ends, log_p = np.array([0, 0, 2, 3]), np.array([-7.0, -2.0, -4.0])
    tokens, length = np.array([0, 4]), np.array([0, 3])
    assert nats_by_byte(ends, tokens, log_p, length, 2).tolist() == [1.0, 1.0, 4.0]
    assert nats_by_byte(ends, tokens, log_p, length, 1).tolist() == [4.5, 4.5, 4.0]
    assert Tokens(tokens, np.arange(4), ends, 2).asked.tolist() == [False, True, True]
    assert Tokens(np.array([0, 0, 2]), np.arange(2), ends[:2], 1).asked.tolist() == [True]


@given(first=scored(), second=scored())
@quick
def test_blocks_are_scored_each_for_itself(
    first: tuple[np.ndarray, np.ndarray, int], second: tuple[np.ndarray, np.ndarray, int]
) -> None:
    ends = np.concatenate([first[0], second[0]])
    log_p = np.concatenate([first[1], second[1]])
    tokens = offsets_of(np.array([len(first[0]), 0, len(second[0])]))
    found = nats_by_byte(ends, tokens, log_p, offsets_of(np.array([first[2], 3, second[2]])))
    expected = [alone(*first), np.full(3, np.nan), alone(*second)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


# Counts, and blocks that cannot be read


@given(world=fused_worlds())
@quick
def test_counts_say_what_was_met(world: World) -> None:
    fused, together, each = world.fuse()
    parts = parts_of(fused)
    assert together["positions"].tolist() == world.target.positions
    alone_in = [sum(not parts[n] for n in here) for here in positions_by_block(world)]
    assert together["without_source"].tolist() == alone_in
    for s, (source, count) in enumerate(zip(world.sources, each, strict=True)):
        for block, here in enumerate(positions_by_block(world)):
            at = source.aligned.source[here]
            assert count["aligned"][block] == (at >= 0).sum()
            assert count["first_positions"][block] == source.aligned.first[here].sum()
            for situation in Situation:
                expected = (source.aligned.situations[here] == situation).sum()
                assert count[situation.name.lower()][block] == expected
            weights = [
                sum(row.values()) + rest for n in here for w, row, rest in parts[n] if w == s
            ]
            assert count["wins"][block] == pytest.approx(sum(weights), abs=1e-5)
            rows = [source.tokens.position_offsets[block] + j for j in at if j >= 0]
            tails = sum(float(source.distributions.tail[j]) for j in rows)
            slow = [slow_row(without_leftover(source), j)[0] for j in rows]
            assert count["mass_kept"][block] == pytest.approx(len(rows) - tails, abs=1e-4)
            carried = sum(sum(row.values()) for row in slow)
            assert count["mass_carried"][block] == pytest.approx(carried, abs=1e-4)
            outcome = source.translation.outcome_of_source
            entries = [
                slice(source.distributions.offsets[j], source.distributions.offsets[j + 1])
                for j in rows
            ]
            with_one = sum(int((outcome[source.distributions.ids[e]] >= 0).sum()) for e in entries)
            assert count["met"][block] == with_one - sum(len(row) for row in slow)
            by_byte = block_nats(source, block, world.lengths[block])
            assert count["scored_bytes"][block] == np.isfinite(by_byte).sum()
            assert count["nats"][block] == pytest.approx(np.nansum(by_byte))


def positions_by_block(world: World) -> list[np.ndarray]:
    return [np.nonzero(world.block == b)[0] for b in range(len(world.lengths))]


def without_leftover(source: Reading) -> Reading:
    return replace(source, translation=replace(source.translation, complete=False))


def test_ties_are_counted() -> None:
    block = Blocks([np.array([0, 1, 2])])
    kept = top([{0: 1.0}] * 2, [0.0] * 2, [-1.0, -2.0])
    better = replace(kept, true_log_prob=np.array([-1.0, -1.5], dtype=np.float32))
    sources = [reading_of(block, block, k, MEETING) for k in (kept, better)]
    _, together, _ = World(block, [2], sources, FusionRules(mince, 0)).fuse()
    assert together["ties"].tolist() == [1]


@given(fused_worlds(), st.data())
def test_a_referee_keeps_those_silent_that_know_no_more(world: World, data: st.DataObject) -> None:
    """The others are fused as if a source that costs as much as a referee were not aligned."""
    sources = len(world.sources)
    chosen = data.draw(st.sets(st.integers(0, sources - 1), max_size=sources - 1))
    fused, together, each = replace(
        world, rules=replace(world.rules, referees=tuple(sorted(chosen)))
    ).fuse()
    plain = seen_by_the_function(world)
    cost, aligned = plain.cross_entropy, plain.aligned
    expected = np.zeros_like(aligned)
    for n in range(aligned.shape[1]):
        bar = min([cost[s, n] for s in chosen if aligned[s, n]], default=np.inf)
        for s in set(range(sources)) - chosen:
            expected[s, n] = aligned[s, n] and cost[s, n] < bar
    weights = world.rules.function(replace(plain, aligned=expected))
    taught = parts_of(fused)
    for n, parts in enumerate(taught):
        assert [part[0] for part in parts] == np.flatnonzero(weights[:, n] > 0).tolist()
    heard, teachers = expected.any(axis=0), np.delete(aligned, sorted(chosen), axis=0).any(axis=0)
    ruled = sum(each[s]["wins"].sum() for s in chosen)
    assert ruled == (teachers & ~heard).sum()
    nobody = world.target.tokens.asked & ~teachers
    assert together["without_source"].sum() == nobody.sum()


def seen_by_the_function(world: World) -> Compared:
    """What the fusion function of a world is given."""
    seen: list[Compared] = []

    def remember(compared: Compared) -> np.ndarray:
        seen.append(compared)
        return world.rules.function(compared)

    replace(world, rules=replace(world.rules, function=remember)).fuse()
    return seen[0]


@pytest.mark.parametrize("count", [1, 2])
def test_without_a_source_that_reads_the_block_nothing_is_fused(count: int) -> None:
    target, unread = Blocks([np.array([0, 2, 3])]), Blocks([NONE])
    sources = [reading_of(target, unread, random_kept_none(), MEETING)] * count
    fused, together, each = World(target, [3], sources, FusionRules(mince)).fuse()
    assert parts_of(fused) == [[], []]
    assert together["without_source"].tolist() == [2]
    assert [counts["read"].tolist() for counts in each] == [[0.0]] * count


def random_kept_none() -> Kept:
    return random_kept(np.random.default_rng(0), 0, "sampled", 9)


@pytest.mark.parametrize("ends", [[], [0], [3]])
def test_a_target_that_predicts_nothing(ends: list[int]) -> None:
    target, source = Blocks([np.array(ends, dtype=np.int64)]), Blocks([np.array([0, 3])])
    reading = reading_of(target, source, top([{0: 1.0}], [0.0]), MEETING)
    assert parts_of(World(target, [3], [reading], FusionRules(mince, 64)).fuse()[0]) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_true_next_token_of_real_readings_is_in_the_outcome_it_belongs_to(
    strategy: str,
) -> None:
    """Sources that are sure of their own next token make a target sure of its own.

    With classes, nearly always; with a map from token to token, where both cut alike.
    """
    target = worlds.sentencepiece()
    text = worlds.sample_text(1)
    mine = tokens_of(target, text)
    for name in ("byte-bpe", "byte-unigram", "always-prefixed"):
        source = worlds.encoder_of(name)
        theirs = tokens_of(source, text)
        sure = sampled([{int(id_): 9} for id_ in theirs.ids[1:]])
        translation = STRATEGIES[strategy].translate(source, target, None)
        aligned = STRATEGIES[strategy].aligner(source, target, translation)(mine, theirs)
        reading = Reading(theirs, sure.distributions(), sure.true_log_prob, translation, aligned)
        fused, _, _ = fuse_blocks(
            mine, np.array([0, len(text.encode())]), [reading], FusionRules(mince)
        )
        right = [
            parts[0][1] == {int(translation.outcome_of_target[mine.ids[n + 1]]): 1.0}
            for n, parts in enumerate(parts_of(fused))
            if parts and (strategy == "partition" or aligned.situations[n] == Situation.SAME)
        ]
        papers = strategy in ("em", "mined")  # few words of this text are ASCII
        assert len(right) > (5 if papers else 45)
        assert np.mean(right) > (0.7 if papers else 0.95)


def tokens_of(encoder: Encoder, text: str) -> Tokens:
    (block,) = encoder.encode([text], [True])
    assert block.ends is not None
    return Tokens(np.array([0, len(block.ids)]), block.ids, block.ends)
