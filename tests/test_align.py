"""Which positions have read the same text, and what a source's ids become in the target."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.translation import (
    FirstTokens,
    VocabularyMap,
    class_translation,
    first_translation,
    same_tokenizer,
)
from fusellm.arrays.ragged import offsets_of, take_rows
from fusellm.tokens.encode import Encoder

TRANSLATIONS = {"bytes": first_translation, "partition": class_translation}
quick = settings(max_examples=100, deadline=None, derandomize=True)
PAIRS = [(s, t) for s in worlds.FAMILIES for t in worlds.FAMILIES if s != t]
REAL_PAIRS = [("gpt-neox-20b", "llama-2")]
TEXT = "".join(chr(ord("a") + n % 26) for n in range(40))


@st.composite
def readings(draw: st.DrawFn, last: bool | None = None) -> list[int]:
    """Boundaries of one reading of TEXT: with or without BOS, an empty `▁`, and EOS."""
    inner = draw(st.sets(st.integers(1, len(TEXT) - 1), max_size=20))
    empty = draw(st.sampled_from([0, 0, 1, 2]))
    with_eos = draw(st.booleans()) if last is None else last
    return [0] * empty + sorted(inner) + [len(TEXT)] * (2 if with_eos else 1)


def has_read(ends: list[int], i: int) -> str:
    return TEXT[: ends[i]]


def one_block(
    target: Sequence[int] | np.ndarray, source: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`align_shard` of a shard of one block."""
    ends = [np.array(side, dtype=np.int64) for side in (target, source)]
    return align_shard(ends[0], np.array([0, len(target)]), ends[1], np.array([0, len(source)]))


def slow_align(target: list[int], source: list[int]) -> list[int]:
    """By what was read: the last position that predicts of each that has read exactly this."""
    target, source, found = target[:-1], source[:-1], []
    for i in range(len(target)):
        later = [k for k in range(i + 1, len(target)) if has_read(target, k) == has_read(target, i)]
        same = [j for j in range(len(source)) if has_read(source, j) == has_read(target, i)]
        found.append(same[-1] if same and not later else -1)
    return found


def slow_situations(target: list[int], source: list[int], found: list[int]) -> list[Situation]:
    """By spelling the target's next piece with the source's next tokens."""
    result = []
    for i, j in enumerate(found):
        if j < 0:
            result.append(Situation.UNALIGNED)
            continue
        piece = TEXT[target[i] : target[i + 1]]
        spelled, tokens = "", 0
        for start, end in pairwise(source[j:]):
            spelled, tokens = spelled + TEXT[start:end], tokens + 1
            if len(spelled) >= len(piece):
                break
        if spelled == piece:
            result.append(Situation.SAME if tokens == 1 else Situation.SEVERAL)
        else:
            result.append(Situation.BEYOND if tokens == 1 else Situation.CROSSED)
    return result


@given(target=readings(), source=readings())
@quick
def test_aligned_positions_have_read_the_same_text(target: list[int], source: list[int]) -> None:
    assert one_block(target, source)[0].tolist() == slow_align(target, source)


@pytest.mark.parametrize("last", [False, True])
@given(data=st.data())
@quick
def test_situations_are_the_four_of_the_design(last: bool, data: st.DataObject) -> None:
    target, source = data.draw(readings(last)), data.draw(readings(last))
    found, situation = one_block(target, source)
    assert found.tolist() == slow_align(target, source)
    assert situation.tolist() == slow_situations(target, source, found.tolist())


def test_all_five_situations_by_hand() -> None:
    found, situation = one_block([0, 3, 7, 9, 12, 13, 16], [0, 3, 5, 7, 12, 14, 16])
    assert found.tolist() == [0, 1, 3, -1, 4, -1]
    assert situation.tolist() == [
        Situation.SAME,
        Situation.SEVERAL,
        Situation.BEYOND,
        Situation.UNALIGNED,
        Situation.BEYOND,
        Situation.UNALIGNED,
    ]
    found, situation = one_block([0, 4, 5], [0, 2, 5])
    assert found.tolist() == [0, -1]
    assert situation.tolist() == [Situation.CROSSED, Situation.UNALIGNED]


def test_nothing_and_one_side_empty() -> None:
    for target, source, expected in (([], [1, 2], []), ([1, 2], [], [-1]), ([1, 2], [1], [-1])):
        found, situation = one_block(target, source)
        assert found.tolist() == expected
        assert situation.tolist() == [Situation.UNALIGNED] * len(expected)


@given(reading=readings())
@quick
def test_a_reading_with_itself_is_the_identity(reading: list[int]) -> None:
    found, situation = one_block(reading, reading)
    for i, j in enumerate(found.tolist()):
        is_last = i + 1 == len(found) or reading[i + 1] != reading[i]
        assert j == (i if is_last else -1)
    assert set(situation[found >= 0]) <= {Situation.SAME}


@pytest.mark.parametrize("last", [None, False, True])
@given(data=st.data())
@quick
def test_a_shard_is_its_blocks(last: bool | None, data: st.DataObject) -> None:
    """Blocks that were left out (no boundaries) included."""
    block = st.one_of(readings(last), readings(last), st.just([]), st.just([len(TEXT)]))
    blocks = data.draw(st.lists(st.tuples(block, block), max_size=6))
    found, situation = align_shard(
        np.array([end for target, _ in blocks for end in target], dtype=np.int64),
        offsets_of(np.array([len(target) for target, _ in blocks], dtype=np.int64)),
        np.array([end for _, source in blocks for end in source], dtype=np.int64),
        offsets_of(np.array([len(source) for _, source in blocks], dtype=np.int64)),
    )
    assert (found.dtype, situation.dtype) == (np.int64, np.int8)
    expected: list[int] = []
    expected_situations: list[int] = []
    for target, source in blocks:
        one = slow_align(target, source)
        expected += one
        expected_situations += slow_situations(target, source, one)
    assert found.tolist() == expected
    assert situation.tolist() == expected_situations


def test_a_shard_with_unequal_numbers_of_blocks_is_refused() -> None:
    nothing, none, one = np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="target has 0 blocks, source 1"):
        align_shard(nothing, none, nothing, one)


@pytest.mark.parametrize(("source_name", "target_name"), [*PAIRS, ("gpt2", "mistral")])
def test_real_readings_are_aligned_where_the_prefixes_are_equal(
    source_name: str, target_name: str
) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    for seed in range(3):
        text = worlds.sample_text(seed)
        data = text.encode()
        (mine,), (theirs,) = target.encode([text], [True]), source.encode([text], [True])
        assert mine.ends is not None
        assert theirs.ends is not None
        found, _ = one_block(mine.ends, theirs.ends)
        assert (found >= 0).mean() > 0.2
        for i in range(len(found)):
            read = data[: mine.ends[i]]
            same = [j for j, end in enumerate(theirs.ends[:-1]) if data[:end] == read]
            if found[i] >= 0:
                assert found[i] == same[-1]
            else:
                assert not same or mine.ends[i + 1] == mine.ends[i]


# Ragged arrays


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    chosen=st.lists(st.integers(0, 7), max_size=8),
)
@quick
def test_rows_of_a_ragged_array(lengths: list[int], chosen: list[int]) -> None:
    rows = np.array([n % len(lengths) for n in chosen], dtype=np.int64)
    flat = [(r, k) for r, length in enumerate(lengths) for k in range(length)]
    offsets = offsets_of(np.array(lengths))
    entries, row = take_rows(offsets, rows)
    got = [(at, *flat[e]) for at, e in zip(row.tolist(), entries.tolist(), strict=True)]
    assert got == [(at, r, k) for at, r in enumerate(rows.tolist()) for k in range(lengths[r])]


# Vocabulary maps

Make = Callable[[Encoder, Encoder], VocabularyMap]


def encoders(source: str, target: str) -> tuple[Encoder, Encoder]:
    return worlds.encoder_of(source), worlds.encoder_of(target)


def classes_of(translation: VocabularyMap) -> list[tuple[frozenset[int], frozenset[int]]]:
    """(source ids, target ids) of each outcome, in order."""
    by_source: list[set[int]] = [set() for _ in range(translation.outcomes)]
    for id_, outcome in enumerate(translation.outcome_of_source.tolist()):
        if outcome >= 0:
            by_source[outcome].add(id_)
    return [
        (frozenset(by_source[u]), frozenset(translation.sets[u].tolist()))
        for u in range(translation.outcomes)
    ]


def continuation(encoder: Encoder, piece: bytes) -> list[bytes] | None:
    """How a tokenizer spells some bytes in the middle of a text: the slow twin of FirstTokens.

    Told from the tokens' bytes alone: after some context the rest of the tokens join to the piece.
    """
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    for before in ("\n", "a", "0", ".", " ", "中"):
        ids = encoder.encode([before + text], [False])[0].ids.tolist()
        spelled = [encoder.vocabulary.token_bytes[id_] or b"" for id_ in ids]
        for cut in range(1, len(spelled)):
            head, tail = b"".join(spelled[:cut]), spelled[cut:]
            undivided = head in (before.encode(), b" " + before.encode())
            if undivided and b"".join(tail) == piece:
                return tail
    return None


def slow_class(piece: bytes, other: Encoder, own: Encoder) -> bytes | None:
    """From first token to first token, until both spell the bytes as themselves."""
    while True:
        before = piece
        for encoder in (other, own):
            spelled = continuation(encoder, piece)
            if spelled is None:
                return None
            piece = spelled[0]
        if piece == before:
            return piece


@pytest.mark.parametrize("first", [*worlds.FAMILIES, "llama-2", "gpt2"])
@given(text=worlds.texts())
@settings(quick, max_examples=40)
def test_first_token_begins_the_bytes_and_stands_alone(first: str, text: str) -> None:
    encoder = worlds.encoder_of(first)
    piece = text.encode() or b" "
    firsts = FirstTokens(encoder)
    found, spelled = firsts.first(piece), continuation(encoder, piece)
    if spelled is None or worlds.changes(encoder, text):
        assert found is None
    else:
        assert found is not None
        assert firsts.bytes_of(found) == spelled[0]


def test_bytes_that_are_no_whole_characters_have_no_first_token() -> None:
    firsts = FirstTokens(worlds.byte_bpe())
    assert firsts.first("é".encode()[:1]) is None
    assert firsts.first("é".encode()) is not None


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_classes_are_those_of_the_slow_rule(source_name: str, target_name: str) -> None:
    source, target = encoders(source_name, target_name)
    translation = class_translation(source, target)
    number: dict[bytes, set[int]] = {}
    for encoder, other, outcomes in (
        (source, target, translation.outcome_of_source),
        (target, source, translation.outcome_of_target),
    ):
        for id_, token in enumerate(encoder.vocabulary.token_bytes):
            if id_ == encoder.vocabulary.eos_id:
                continue
            reached = slow_class(token, other, encoder) if token else None
            if reached is None:
                assert outcomes[id_] == -1
            else:
                assert token is not None
                assert token.startswith(reached)
                number.setdefault(reached, set()).add(int(outcomes[id_]))
    assert all(len(found) == 1 for found in number.values())
    assert len({next(iter(found)) for found in number.values()} - {-1}) == len(number)
    assert len(number) + 1 == translation.outcomes  # and EOS


@pytest.mark.parametrize(("source_name", "target_name"), [*PAIRS, *REAL_PAIRS])
def test_partition(source_name: str, target_name: str) -> None:
    """Every class has ids of both, all of which begin with a token that both have."""
    source, target = encoders(source_name, target_name)
    translation = class_translation(source, target)
    assert translation.complete
    mine, theirs = source.vocabulary.token_bytes, target.vocabulary.token_bytes
    class_of_bytes = {}
    for u, (source_ids, target_ids) in enumerate(classes_of(translation)):
        assert source_ids
        assert target_ids
        if target.vocabulary.eos_id in target_ids:
            assert (source_ids, target_ids) == (
                {source.vocabulary.eos_id},
                {target.vocabulary.eos_id},
            )
            continue
        spelled = [mine[n] or b"" for n in source_ids], [theirs[n] or b"" for n in target_ids]
        shortest = min(spelled[0], key=len)
        assert shortest
        assert shortest in spelled[1]
        assert all(token.startswith(shortest) for side in spelled for token in side)
        class_of_bytes[shortest] = u
    assert len(class_of_bytes) == translation.outcomes - 1
    assert len(class_of_bytes) > 150
    for id_, token in enumerate(theirs):
        if token is None and id_ != target.vocabulary.eos_id:
            assert translation.outcome_of_target[id_] == -1
    for id_, token in enumerate(mine):
        if token is None and id_ != source.vocabulary.eos_id:
            assert translation.outcome_of_source[id_] == -1


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_a_token_that_both_spell_as_itself_is_its_own_class(
    source_name: str, target_name: str
) -> None:
    source, target = encoders(source_name, target_name)
    translation = class_translation(source, target)
    shared = 0
    for id_, token in enumerate(target.vocabulary.token_bytes):
        if token and continuation(source, token) == continuation(target, token) == [token]:
            u = translation.outcome_of_target[id_]
            assert u >= 0
            same = source.vocabulary.token_bytes.index(token)
            if not source.vocabulary.is_fallback[same]:
                assert translation.outcome_of_source[same] == u
            members = np.nonzero(translation.outcome_of_target == u)[0]
            spelled = [target.vocabulary.token_bytes[n] or b"" for n in members]
            assert min(spelled, key=len) == token
            shared += 1
    assert shared > 100


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_classes_are_the_same_from_both_sides(source_name: str, target_name: str) -> None:
    source, target = encoders(source_name, target_name)
    there, back = class_translation(source, target), class_translation(target, source)
    assert set(classes_of(there)) == {(s, t) for t, s in classes_of(back)}


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_next_tokens_of_aligned_positions_are_nearly_always_of_one_class(
    source_name: str, target_name: str
) -> None:
    """What the partition is for: in all four situations the class of the true token is the same."""
    source, target = encoders(source_name, target_name)
    translation = class_translation(source, target)
    agree, not_same = [], 0
    for seed in range(6):
        text = worlds.sample_text(seed)
        (mine,), (theirs,) = target.encode([text], [True]), source.encode([text], [True])
        assert mine.ends is not None
        assert theirs.ends is not None
        found, situation = one_block(mine.ends, theirs.ends)
        at = np.nonzero(found >= 0)[0]
        expected = translation.outcome_of_target[mine.ids[at + 1]]
        got = translation.outcome_of_source[theirs.ids[found[at] + 1]]
        agree += (expected == got).tolist()
        not_same += int((situation > Situation.SAME).sum())
    assert np.mean(agree) > 0.97
    assert not_same > 10


@pytest.mark.parametrize("make", TRANSLATIONS.values(), ids=TRANSLATIONS)
@pytest.mark.parametrize("name", worlds.FAMILIES)
def test_equal_tokenizers_give_the_identity(name: str, make: Make) -> None:
    encoder = worlds.encoder_of(name)
    twin = Encoder(encoder.tokenizer)
    assert same_tokenizer(encoder, twin)
    translation = make(twin, encoder)
    vocabulary = encoder.vocabulary
    meant = vocabulary.is_text.copy()  # no special token but EOS receives mass
    meant[vocabulary.eos_id] = True
    everything = np.where(meant, np.arange(len(vocabulary)), -1).tolist()
    assert translation.complete
    assert translation.outcome_of_source.tolist() == everything
    assert translation.outcome_of_target.tolist() == everything
    sets = translation.sets
    sizes = sets.stops - sets.starts
    assert sizes[:-1].tolist() == meant.astype(int).tolist()  # one token an outcome
    assert sets.ids[: sets.starts[-1]].tolist() == [id_ for id_ in everything if id_ >= 0]
    assert sizes[-1] == (~meant).sum()


@pytest.mark.parametrize("make", TRANSLATIONS.values(), ids=TRANSLATIONS)
@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_eos_is_eos_and_no_other_special_token_receives_mass(
    source_name: str, target_name: str, make: Make
) -> None:
    source, target = encoders(source_name, target_name)
    translation = make(source, target)
    assert source.vocabulary.eos_id is not None
    assert target.vocabulary.eos_id is not None
    receiver = translation.outcome_of_source[source.vocabulary.eos_id]
    assert receiver == translation.outcome_of_target[target.vocabulary.eos_id]
    senders = np.nonzero(translation.outcome_of_source == receiver)[0]
    assert senders.tolist() == [source.vocabulary.eos_id]
    reached = set(translation.outcome_of_source.tolist()) - {-1, int(receiver)}
    for id_ in target.tokenizer.all_special_ids:
        if id_ != target.vocabulary.eos_id:
            assert translation.outcome_of_target[id_] not in reached
    for id_ in source.tokenizer.all_special_ids:
        if id_ != source.vocabulary.eos_id:
            assert translation.outcome_of_source[id_] == -1


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_sets_have_each_target_id_once(source_name: str, target_name: str) -> None:
    source, target = encoders(source_name, target_name)
    translation = class_translation(source, target)
    sets = translation.sets
    assert len(sets) == translation.outcomes + 1
    assert sorted(sets.ids.tolist()) == list(range(len(target.vocabulary)))
    for u in range(translation.outcomes + 1):
        outcome = u if u < translation.outcomes else -1
        assert (translation.outcome_of_target[sets[u]] == outcome).all()


@pytest.mark.parametrize(("source_name", "target_name"), [*PAIRS, *REAL_PAIRS])
def test_first_sends_each_token_to_one_that_begins_its_bytes(
    source_name: str, target_name: str
) -> None:
    source, target = encoders(source_name, target_name)
    translation = first_translation(source, target)
    assert not translation.complete
    assert translation.outcome_of_target.tolist() == list(range(len(target.vocabulary)))
    for id_, token in enumerate(source.vocabulary.token_bytes):
        receiver = int(translation.outcome_of_source[id_])
        if token is None:
            assert (receiver >= 0) == (id_ == source.vocabulary.eos_id)
            continue
        assert receiver >= 0  # every byte has a token in these
        found = target.vocabulary.token_bytes[receiver]
        assert found
        assert token.startswith(found)


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_first_keeps_tokens_that_the_target_has_and_spells_as_themselves(
    source_name: str, target_name: str
) -> None:
    source, target = encoders(source_name, target_name)
    translation = first_translation(source, target)
    alone: dict[bytes, list[int]] = {}
    for id_, token in enumerate(target.vocabulary.token_bytes):
        if token:
            alone.setdefault(token, []).append(id_)
    exact = 0
    for id_, token in enumerate(source.vocabulary.token_bytes):
        if not token:
            continue
        receiver = int(translation.outcome_of_source[id_])
        spelled = continuation(target, token)
        if spelled is not None:
            assert target.vocabulary.token_bytes[receiver] == spelled[0]
        else:  # no whole characters: the longest token that begins them
            longest = max((b for b in alone if token.startswith(b)), key=len)
            assert target.vocabulary.token_bytes[receiver] == longest
        found = target.vocabulary.token_bytes[receiver]
        if found == token:
            exact += 1
            others = [n for n in alone[token] if not target.vocabulary.is_fallback[n]]
            assert not target.vocabulary.is_fallback[receiver] or not others
    assert exact > 100
