"""Which part of a corpus a document belongs to: train, validation or held_out."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from fusellm.config import CorpusSettings
from fusellm.corpus.fields import Spans
from fusellm.corpus.formats import FileRecord
from fusellm.tokens.blocks import cut
from fusellm.tokens.context import spans_within
from fusellm.tokens.conversation import Conversation

PARTS = ("train", "validation", "held_out")

# Of a document in the parts validation and held_out no more than this is taken.
MEASURED_BYTES = 8192

Named = tuple[str, FileRecord]


@dataclass(frozen=True)
class Text:
    """One document, or a piece of one.

    Attributes:
        name: finds it again.
        part: that it belongs to.
        text: of it.
        context: bytes of its text in UTF-8 that a model is not asked to predict.
        is_utf8: whether all of it was UTF-8 where it comes from.
        ends: whether the document ends with it.
        conversation: that it is, if it is one; the text is what is learnt of it.
        unusable: why it is none, where it was to be one.
        prompt: what a model is to answer in place of the record, where one is.
    """

    name: str
    part: str
    text: str
    context: Spans = ()
    is_utf8: bool = True
    ends: bool = True
    conversation: Conversation | None = None
    unusable: str | None = None
    prompt: Conversation | str | None = None

    @classmethod
    def of(cls, name: str, part: str, record: FileRecord) -> "Text":
        """A whole record; halves of surrogate pairs, which JSON can have, become `?`."""
        text = _whole(record.text)
        is_utf8 = record.is_utf8 and text == record.text
        what = record.conversation, record.unusable, record.prompt
        return cls(name, part, text, record.context, is_utf8, record.ends, *what)


def part_by_hash(text: str, corpus: CorpusSettings) -> str:
    """The part of a document of a corpus that has none of its own, by a hash of its text.

    Equal documents therefore never stand on two sides.
    """
    drawn = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")
    share = drawn / 2**64
    if share < corpus.held_out_share:
        return "held_out"
    return "validation" if share < corpus.held_out_share + corpus.validation_share else "train"


def in_parts(
    records: Callable[[], Iterator[Named]],
    corpus: CorpusSettings,
    counts: Counter[str],
    apart: Collection[str] = (),
) -> Iterator[Text]:
    """The documents of an entry, each in its part.

    That is the one that its hash says. Where this leaves a part empty, as it must where there is
    one long text, all are cut by place: the last blocks are held out, those before them validate.
    A conversation is never cut: there the last ones are taken for that. A prompt that its record
    does not answer is of the part train, as there is nothing to measure on.

    Args:
        records: gives name and record of every document, anew at each call.
        apart: parts that have documents of their own elsewhere.
    """
    if not _hash_fills_parts(records(), corpus, apart):
        yield from _by_place(records, corpus, counts, apart)
        return
    for name, record in records():
        part = part_by_hash(record.text, corpus) if _measurable(record) else "train"
        yield Text.of(name, "train" if part in apart else part, record)


def _measurable(record: FileRecord) -> bool:
    return record.prompt is None or bool(record.text.strip())


def _shares(corpus: CorpusSettings, apart: Collection[str]) -> dict[str, float]:
    shares = {"validation": corpus.validation_share, "held_out": corpus.held_out_share}
    return {part: share for part, share in shares.items() if share and part not in apart}


def _hash_fills_parts(
    records: Iterator[Named], corpus: CorpusSettings, apart: Collection[str]
) -> bool:
    """Whether each part gets a document; it reads no further than it must."""
    empty = set(_shares(corpus, apart))
    if not empty:
        return True
    empty.add("train")
    for _, record in records:
        if not _measurable(record):
            empty.discard("train")
        elif record.text.strip():
            part = part_by_hash(record.text, corpus)
            empty.discard("train" if part in apart else part)
        if not empty:
            return True
    return False


def _by_place(
    records: Callable[[], Iterator[Named]],
    corpus: CorpusSettings,
    counts: Counter[str],
    apart: Collection[str],
) -> Iterator[Text]:
    total = sum(1 for _, record in records() for _ in _blocks(record, corpus))
    shares = _shares(corpus, apart)
    first_block, left = {}, total
    for part in reversed(shares):  # from the end, each at least a block; the first stays in train
        left = max(left - max(round(shares[part] * total), 1), 1)
        first_block[part] = left
    # Of what is measured on, a piece counts as a document: intervals are drawn over documents.
    in_piece = max(MEASURED_BYTES // corpus.block_bytes, 1)

    def piece(number: int) -> tuple[str, int]:
        part = next((part for part, first in first_block.items() if number >= first), "train")
        return part, 0 if part == "train" else number // in_piece

    before = 0
    for name, record in records():
        if record.unusable is not None or not _measurable(record):
            yield Text.of(name, "train", record)
            continue
        blocks = list(_blocks(record, corpus))
        counts["documents_cut_by_place" if blocks else "empty_documents"] += 1
        start, size = 0, sum(len(block.encode()) for block in blocks)
        for (part, _), numbers in itertools.groupby(range(before, before + len(blocks)), piece):
            text = "".join([blocks[number - before] for number in numbers])
            end = start + len(text.encode())
            context = spans_within(record.context, start, end)
            is_utf8 = (record.is_utf8 and _whole(record.text) == record.text) or start > 0  # once
            ends = record.ends and end == size
            what = record.conversation, record.unusable, record.prompt
            yield Text(f"{name}@{start}", part, text, context, is_utf8, ends, *what)
            start = end
        before += len(blocks)


def _blocks(record: FileRecord, corpus: CorpusSettings) -> Iterator[str]:
    if record.conversation is not None or record.prompt is not None:
        if record.text.strip():
            yield record.text  # whole
    elif record.text.strip():
        yield from cut(_whole(record.text), corpus.block_bytes)


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
