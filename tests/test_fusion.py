"""One fused distribution per position: whose it is, and that no mass is lost or invented."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from fusellm.align.positions import Situation, align, situations
from fusellm.align.ragged import offsets_of
from fusellm.align.translation import TRANSLATIONS, Translation
from fusellm.config import FusionSettings
from fusellm.fusion.cross_entropy import nats_by_byte, sums_over
from fusellm.fusion.functions import FUNCTIONS, NO_SOURCE, Compared, mince
from fusellm.fusion.fuse import FusedBlock, Reading, fuse_block
from fusellm.fusion.kept import Kept

quick = settings(max_examples=80, deadline=None, derandomize=True)
SCHEMES = ("top", "sampled")
NOTHING = np.zeros(0)


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


def random_translation(chance: np.random.Generator, source: int, complete: bool) -> Translation:
    outcomes = 4
    return Translation(
        chance.integers(-1, outcomes, source),
        np.array([0, 0, 1, 2, 3, 3, -1]),
        outcomes,
        complete,
    )


@dataclass(frozen=True)
class World:
    """One block as a target and its sources read it."""

    target_ends: np.ndarray
    length: int
    sources: list[Reading | None]
    window: int | None

    def fuse(self) -> FusedBlock:
        return fuse_block(self.target_ends, self.length, self.sources, mince, self.window)[0]


@st.composite
def fused_worlds(draw: st.DrawFn, sources: int = 3) -> World:
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    length = int(chance.integers(1, 14))
    eos = bool(chance.integers(2))
    scheme = draw(st.sampled_from(SCHEMES))
    complete = draw(st.booleans())
    readings: list[Reading | None] = []
    for _ in range(sources):
        ends = random_ends(chance, length, bool(chance.integers(2)), eos)
        readings.append(
            None
            if chance.random() < 0.15 or len(ends) < 2
            else Reading(
                ends,
                random_kept(chance, len(ends) - 1, scheme, 9),
                random_translation(chance, 9, complete),
                bool(chance.integers(2)),
            )
        )
    window = draw(st.sampled_from([None, 1, 3, 64]))
    return World(
        random_ends(chance, length, bool(chance.integers(2)), eos), length, readings, window
    )


def rows_of(fused: FusedBlock) -> list[dict[int, float]]:
    """Each position's outcomes with their masses."""
    offsets = offsets_of(fused.lengths)
    rows = []
    for n in range(len(fused.winner)):
        entries = slice(offsets[n], offsets[n + 1])
        outcomes, masses = fused.outcomes[entries].tolist(), fused.masses[entries].tolist()
        assert len(set(outcomes)) == len(outcomes)
        rows.append(dict(zip(outcomes, masses, strict=True)))
    return rows


def slow_row(source: Reading, position: int) -> tuple[dict[int, float], float]:
    """(outcomes with masses, rest) that a source's distribution becomes, id by id."""
    kept, translation = source.kept, source.translation
    entries = range(int(kept.offsets[position]), int(kept.offsets[position + 1]))
    draws = sum(int(kept.counts[e]) for e in entries) if len(kept.counts) else 0
    row: dict[int, float] = {}
    rest = float(kept.tail[position])
    for e in entries:
        mass = int(kept.counts[e]) / draws if draws else float(np.exp(kept.log_probs[e]))
        outcome = int(translation.outcome_of_source[kept.ids[e]])
        if outcome < 0 and translation.complete and draws:
            outcome = translation.outcomes  # drawn ids without a class are themselves an outcome
        if outcome < 0:
            rest += mass
        else:
            row[outcome] = row.get(outcome, 0.0) + mass
    return row, rest


# Masses


@given(world=fused_worlds())
@quick
def test_masses_and_rest_are_one_where_a_source_won_and_nothing_elsewhere(world: World) -> None:
    fused = world.fuse()
    assert fused.lengths.sum() == len(fused.outcomes) == len(fused.masses)
    assert len(fused.lengths) == len(fused.winner) == len(fused.rest) == len(world.target_ends) - 1
    for n, row in enumerate(rows_of(fused)):
        if fused.winner[n] == NO_SOURCE:
            assert (row, fused.rest[n]) == ({}, 0)
        else:
            assert sum(row.values()) + fused.rest[n] == pytest.approx(1, abs=1e-5)
            assert min([fused.rest[n], *row.values()]) >= 0


@given(world=fused_worlds())
@quick
def test_a_fused_distribution_is_the_winners_at_the_position_that_has_read_the_same(
    world: World,
) -> None:
    fused = world.fuse()
    for n, row in enumerate(rows_of(fused)):
        if fused.winner[n] == NO_SOURCE:
            continue
        source = world.sources[fused.winner[n]]
        assert source is not None
        found = align(world.target_ends[:-1], source.ends[:-1])[n]
        assert found >= 0
        assert source.from_start or world.target_ends[n] > 0
        expected, rest = slow_row(source, found)
        assert row == pytest.approx(expected, abs=1e-6)
        assert fused.rest[n] == pytest.approx(rest, abs=1e-6)


def one_position(kept: Kept, translation: Translation) -> tuple[dict[int, float], float]:
    source = Reading(np.array([0, 1]), kept, translation, True)
    fused, _ = fuse_block(np.array([0, 1]), 1, [source], mince, None)
    return rows_of(fused)[0], float(fused.rest[0])


MEETING = Translation(np.array([0, 0, 1, -1]), np.array([0, 1, 1]), 2, complete=False)


def test_masses_that_meet_are_added() -> None:
    """Ids 0 and 1 both become outcome 0; id 3 becomes nothing and joins the tail."""
    kept = top([{0: 0.5, 1: 0.125, 2: 0.25, 3: 0.0625}], [0.0625])
    row, rest = one_position(kept, MEETING)
    assert row == pytest.approx({0: 0.625, 1: 0.25})
    assert rest == pytest.approx(0.125)


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


def slow_mince(compared: Compared) -> list[int]:
    """Position by position, byte by byte, in exact fractions."""
    sources, length = compared.nats_by_byte.shape
    found = []
    for n in range(compared.aligned.shape[1]):
        here, after = int(compared.ends[n]), int(compared.ends[n + 1])
        reach = compared.window_bytes
        span = [
            b
            for b in range(length)
            if np.isfinite(compared.nats_by_byte[:, b]).all()
            and (reach is None or here - reach <= b < max(here + reach, after))
        ]
        sums = {
            s: sum((Fraction(float(compared.nats_by_byte[s, b])) for b in span), Fraction(0))
            for s in range(sources)
            if compared.aligned[s, n]
        }
        found.append(min(sums, key=lambda s: (sums[s], s)) if sums else NO_SOURCE)
    return found


@st.composite
def comparisons(draw: st.DrawFn, values: int = 4) -> Compared:
    """Nats that are quarters, so that sums are exact and ties are ties."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    sources, length = int(chance.integers(1, 5)), int(chance.integers(1, 16))
    ends = random_ends(chance, length, bool(chance.integers(2)), bool(chance.integers(2)))
    nats = chance.integers(0, values, (sources, length)) / 4
    unscored = chance.integers(0, min(length, 3) + 1, sources)
    nats[np.arange(length) < unscored[:, None]] = np.nan
    aligned = chance.random((sources, len(ends) - 1)) < 0.7
    return Compared(aligned, nats, ends, draw(st.sampled_from([None, 1, 2, 5, 64])))


@given(compared=comparisons())
@settings(quick, max_examples=200)
def test_mince_is_the_slow_rule(compared: Compared) -> None:
    """Ties, which are many here, go to the source named first."""
    assert mince(compared).tolist() == slow_mince(compared)


@given(compared=comparisons(values=100_000), seed=st.integers(0, 1000))
@quick
def test_the_order_of_the_sources_changes_nothing(compared: Compared, seed: int) -> None:
    """But for ties: where no byte is compared, or all are equal."""
    order = np.random.default_rng(seed).permutation(len(compared.nats_by_byte))
    permuted = replace(
        compared, aligned=compared.aligned[order], nats_by_byte=compared.nats_by_byte[order]
    )
    by_name, again = mince(compared), np.append(order, NO_SOURCE)[mince(permuted)]
    reach = compared.window_bytes
    scored = np.isfinite(compared.nats_by_byte).all(0)
    for n in range(len(by_name)):
        here, after = compared.ends[n], compared.ends[n + 1]
        first, stop = (0, None) if reach is None else (here - reach, max(here + reach, after))
        if scored[max(first, 0) : stop].any():
            assert by_name[n] == again[n]


@given(world=fused_worlds(), order=st.permutations(range(3)))
@quick
def test_the_order_of_the_sources_changes_no_fused_distribution(
    world: World, order: list[int]
) -> None:
    """Where all sources scored all bytes: unscored blocks are ties."""
    present = [s for s in world.sources if s is not None and s.ends[0] == 0]
    order = [n for n in order if n < len(present)]
    if not present:
        return
    here = replace(world, sources=present).fuse()
    there = replace(world, sources=[present[n] for n in order]).fuse()
    assert here.winner.tolist() == [order[w] if w >= 0 else w for w in there.winner]
    for mine, theirs in zip(rows_of(here), rows_of(there), strict=True):
        assert mine == pytest.approx(theirs)
    assert here.rest == pytest.approx(there.rest)


def test_a_tie_goes_to_the_source_named_first() -> None:
    twins = Compared(np.ones((3, 1), bool), np.array([[2.0], [1.0], [1.0]]), np.array([0, 1]), None)
    assert mince(twins).tolist() == [1]
    assert mince(replace(twins, aligned=np.array([[True], [False], [True]]))).tolist() == [2]
    assert mince(replace(twins, aligned=np.zeros((3, 1), bool))).tolist() == [NO_SOURCE]


def test_the_window_has_the_next_token_in_it_however_long() -> None:
    """Within 1 byte the first source is better, over the whole next token the second."""
    nats = np.array([[0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    compared = Compared(np.ones((2, 1), bool), nats, np.array([0, 4]), 1)
    assert mince(compared).tolist() == [1]
    assert mince(replace(compared, ends=np.array([0, 3]))).tolist() == [0]


def test_the_window_reaches_to_both_sides_and_no_farther() -> None:
    ends = np.arange(8)
    for byte in range(7):
        nats = np.zeros((2, 7))
        nats[0, byte] = 1.0
        won = mince(Compared(np.ones((2, 7), bool), nats, ends, 2))
        assert won.tolist() == [int(n - 2 <= byte < n + 2) for n in range(7)]


def test_bytes_that_one_source_did_not_score_are_not_compared() -> None:
    nats = np.array([[np.nan, 2.0], [50.0, 1.0]])
    compared = Compared(np.ones((2, 1), bool), nats, np.array([0, 2]), None)
    assert mince(compared).tolist() == [1]
    neither = np.array([[np.nan, 2.0], [1.0, np.nan]])
    assert mince(replace(compared, nats_by_byte=neither)).tolist() == [0]


def test_functions_are_those_that_a_recipe_can_name() -> None:
    assert set(FUNCTIONS) == set(get_args(FusionSettings.model_fields["function"].annotation))
    assert set(TRANSLATIONS) == set(get_args(FusionSettings.model_fields["strategy"].annotation))


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


@given(block=scored())
@settings(quick, max_examples=200)
def test_a_blocks_nats_are_spread_over_its_bytes(block: tuple[np.ndarray, np.ndarray, int]) -> None:
    """The total stays, but for what follows the last byte; each token's bytes share alike."""
    ends, log_p, length = block
    found = nats_by_byte(ends, log_p, length)
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
    found = nats_by_byte(np.array([0, 0, 2, 3, 3]), np.array([-1.0, -2.0, -4.0, -99.0]), 3)
    assert found.tolist() == [1.5, 1.5, 4.0]


@given(
    values=st.lists(st.one_of(st.integers(0, 9), st.just(float("nan"))), max_size=9),
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
)
@quick
def test_sums_over_spans(values: list[float], spans: list[tuple[int, int]]) -> None:
    spans = [(min(a, b, len(values)), min(max(a, b), len(values))) for a, b in spans]
    by_byte = np.array(values, dtype=np.float64)
    starts, stops = np.array(spans).T
    expected = [float(np.nansum(by_byte[a:b])) for a, b in spans]
    assert sums_over(by_byte, starts, stops).tolist() == expected


# Counts, and blocks that cannot be read


@given(world=fused_worlds())
@quick
def test_counts_say_what_was_met(world: World) -> None:
    _, counts = fuse_block(world.target_ends, world.length, world.sources, mince, world.window)
    for source, count in zip(world.sources, counts, strict=True):
        assert (source is None) == (count is None)
        if source is None or count is None:
            continue
        found = align(world.target_ends[:-1], source.ends[:-1])
        if not source.from_start:
            at_start = world.target_ends[:-1] == 0
            assert count.first_positions == int((at_start & (found >= 0)).sum())
            found[at_start] = -1
        else:
            assert count.first_positions == 0
        expected = situations(world.target_ends, source.ends, found)
        assert count.situations.tolist() == [int((expected == s).sum()) for s in Situation]
        rows = [slow_row(replace_complete(source), j) for j in found if j >= 0]
        tails = [float(source.kept.tail[j]) for j in found if j >= 0]
        assert count.mass_kept == pytest.approx(len(rows) - sum(tails), abs=1e-4)
        assert count.mass_carried == pytest.approx(sum(sum(r.values()) for r, _ in rows), abs=1e-4)
        by_byte = nats_by_byte(source.ends, source.kept.true_log_prob, world.length)
        assert count.scored_bytes == world.length - int(np.isnan(by_byte).sum())
        assert count.nats == pytest.approx(np.nansum(by_byte))


def replace_complete(source: Reading) -> Reading:
    return replace(source, translation=replace(source.translation, complete=False))


@pytest.mark.parametrize("sources", [[], [None, None]])
def test_without_a_source_that_reads_the_block_nothing_is_fused(sources: list[None]) -> None:
    fused, counts = fuse_block(np.array([0, 2, 3]), 3, sources, mince, None)
    assert fused.winner.tolist() == [-1, -1]
    assert fused.lengths.tolist() == [0, 0]
    assert fused.rest.tolist() == [0, 0]
    assert len(fused.outcomes) == len(fused.masses) == 0
    assert counts == sources


@pytest.mark.parametrize("ends", [[], [0], [3]])
def test_a_target_that_predicts_nothing(ends: list[int]) -> None:
    source = Reading(np.array([0, 3]), top([{0: 1.0}], [0.0]), MEETING, True)
    fused, _ = fuse_block(np.array(ends, dtype=np.int64), 3, [source], mince, 64)
    assert len(fused.winner) == len(fused.masses) == 0


def test_a_source_left_out_does_not_shift_the_others() -> None:
    source = Reading(np.array([0, 3]), top([{2: 1.0}], [0.0]), MEETING, True)
    fused, counts = fuse_block(np.array([0, 3]), 3, [None, source], mince, None)
    assert fused.winner.tolist() == [1]
    assert fused.outcomes.tolist() == [1]
    assert counts[0] is None


def test_the_true_next_token_of_real_readings_is_in_the_outcome_it_belongs_to() -> None:
    """Sources that are sure of their own next token make a target sure of its own."""
    target = worlds.sentencepiece()
    text = worlds.sample_text(1)
    (mine,) = target.encode([text], [True])
    assert mine.ends is not None
    for name in ("byte-bpe", "byte-unigram", "always-prefixed"):
        source = worlds.encoder_of(name)
        (theirs,) = source.encode([text], [True])
        assert theirs.ends is not None
        sure = sampled([{int(id_): 9} for id_ in theirs.ids[1:]])
        translation = TRANSLATIONS["partition"](source, target)
        block = Reading(theirs.ends, sure, translation, False)
        fused, _ = fuse_block(mine.ends, len(text.encode()), [block], mince, None)
        rows = rows_of(fused)
        right = [
            rows[n] == {int(translation.outcome_of_target[mine.ids[n + 1]]): 1.0}
            for n in range(len(rows))
            if fused.winner[n] == 0
        ]
        assert len(right) > 50
        assert np.mean(right) > 0.95
