"""The paper's rules against the authors' own results, and against slow twins."""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

import worlds
from fusellm.alignment.authors import AuthorsAligner
from fusellm.alignment.dynamic import DynamicAligner, Path, least_path, one_to_one
from fusellm.alignment.strategies import Aligned
from fusellm.alignment.translation import VocabularyMap, map_translation
from fusellm.alignment.vocabulary_maps import (
    least_dtype,
    mined_map,
    nearest_spellings,
    same_spellings,
    spellings,
    string_map,
)
from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.fusion.functions import mince
from fusellm.fusion.fuse import FusionRules, Reading, fuse_blocks
from fusellm.tokens.encode import Encoder

quick = settings(max_examples=100, deadline=None, derandomize=True)
GOLDEN = worlds.SHARED / "golden"
TEXTS = 28
PAIRS = [(s, t) for s in worlds.FAMILIES for t in worlds.FAMILIES if s != t]
REAL_PAIRS = [("gpt-neox-20b", "llama-2"), ("llama-2", "gpt-neox-20b")]
MAPS = {"string": string_map, "mined": mined_map}

Make = Callable[[Encoder, Encoder], np.ndarray]


@cache
def golden(name: str) -> Any:
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not part of the project")
    return json.loads(path.read_text(encoding="utf-8"))


def golden_encoders() -> tuple[Encoder, Encoder]:
    """(source, target) of the golden files."""
    return worlds.encoder_of("gpt-neox-20b"), worlds.encoder_of("llama-2")


def rows_of(offsets: np.ndarray, flat: np.ndarray) -> list[list[Any]]:
    return [flat[a:b].tolist() for a, b in pairwise(offsets)]


# Golden: the dynamic programme and the authors' rules


@pytest.mark.parametrize("n", range(TEXTS))
def test_path_is_the_authors(n: int) -> None:
    text = golden("alignment.json")[n]
    assert len(golden("alignment.json")) == TEXTS
    path = bare_path(np.array(text["source_ids"]), np.array(text["target_ids"]))
    assert path.cost == text["dtw_cost"]
    found = rows_of(path.source_offsets, path.sources)
    assert found == text["source_steps_of_target_step"]
    back = [[i for i, js in enumerate(found) if j in js] for j in range(len(text["source_ids"]))]
    assert rows_of(path.target_offsets, path.targets) == back


@cache
def golden_spellings() -> tuple[list[str], list[str]]:
    source, target = golden_encoders()
    return spellings(source, space=""), spellings(target, space="")


def bare_path(source_ids: np.ndarray, target_ids: np.ndarray) -> Path:
    return least_path(source_ids, target_ids, *golden_spellings())


@cache
def golden_mined() -> np.ndarray:
    """[Vs] the authors' map as ids."""
    source, target = golden_encoders()
    authors = golden("mined_map.json")
    id_of = {spelling: id_ for id_, spelling in enumerate(spellings(target))}
    return np.array([id_of[authors[spelling]] for spelling in spellings(source)])


@cache
def authors(kind: str) -> tuple[AuthorsAligner, VocabularyMap]:
    source, target = golden_encoders()
    mined = golden_mined() if kind == "soft" else None
    same = same_spellings(spellings(source), spellings(target))
    table = map_translation(same if mined is None else mined, target)
    return AuthorsAligner(source, target, mined), table


def as_authors(
    aligner: AuthorsAligner,
    table: VocabularyMap,
    source_ids: np.ndarray,
    target_ids: np.ndarray,
    rows: list[dict[int, float]],
) -> list[dict[int, float]]:
    """What `compatibility: paper` makes of a block, by target position."""
    found = aligner.align(source_ids, target_ids)
    aligned = Aligned(found, np.zeros(len(found), np.int8), np.zeros(len(found), bool))
    none = np.zeros(len(rows), dtype=np.float32)
    kept = Kept(
        offsets_of(np.array([len(row) for row in rows])),
        np.array([id_ for row in rows for id_ in row]),
        np.array([logit for row in rows for logit in row.values()]),
        none[:0].astype(np.uint8),
        none,
        none,
    )
    # One more token, so that the last one predicts too.
    mine, theirs = (
        Tokens(np.array([0, len(ids) + 1]), np.append(ids, 0), np.zeros(len(ids) + 1, np.int64))
        for ids in (source_ids, target_ids)
    )
    fused, _, _ = fuse_blocks(
        theirs,
        np.array([0, 0]),
        [Reading(mine, kept.distributions(), kept.true_log_prob, table, aligned)],
        FusionRules(mince, as_authors=True),
    )
    assert fused.parts.tolist() == [1] * len(target_ids)
    return [
        dict(zip(ids, np.log(masses), strict=True))
        for ids, masses in zip(
            rows_of(offsets_of(fused.lengths), fused.outcomes),
            rows_of(offsets_of(fused.lengths), fused.masses),
            strict=True,
        )
    ]


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("n", range(TEXTS))
def test_what_is_carried_over_is_what_the_authors_carry(kind: str, n: int) -> None:
    """Their logits are our logarithms; of a fall-back they have a logit, we a mass of 1."""
    text = golden("alignment.json")[n]
    rows = [
        dict(zip(ids, logits, strict=True))
        for ids, logits in zip(text["source_topk_ids"], text["source_logits"], strict=True)
    ]
    ids = np.array(text["source_ids"]), np.array(text["target_ids"])
    found = as_authors(*authors(kind), *ids, rows)
    expected = text[f"aligned_{kind}"]
    assert [list(row) for row in found] == expected["ids"]
    for row, logits in zip(found, expected["logits"], strict=True):
        fell_back = logits == [1.0]
        assert list(row.values()) == pytest.approx([0.0] if fell_back else logits, abs=1e-5)


def test_authors_rules_by_hand() -> None:
    """Collisions, fall-back, the supposed first space, and a row that nothing is left of."""
    source, target = worlds.byte_bpe(), worlds.sentencepiece()
    mine, theirs = spellings(source), spellings(target)
    same = same_spellings(mine, theirs)
    word = next(word for word in mine if word.isalpha() and "▁" + word in theirs)
    source_ids, target_ids = np.array([mine.index(word)]), np.array([theirs.index("▁" + word)])
    known, unknown = np.nonzero(same >= 0)[0][:2].tolist(), int(np.nonzero(same < 0)[0][0])
    row = {known[1]: 4.0, unknown: 3.0, known[0]: 2.0}

    def carried(table: np.ndarray, ids: np.ndarray, row: dict[int, float]) -> dict[int, float]:
        hard = AuthorsAligner(source, target)
        (found,) = as_authors(hard, map_translation(table, target), source_ids, ids, [row])
        return found

    assert carried(same, target_ids, row) == pytest.approx(
        {same[known[1]]: 4.0, same[known[0]]: 2.0}
    )
    assert carried(np.full(len(mine), 7), target_ids, row) == pytest.approx({7: 4.0})
    assert carried(same, target_ids, {unknown: 1.0}) == {}
    assert carried(same, target_ids + 1, row) == {int(target_ids[0]) + 1: 0.0}


# The dynamic programme against its textbook


def slow_distance(a: str, b: str) -> int:
    """Levenshtein's recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
    )


def slow_path(source: list[str], target: list[str]) -> tuple[float, list[tuple[int, int]]]:
    """The whole matrix of costs, then back from its end; of equal options the first."""
    matrix = np.full((len(source) + 1, len(target) + 1), np.inf)
    matrix[0, 0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            before = min(matrix[i, j], matrix[i, j + 1], matrix[i + 1, j])
            matrix[i + 1, j + 1] = slow_distance(a, b) + before
    i, j = len(source), len(target)
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = steps[int(np.argmin([matrix[step] for step in steps]))]
        path.append((i - 1, j - 1))
    return matrix[-1, -1], path[::-1]


SPELLED = st.text("ab", max_size=3)
READING = st.lists(SPELLED, min_size=1, max_size=9)


@given(source=READING, target=READING)
@quick
def test_path_is_that_of_the_textbook(source: list[str], target: list[str]) -> None:
    path = least_path(np.arange(len(source)), np.arange(len(target)), source, target)
    cost, expected = slow_path(source, target)
    assert path.cost == cost
    assert list(zip(path.sources.tolist(), path.targets.tolist(), strict=True)) == expected
    of_target = [[i for i, j in expected if j == t] for t in range(len(target))]
    of_source = [[j for i, j in expected if i == s] for s in range(len(source))]
    assert rows_of(path.source_offsets, path.sources) == of_target
    assert rows_of(path.target_offsets, path.targets) == of_source


@given(reading=READING, data=st.data())
@quick
def test_ids_may_repeat(reading: list[str], data: st.DataObject) -> None:
    """Distances are of distinct ids; the path is that of the spelled-out readings."""
    ids = st.lists(st.integers(0, len(reading) - 1), min_size=1, max_size=9)
    mine, theirs = np.array(data.draw(ids)), np.array(data.draw(ids))
    path = least_path(mine, theirs, reading, reading)
    cost, expected = slow_path([reading[n] for n in mine], [reading[n] for n in theirs])
    assert path.cost == cost
    assert list(zip(path.sources.tolist(), path.targets.tolist(), strict=True)) == expected


def test_path_without_tokens_and_with_long_ones() -> None:
    nothing, one = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    path = least_path(nothing, one, ["a"], ["a"])
    assert (path.cost, len(path.sources)) == (0, 0)
    assert (path.source_offsets.tolist(), path.target_offsets.tolist()) == ([0, 0], [0])
    assert one_to_one(path, nothing, one, one).tolist() == [-1]
    for length in (255, 256, 70_000):  # each needs a wider type than the one before
        assert least_path(one, one, ["a" * length], [""]).cost == length


def slow_one_to_one(
    path: list[tuple[int, int]], source: list[str], target: list[str], mapped: dict[str, str]
) -> list[int]:
    found = []
    for t, token in enumerate(target):
        met = [s for s, other in path if other == t]
        if len(met) == 1 and [other for s, other in path if s == met[0]] == [t]:
            spelled = source[met[0]]
            found.append(met[0] if token in (spelled, mapped.get(spelled)) else -1)
        else:
            found.append(-1)
    return found


@pytest.mark.parametrize("with_map", [False, True])
@given(data=st.data())
@quick
def test_one_to_one_pairs(with_map: bool, data: st.DataObject) -> None:
    vocabulary = sorted(data.draw(st.sets(SPELLED, min_size=1, max_size=6)))
    ids = st.lists(st.integers(0, len(vocabulary) - 1), min_size=1, max_size=9)
    mine, theirs = np.array(data.draw(ids)), np.array(data.draw(ids))
    size = len(vocabulary)
    table = np.array(data.draw(st.lists(st.integers(-1, size - 1), min_size=size, max_size=size)))
    path = least_path(mine, theirs, vocabulary, vocabulary)
    found = one_to_one(path, mine, theirs, np.arange(size), table if with_map else None)
    assert found.dtype == np.int64
    mapped = {vocabulary[s]: vocabulary[t] for s, t in enumerate(table) if t >= 0}
    spelled = [vocabulary[n] for n in mine], [vocabulary[n] for n in theirs]
    _, expected = slow_path(*spelled)
    assert found.tolist() == slow_one_to_one(expected, *spelled, mapped if with_map else {})


@pytest.mark.parametrize(("source_name", "target_name"), [*PAIRS, *REAL_PAIRS])
def test_aligner_pairs_tokens_of_one_spelling(source_name: str, target_name: str) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    em, mined = (
        DynamicAligner(source, target),
        DynamicAligner(source, target, mined_of(source_name, target_name)),
    )
    mine, theirs = spellings(source), spellings(target)
    for seed in range(3):
        text = worlds.sample_text(seed)
        (read,), (other,) = target.encode([text], [True]), source.encode([text], [True])
        found, found_mined = em.align(other.ids, read.ids), mined.align(other.ids, read.ids)
        assert found.shape == found_mined.shape == read.ids.shape
        assert (found >= 0).mean() > 0.03
        agrees = found_mined == found
        assert (agrees | (found < 0)).all()  # the map only adds pairs
        bos = [len(encoder.vocabulary.prefix_ids) == 1 for encoder in (source, target)]
        assert found[-1] == -1  # EOS
        if any(bos):
            assert (found[0] == 0) == all(bos)
        for i in np.nonzero(found >= 0)[0][int(all(bos)) :]:
            assert mine[other.ids[found[i]]] == theirs[read.ids[i]]


@cache
def mined_of(source_name: str, target_name: str) -> np.ndarray:
    return mined_map(worlds.encoder_of(source_name), worlds.encoder_of(target_name))


@pytest.mark.parametrize("name", worlds.FAMILIES)
def test_a_reading_with_itself_is_the_identity(name: str) -> None:
    encoder = worlds.encoder_of(name)
    (read,) = encoder.encode([worlds.sample_text(1)], [True])
    found = DynamicAligner(encoder, encoder).align(read.ids, read.ids)
    assert found.tolist() == [*range(len(found) - 1), -1]
    (bare,) = encoder.encode([""], [True])
    empty = DynamicAligner(encoder, encoder).align(bare.ids, read.ids)
    with_bos = len(encoder.vocabulary.prefix_ids) == 1
    assert empty.tolist() == [0 if with_bos and i == 0 else -1 for i in range(len(read.ids))]


# Vocabulary maps


@given(
    source=st.lists(st.text("abc", max_size=5), max_size=12),
    target=st.lists(st.text("abc", max_size=5), max_size=12),
)
@quick
def test_nearest_spelling_is_the_first_of_the_nearest(source: list[str], target: list[str]) -> None:
    done: list[int] = []
    found = nearest_spellings(source, target, done.append)
    assert found.dtype == np.int64
    assert sum(done) == len(source)
    for spelling, place in zip(source, found.tolist(), strict=True):
        distances = [slow_distance(spelling, other) for other in target]
        assert place == (distances.index(min(distances)) if target else -1)


def test_nearest_of_very_long_spellings() -> None:
    assert nearest_spellings(["a" * 300, "b"], ["b" * 299, "a" * 290, "bb"]).tolist() == [1, 2]
    assert [least_dtype(n).__name__ for n in (255, 256, 65_535, 65_536)] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("family", worlds.FAMILIES)
def test_a_tokenizer_onto_itself_is_the_identity_on_text(family: str, name: str) -> None:
    encoder = worlds.encoder_of(family)
    vocabulary = encoder.vocabulary
    expected = np.where(vocabulary.is_text, np.arange(len(vocabulary)), -1)
    expected[vocabulary.eos_id] = vocabulary.eos_id
    assert MAPS[name](encoder, Encoder(encoder.tokenizer)).tolist() == expected.tolist()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_of_special_tokens_only_eos_is_mapped(
    source_name: str, target_name: str, name: str
) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    ids = MAPS[name](source, target)
    assert (ids.dtype, len(ids)) == (np.int64, len(source.vocabulary))
    for id_, is_text in enumerate(source.vocabulary.is_text.tolist()):
        if id_ == source.vocabulary.eos_id:
            assert ids[id_] == target.vocabulary.eos_id
        else:
            assert ids[id_] == -1 or (is_text and target.vocabulary.is_text[ids[id_]])


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_string_and_mined_map_by_their_rules(source_name: str, target_name: str) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    mine, theirs = spellings(source), spellings(target)
    candidates = np.nonzero(target.vocabulary.is_text)[0].tolist()
    done: list[int] = []
    by_string, by_distance = string_map(source, target), mined_map(source, target, done.append)
    assert sum(done) == len(source.vocabulary)
    assert (by_distance[by_string >= 0] == by_string[by_string >= 0]).all()
    ties = 0
    for id_ in np.nonzero(source.vocabulary.is_text)[0].tolist():
        equal = [other for other in candidates if theirs[other] == mine[id_]]
        assert by_string[id_] == (equal[0] if equal else -1)
        distances = [Levenshtein.distance(mine[id_], theirs[other]) for other in candidates]
        assert by_distance[id_] == candidates[distances.index(min(distances))]
        ties += distances.count(min(distances)) > 1
    assert ties > 10 or mine == theirs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mined_map_of_the_authors() -> None:
    """Equal wherever the least distance is unique, which is told here by all distances."""
    source, target = golden_encoders()
    mine, theirs = spellings(source), spellings(target)
    expected, found = golden_mined(), nearest_spellings(mine, theirs)
    unique = np.zeros(len(mine), dtype=np.bool_)
    for start in range(0, len(mine), 512):
        tile = slice(start, start + 512)
        distances = cdist(mine[tile], theirs, scorer=Levenshtein.distance, dtype=np.uint16)
        least = distances.min(axis=1, keepdims=True)
        nearest = distances == least
        unique[tile] = nearest.sum(axis=1) == 1
        rows = np.arange(len(nearest))
        assert nearest[rows, expected[tile]].all()
        assert (found[tile] == nearest.argmax(axis=1)).all()  # ties: the lower id
    assert 20_000 < unique.sum() < len(mine)
    assert (found[unique] == expected[unique]).all()

    ids = mined_map(source, target)
    changed = np.nonzero(ids != found)[0]  # the policy on special tokens, and nothing else
    special = ~source.vocabulary.is_text[changed] | ~target.vocabulary.is_text[found[changed]]
    assert special.all()
