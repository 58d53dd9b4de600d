"""How far two tokenizers agree, against a count in plain Python."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

import worlds
from fusellm.alignment.translation import class_translation
from fusellm.explain.tokenizers import TokenizerComparison, compare_tokenizers
from fusellm.progress import Silent
from fusellm.tokens.encode import Encoder

PAIRS = [
    ("byte-bpe", "sentencepiece"),
    ("sentencepiece", "byte-unigram"),
    ("always-prefixed", "prefixed-unless-space"),
    ("byte-bpe", "byte-bpe"),
    ("always-prefixed", "always-prefixed"),
]
TEXTS = {
    "one": [worlds.sample_text(1), " begins with a space\n"],
    "other": [worlds.sample_text(2), "naïve 日本語 👩\u200d👩\u200d👧"],
}
BLOCK_BYTES = 200


def blocks_of(document: str) -> list[str]:
    """All blocks here are cut after a line end, which the test asserts by joining them."""
    blocks, data = [], document
    while len(data.encode()) > BLOCK_BYTES:
        cut = max(
            n
            for n in range(1, len(data))
            if data[n - 1] == "\n" and len(data[:n].encode()) <= BLOCK_BYTES
        )
        blocks.append(data[:cut])
        data = data[cut:]
    return [*blocks, data]


def read_bytes(encoder: Encoder, text: str, is_last: bool) -> tuple[list[int], list[bytes]]:
    """(ids, what has been read after each)."""
    (block,) = encoder.encode([text], [is_last])
    assert block.ends is not None
    return block.ids.tolist(), [text.encode()[:end] for end in block.ends.tolist()]


def situation(mine: list[bytes], theirs: list[bytes], i: int, from_start: bool) -> str:
    """By what was read, of the target's position i; both ends of the block are no positions.

    Where nothing was read the two can be compared only if `from_start`.
    """
    if i + 2 < len(mine) and mine[i] == mine[i + 1]:
        return "unaligned"
    if not (mine[i] or from_start):
        return "unaligned"
    places = [j for j in range(len(theirs) - 1) if theirs[j] == mine[i]]
    if not places:
        return "unaligned"
    theirs_next, mine_next = theirs[places[-1] + 1], mine[i + 1]
    if theirs_next == mine_next:
        return "same"
    if len(theirs_next) > len(mine_next):
        return "beyond"
    return "several" if mine_next in theirs else "crossed"


def writes_a_dummy_space(*encoders: Encoder) -> bool:
    """Whether one of the tokenizers puts a space before a text that has none."""
    for encoder in encoders:
        ids = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
        if "".join(encoder.tokenizer.convert_ids_to_tokens(ids)) != "a":
            return True
    return False


def count(source: Encoder, target: Encoder, documents: list[str]) -> Counter[str]:
    """Everything that a `Domain` counts."""
    counts: Counter[str] = Counter()
    of_target = class_translation(source, target).outcome_of_target.tolist()
    from_start = source is target or not writes_a_dummy_space(source, target)
    special = {n for n, token in enumerate(target.vocabulary.token_bytes) if token is None}
    for document in documents:
        blocks = blocks_of(document)
        for n, text in enumerate(blocks):
            is_last = n + 1 == len(blocks)
            ids, mine = read_bytes(target, text, is_last)
            their_ids, theirs = read_bytes(source, text, is_last)
            counts["blocks"] += 1
            counts["bytes_read"] += len(text.encode())
            counts["target_tokens"] += len([id_ for id_ in ids if id_ not in special])
            counts["source_tokens"] += len(
                [id_ for id_ in their_ids if source.vocabulary.token_bytes[id_] is not None]
            )
            for i, (_, following) in enumerate(pairwise(ids)):
                counts["positions"] += 1
                counts[situation(mine, theirs, i, from_start)] += 1
                outcome = of_target[following]
                alike = of_target.count(outcome) if outcome >= 0 else 0
                counts["in_single_classes"] += alike == 1
                counts["in_small_classes"] += 1 <= alike <= 3
    return counts


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_counts_are_those_of_plain_python(source_name: str, target_name: str) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    found = compare_tokenizers(source, target, TEXTS, block_bytes=BLOCK_BYTES)
    assert [domain.name for domain in found.domains] == list(TEXTS)
    for domain in found.domains:
        expected = count(source, target, TEXTS[domain.name])
        for name in ("blocks", "bytes_read", "target_tokens", "source_tokens", "positions"):
            assert getattr(domain, name) == expected[name], name
        assert domain.in_single_classes == expected["in_single_classes"]
        assert domain.in_small_classes == expected["in_small_classes"]
        assert domain.situations == {case: expected[case] for case in domain.situations}
        assert sum(domain.situations.values()) == domain.positions
        assert domain.aligned == domain.positions - expected["unaligned"]
        assert domain.left_out == (0, 0)


@pytest.mark.parametrize(("source_name", "target_name"), PAIRS)
def test_vocabularies_and_classes_are_counted(source_name: str, target_name: str) -> None:
    source, target = worlds.encoder_of(source_name), worlds.encoder_of(target_name)
    found = compare_tokenizers(source, target, {})
    mine = [token for token in source.vocabulary.token_bytes if token]
    theirs = [token for token in target.vocabulary.token_bytes if token]
    assert found.shared_bytes == len(set(mine) & set(theirs))
    assert found.source.shared_tokens == len([token for token in mine if token in theirs])
    assert found.target.shared_tokens == len([token for token in theirs if token in mine])
    assert found.target.shared_share == found.target.shared_tokens / len(theirs)
    assert found.source.tokens == len(source.tokenizer)
    assert found.target.text_tokens == len(theirs)
    assert found.target.eos == target.tokenizer.eos_token
    assert set(found.target.special) == set(target.tokenizer.all_special_tokens)
    assert found.same == (source_name == target_name)
    members = Counter(class_translation(source, target).outcome_of_target.tolist())
    del members[-1]
    classes = found.classes
    assert classes.classes == len(members)
    assert classes.single == list(members.values()).count(1)
    assert classes.target_tokens == sum(members.values())
    if not found.same:
        most = [number for _, number in members.most_common(5)]
        assert [large.target_tokens for large in classes.largest] == most
        for large in classes.largest:
            assert large.target_tokens > len(large.members) or len(large.members) == 12
            assert all(member.startswith(large.root) for member in large.members)
            assert large.source_tokens > 0
    else:
        assert classes.largest == ()


def test_what_is_said_of_each_side() -> None:
    def sides(source: str, target: str) -> TokenizerComparison:
        return compare_tokenizers(worlds.encoder_of(source), worlds.encoder_of(target), {})

    found = sides("byte-bpe", "always-prefixed")
    assert (found.source.kind, found.source.dummy_prefix) == ("byte-level", "none")
    assert (found.target.kind, found.target.dummy_prefix) == ("SentencePiece", "always")
    assert (found.source.prefix, found.source.fallback_tokens) == ((), 0)
    assert found.target.fallback_tokens == 256
    assert found.eos_becomes_eos
    found = sides("sentencepiece", "raw-bytes")
    assert (found.source.prefix, found.source.dummy_prefix) == (("<s>",), "where no space is")
    assert (found.target.kind, found.target.text_tokens) == ("raw bytes", 256)


class Counted(Silent):
    """How far a bar came."""

    total = done = 0.0

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Any]:
        self.total = total
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount


def test_blocks_that_a_tokenizer_changes_are_left_out_and_shown() -> None:
    texts = {"plain": ["nothing to change\n"], "accents": ["plain\n", "a\u0301b", "x\u2581y"]}
    shown = Counted()
    source, target = worlds.normalizing("nfc"), worlds.sentencepiece()
    found = compare_tokenizers(source, target, texts, progress=shown)
    plain, accents = found.domains
    assert (plain.left_out, plain.left_out_example) == ((0, 0), "")
    assert (accents.left_out, accents.left_out_example) == ((1, 1), "a\u0301b")
    assert accents.blocks == 1
    assert shown.done == shown.total == 3


def test_a_domain_of_which_nothing_is_read() -> None:
    texts: dict[str, list[str]] = {"loud": ["A"], "none": []}
    found = compare_tokenizers(worlds.normalizing("lower"), worlds.byte_bpe(), texts)
    for domain in found.domains:
        assert (domain.blocks, domain.positions, domain.aligned) == (0, 0, 0)
