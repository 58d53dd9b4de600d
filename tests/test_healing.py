"""Token healing: a source is asked for what comes after bytes, not after its tokens.

The oracle is a world that is known whole (`known_world`): a source that has learnt it perfectly,
translated, must say at each position what such a target says.
"""

import itertools
from collections import defaultdict

import numpy as np
import pytest

import worlds
from fusellm.alignment.strategies import STRATEGIES, boundary_aligner
from fusellm.alignment.translation import class_translation
from fusellm.arrays.distributions import Distributions, Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.fusion.functions import mince
from fusellm.fusion.fuse import FusionRules, fuse_blocks
from fusellm.fusion.healing import heal, where_cut
from fusellm.fusion.pairing import Healing, Pairing, healing_of
from fusellm.models.tokenizers import tokenizer_at
from fusellm.tokens.encode import Encoder
from known_world import NOTHING, bpe, learnt, said, texts_with_probabilities, tokens_of


def differences(
    source: Encoder,
    target: Encoder,
    world: dict[str, float],
    strategy: str = "partition",
    heals: bool = True,
    draws: int | None = None,
    seed: int = 1,
) -> dict[tuple[int, int], tuple[float, float]]:
    """(what is taught, what a perfect target says) by aligned position and outcome."""
    texts = list(world)
    mine, theirs = tokens_of(target, texts), tokens_of(source, texts)
    translation = STRATEGIES[strategy].translate(source, target, None)
    aligner = STRATEGIES[strategy].aligner(source, target, translation)
    pairing = Pairing(translation, aligner, healing_of(source, target) if heals else None)
    reading = pairing.reading(mine, theirs, said(theirs, learnt(source, world), draws, seed))
    sizes = offsets_of(np.array([len(text.encode()) for text in texts]))
    fused, _, _ = fuse_blocks(mine, sizes, [reading], FusionRules(mince))
    right = learnt(target, world)
    found = {}
    part, outcome = 0, 0
    for b in range(len(texts)):
        ids = tuple(mine.ids[mine.offsets[b] : mine.offsets[b + 1]].tolist())
        for n in range(1, len(ids)):
            position = mine.position_offsets[b] + n - 1
            if fused.parts[position] == 0:
                continue
            taught: dict[int, float] = {}
            for _ in range(fused.lengths[part]):
                taught[int(fused.outcomes[outcome])] = float(fused.masses[outcome])
                outcome += 1
            part += 1
            expected: dict[int, float] = defaultdict(float)
            for id_, mass in right[ids[:n]].items():
                expected[int(translation.outcome_of_target[id_])] += mass
            for o in taught.keys() | expected.keys():
                found[position, o] = taught.get(o, 0.0), expected.get(o, 0.0)
    return found


def apart(found: dict[tuple[int, int], tuple[float, float]]) -> np.ndarray:
    """How far what is taught is from what is right, of each."""
    return np.array([abs(taught - right) for taught, right in found.values()])


APART = (";+\n", "a+b")
"""Merges of which none begins as another ends: all texts that go past a place are asked for."""
CUTS = ((), (";+\n",), ("a+b",), APART, APART[::-1])
OVERLAPPING = (";+\n", "a+b", "b+;", "ab+;", "a+;\n")


@pytest.mark.parametrize(("source", "target"), itertools.permutations(CUTS, 2))
def test_what_is_taught_is_what_a_target_that_knows_the_world_says(
    source: tuple[str, ...], target: tuple[str, ...]
) -> None:
    pair, world = (bpe(*source), bpe(*target)), texts_with_probabilities(4)
    assert apart(differences(*pair, world)).max() < 1e-5
    cut_alike = set(source) == set(target)  # merges that do not meet have no order
    assert (apart(differences(*pair, world, heals=False)).max() > 0.3) != cut_alike


@pytest.mark.parametrize("target", [(), (";+\n",), ("a+b",), APART])
def test_a_map_to_first_tokens_is_healed_where_the_target_has_no_longer_ones(
    target: tuple[str, ...],
) -> None:
    pair, world = (bpe(*APART), bpe(*target)), texts_with_probabilities(4)
    assert apart(differences(*pair, world, "bytes")).max() < 1e-5


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("other", [(), ("a+b",), APART])
def test_one_token_back_is_most_of_the_way_where_merges_overlap(
    other: tuple[str, ...], turned: bool
) -> None:
    pair, world = (bpe(*OVERLAPPING), bpe(*other)), texts_with_probabilities(4)
    source, target = pair[::-1] if turned else pair
    healed, read = (
        apart(differences(source, target, world, heals=heals)).mean() for heals in (True, False)
    )
    assert healed < 0.45 * read


def test_draws_teach_the_right_thing_on_average() -> None:
    """But where no draw fits the text, which is the rarer the likelier the text is."""
    pair, world = (bpe(*APART), bpe()), texts_with_probabilities(3)
    for heals in (True, False):
        sums: dict[tuple[int, int], list[float]] = defaultdict(list)
        for seed in range(50):
            found = differences(*pair, world, heals=heals, draws=32, seed=seed)
            for key, (taught, right) in found.items():
                sums[key].append(taught - right)
        bias = np.array([abs(sum(row) / len(row)) for row in sums.values()])
        assert bias.mean() < 0.012 if heals else bias.mean() > 0.04


@pytest.mark.parametrize("family", ["byte-bpe", "byte-unigram", "sentencepiece", "gemma-like"])
def test_a_source_that_cuts_as_the_target_does_stays_as_it_is(family: str) -> None:
    encoder = worlds.encoder_of(family)
    assert healing_of(encoder, encoder) is None


# On real readings: what the target's tokenizer is asked, and the formula written out

SPACED = ("for x in y:\n\n    if x:\n        return x\n\n\n", "One line.\n\nThe next;\n\n  end\n")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *itertools.permutations(("zoo/prose", "zoo/python", "zoo/cpp"), 2),
        ("byte-unigram", "byte-bpe"),
        ("llama-2", "gpt2"),
        ("llama-2", "gpt-neox-20b"),
        ("gpt2", "gpt-neox-20b"),
        ("gpt-neox-20b", "llama-2"),
    ],
)
def test_what_really_follows_is_not_taken_away(source: str, target: str) -> None:
    """At an aligned position the target did cut: it spans no source token that comes next."""
    theirs, mine = encoder_named(source), encoder_named(target)
    healing = healing_of(theirs, mine)
    assert healing is not None
    texts = [worlds.sample_text(seed, 40) for seed in range(4)]
    texts += [text * 3 for text in (*worlds.LINES, *SPACED)]
    tokens, of_target = tokens_of(theirs, texts), tokens_of(mine, texts)
    aligned = boundary_aligner(theirs, mine, class_translation(theirs, mine))(of_target, tokens)
    there = np.nonzero(aligned.source >= 0)[0]
    read = of_target.predicting[there]
    block = np.searchsorted(of_target.offsets, read, side="right") - 1
    following = tokens.ids[tokens.offsets[block] + aligned.source[there] + 1]
    spanned = healing.cuts.spanned(of_target.ids[read], following)
    assert len(spanned) > 200
    assert spanned.mean() < 0.01


def encoder_named(name: str) -> Encoder:
    return Encoder(tokenizer_at(name)) if name.startswith("zoo/") else worlds.encoder_of(name)


def test_a_blank_line_is_what_a_target_with_gpt_2s_rules_would_read() -> None:
    """It joins line ends at the end of a text only; before a letter it has them one by one."""
    target, source = worlds.encoder_of("gpt2"), bpe(";+\n", ";\n+\n", "\n+\n")
    (block,) = target.encode(["a;\n\nb"], [False])
    assert block.ends is not None
    assert block.ends.tolist() == [1, 2, 3, 4, 5]
    healing = healing_of(source, target)
    assert healing is not None
    known = source.vocabulary.token_bytes
    ids = {token: n for n, token in enumerate(known) if token}
    slots = healing.continuations.offsets[[ids[b";\n\n"], ids[b"\n\n"]]] + 1
    assert [known[n] for n in healing.continuations[slots]] == [b"\n", b"\n"]
    line_end = target.encode(["\n"], [False])[0].ids
    assert not healing.cuts.spanned(line_end, np.array([ids[b"\n"]])).any()


def test_nothing_is_taken_away_where_the_text_says_otherwise() -> None:
    """Asked for `ab` alone the target joins them; in `ab;` it has a boundary after `a`."""
    source, target = bpe(), bpe("b+;", "a+b")
    texts = ["ab;", "a;;"]
    mine, theirs = tokens_of(target, texts), tokens_of(source, texts)
    names = target.vocabulary.token_bytes
    assert [names[id_] for id_ in mine.ids[mine.offsets[0] :][1:3]] == [b"a", b"b;"]
    kept = said(theirs, learnt(source, texts_with_probabilities(3)), None, 1)
    map_ = class_translation(source, target)
    pairing = Pairing(map_, boundary_aligner(source, target, map_), healing_of(source, target))
    reading = pairing.reading(mine, theirs, kept)
    given, b = reading.distributions, source.vocabulary.token_bytes.index(b"b")
    after_a = [int(theirs.position_offsets[n]) + 1 for n in range(2)]
    shares = []
    for row in after_a:
        entries = slice(given.offsets[row], given.offsets[row + 1])
        shares.append(given.masses[entries][given.ids[entries] == b].sum())
    assert shares[0] == pytest.approx(np.exp(kept.true_log_prob[after_a[0]]))  # all of it
    assert shares[1] == 0  # here nothing says that it was not asked for enough
    assert (reading.aligned.source[:2] >= 0).all()


def test_special_tokens_and_nearly_nothing_are_no_continuations() -> None:
    source, target = bpe("a+b"), bpe("a+;")
    healing = healing_of(source, target)
    assert healing is not None
    a = target.vocabulary.token_bytes.index(b"a")
    assert not healing.cuts.spanned(np.array([a]), np.array([0])).any()  # <eos>
    semicolon, b = (source.vocabulary.token_bytes.index(token) for token in (b";", b"b"))
    given = Distributions(
        np.array([0, 2, 4]),
        np.array([semicolon, b, semicolon, b]),
        np.array([1 - 1e-9, 1e-9, 0.9999, 5e-5]),
        np.array([0.0, 5e-5]),
        sampled=False,
    )
    healed, left = where_cut(given, np.array([0, 1]), np.array([a, a]), healing.cuts)
    assert left.tolist() == [False, True]
    assert healed.masses.tolist() == pytest.approx([1 - 1e-9, 1e-9, 0.5])
    assert healed.tail.tolist() == pytest.approx([0.0, 0.5])


def slowly_healed(tokens: Tokens, kept: Kept, healing: Healing) -> list[dict[int, float]]:
    """Each position's distribution one token back, entry by entry; -1 is the tail."""
    spelled, masses = healing.continuations, kept.masses()

    def bytes_of(id_: int) -> bytes:
        return spelled.spelled[spelled.offsets[id_] : spelled.offsets[id_ + 1]].tobytes()

    rows = [
        {int(kept.ids[e]): float(masses[e]) for e in range(*kept.offsets[n : n + 2])}
        for n in range(len(kept.tail))
    ]
    healed, position = [], 0
    for b in range(len(tokens.offsets) - 1):
        ids = tokens.ids[tokens.offsets[b] : tokens.offsets[b + 1]].tolist()
        for n, last in enumerate(ids[:-1]):
            now = rows[position] | {-1: float(kept.tail[position])}
            before = rows[position - 1] if n else {}
            w, moved = bytes_of(last), defaultdict(float)
            for id_, mass in before.items():
                v = bytes_of(id_)
                if w and v.startswith(w) and v != w:
                    slot = int(spelled.offsets[id_]) + len(w)
                    (rest,) = spelled[np.array([slot])].tolist()
                    if rest >= 0:
                        assert bytes_of(rest)
                        assert v[len(w) :].startswith(bytes_of(rest))
                        moved[rest] += mass
            stays = before.get(last, 0.0)
            if not kept.sampled and n:
                stays = float(np.exp(np.float64(kept.true_log_prob[position - 1])))
            whole = stays + sum(moved.values())
            share = stays / whole if moved else 1.0
            row = {id_: mass * share for id_, mass in now.items()}
            for id_, mass in moved.items():
                row[id_] = row.get(id_, 0.0) + mass / whole
            healed.append({id_: mass for id_, mass in row.items() if mass > 0})
            position += 1
    return healed


@pytest.mark.parametrize("scheme", ["top", "sampled"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("byte-unigram", "byte-bpe"),
        ("gemma-like", "byte-bpe"),
        ("always-prefixed", "byte-bpe"),
        ("byte-bpe", "sentencepiece"),
        ("byte-unigram", "sentencepiece"),
    ],
)
def test_real_readings_are_healed_as_the_formula_says(
    source: str, target: str, scheme: str
) -> None:
    theirs, mine = worlds.encoder_of(source), worlds.encoder_of(target)
    healing = healing_of(theirs, mine)
    assert healing is not None
    texts = [worlds.sample_text(seed, 40) for seed in range(4)] + list(worlds.LINES)
    tokens, of_target = tokens_of(theirs, texts), tokens_of(mine, texts)
    kept = likely(tokens, theirs, scheme)
    slow = slowly_healed(tokens, kept, healing)
    healed = heal(tokens, kept, healing.continuations)
    assert sum(row != slowly for row, slowly in zip(rows_of(kept), slow, strict=True)) > 3
    for row, slowly in zip(rows_of(healed), slow, strict=True):
        assert row == pytest.approx(slowly)
    translation = STRATEGIES["partition"].translate(theirs, mine, None)
    aligner = STRATEGIES["partition"].aligner(theirs, mine, translation)
    reading = Pairing(translation, aligner, healing).reading(of_target, tokens, kept)
    block = np.repeat(np.arange(len(texts)), np.diff(of_target.position_offsets))
    after = rows_of(reading.distributions)
    left_out = 0
    for n, place in enumerate(aligner(of_target, tokens).source.tolist()):
        if place < 0:
            continue
        row = int(tokens.position_offsets[block[n]]) + place
        read = np.repeat(of_target.ids[of_target.predicting[n]], len(slow[row]))
        spanned = healing.cuts.spanned(read, np.maximum(list(slow[row]), 0))
        spanned &= np.array(list(slow[row])) >= 0
        stays = {id_: m for (id_, m), no in zip(slow[row].items(), spanned, strict=True) if not no}
        if sum(stays.values()) > 1e-6:
            whole = sum(stays.values())
            assert after[row] == pytest.approx({id_: m / whole for id_, m in stays.items()})
            left_out += int(spanned.any())
        else:
            assert reading.aligned.source[n] == -1
    assert left_out > 0
    assert [sum(row.values()) for row in after] == pytest.approx([1.0] * len(after))


def rows_of(given: Distributions | Kept) -> list[dict[int, float]]:
    """Each position's distribution; -1 is the tail."""
    given = given.distributions() if isinstance(given, Kept) else given
    found = []
    for n in range(len(given.tail)):
        entries = range(*given.offsets[n : n + 2])
        row = {int(given.ids[e]): float(given.masses[e]) for e in entries}
        assert len(row) == len(entries)
        found.append({id_: m for id_, m in (row | {-1: float(given.tail[n])}).items() if m > 0})
    return found


def likely(tokens: Tokens, encoder: Encoder, scheme: str) -> Kept:
    """Random distributions over the true next token, longer ones that begin with it, and others."""
    chance = np.random.default_rng(0)
    spelled = [token or b"" for token in encoder.vocabulary.token_bytes]
    rows, true = [], []
    for b in range(len(tokens.offsets) - 1):
        for id_ in tokens.ids[tokens.offsets[b] + 1 : tokens.offsets[b + 1]].tolist():
            longer = [
                n for n, v in enumerate(spelled) if spelled[id_] and v.startswith(spelled[id_])
            ]
            others = chance.integers(0, len(spelled), 6).tolist()
            ids = list(dict.fromkeys([id_, *chance.permutation(longer)[:4].tolist(), *others]))
            if chance.random() < 0.2:
                ids = ids[1:]
            rows.append(dict.fromkeys(ids, 0.0))
            shares = chance.dirichlet(np.ones(len(ids) + 1))
            rows[-1].update(zip(ids, shares.tolist(), strict=False))
            true.append(np.log(rows[-1].get(id_, 0.01)))
    if scheme == "sampled":
        rows = [{id_: int(1 + 30 * mass) for id_, mass in row.items()} for row in rows]
    values = np.array([value for row in rows for value in row.values()])
    tail = np.array([1 - sum(row.values()) if scheme == "top" else 0.0 for row in rows])
    return Kept(
        offsets_of(np.array([len(row) for row in rows])),
        np.array([id_ for row in rows for id_ in row]),
        np.log(values).astype(np.float32) if scheme == "top" else NOTHING,
        NOTHING.astype(np.uint8) if scheme == "top" else values.astype(np.uint8),
        tail.astype(np.float32),
        np.array(true, dtype=np.float32),
    )
