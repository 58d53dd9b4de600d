"""Cutting documents into blocks, as far as each part of the corpus has room."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fusellm.config import HubDocuments, Recipe
from fusellm.corpus.conversations import within
from fusellm.corpus.documents import BuiltinReader, read_documents
from fusellm.corpus.fields import Spans
from fusellm.corpus.generated import with_answers
from fusellm.corpus.parts import MEASURED_BYTES, PARTS, Text
from fusellm.errors import CorpusError
from fusellm.progress import Bar, Progress
from fusellm.store.answers import GeneratedAnswer
from fusellm.store.blocks import (
    BLOCKS_SCHEMA,
    BLOCKS_WITH_CONTEXT_SCHEMA,
    CONVERSATIONS_SCHEMA,
    Block,
    block_columns,
)
from fusellm.store.tables import write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.blocks import cut
from fusellm.tokens.context import spans_within
from fusellm.tokens.conversation import Conversation


def write_corpus(
    recipe: Recipe,
    folder: StageWriter,
    count_tokens: Callable[[str], int],
    progress: Progress,
    answers_to: Callable[[int], Iterator[GeneratedAnswer]] = lambda entry: iter(()),
) -> None:
    """Cut a recipe's documents into blocks, shard by shard, and finish the folder.

    Args:
        count_tokens: of a text, for a budget in tokens.
        answers_to: what a model has written for an entry that is generated, by its number.

    Raises:
        CorpusError: a document cannot be read, or a part has no text.
        StoreError: an answer is of no document.
    """
    corpus = recipe.corpus
    schema = BLOCKS_WITH_CONTEXT_SCHEMA if corpus.has_context else BLOCKS_SCHEMA
    if corpus.has_conversations:
        schema = CONVERSATIONS_SCHEMA
    parts = {part: _PartWriter(folder, part, schema, corpus.shard_blocks) for part in PARTS}
    in_tokens = corpus.train_tokens is not None
    measure, unit = (count_tokens, "tokens") if in_tokens else (_utf8_bytes, "bytes")
    cutter = _Cutter(corpus.block_bytes, measure, parts)
    most_validation = float(corpus.validation_bytes)
    most_held_out = float(corpus.held_out_bytes)
    measured: dict[tuple[str, str], float] = {}
    builtin = BuiltinReader(corpus, progress)
    for number, (entry, budget) in enumerate(_budgets(recipe)):
        texts = read_documents(entry, corpus, cutter.counts, builtin)
        if number in corpus.generated:
            answers = answers_to(number), entry, corpus.block_bytes
            texts = with_answers(texts, *answers, cutter.counts)
        room = {
            "train": budget,
            "validation": measured.get((entry.domain, "validation"), most_validation),
            "held_out": measured.get((entry.domain, "held_out"), most_held_out),
        }
        total = 0.0 if budget == float("inf") else budget
        with progress.start(f"cutting {entry.domain} into blocks", total, unit) as bar:
            own = isinstance(entry, HubDocuments) and entry.has_own_splits
            cutter.take(entry.domain, texts, room, own, bar)
        measured |= {(entry.domain, part): room[part] for part in ("validation", "held_out")}
    for part in parts.values():
        part.close()
    cutter.tell(progress)
    _require_text(recipe, parts)
    summary = {part: dict(writer.bytes_by_domain) for part, writer in parts.items()}
    folder.finish({"bytes": summary, **+cutter.counts})


def _budgets(recipe: Recipe) -> Iterator[tuple[Any, float]]:
    whole = recipe.corpus.train_tokens or recipe.corpus.train_bytes or float("inf")
    weights = sum(entry.weight for entry in recipe.corpus.documents)
    for entry in recipe.corpus.documents:
        yield entry, whole * entry.weight / weights


@dataclass
class _Cutter:
    """Cuts documents into blocks and counts what is odd about them.

    Attributes:
        block_bytes: longest block.
        measure: size of a text of the part train, in the budget's unit.
        parts: what takes the blocks.
    """

    block_bytes: int
    measure: Callable[[str], int]
    parts: "dict[str, _PartWriter]"
    counts: Counter[str] = field(default_factory=Counter)
    _first_invalid: str = ""
    _first_unusable: str = ""

    def take(
        self,
        domain: str,
        texts: Iterator[Text],
        room: dict[str, float],
        measured_first: bool,
        bar: Bar,
    ) -> None:
        """Take documents until there is no room in any part; `room` goes down.

        `measured_first` says that nothing to measure on comes after the first training document.
        """
        for document in texts:
            if document.unusable is not None:
                self._leave_out(document, document.unusable)
                continue
            if not document.text.strip():
                self.counts["empty_documents"] += 1
                continue
            if room[document.part] <= 0:
                spent = measured_first and document.part == "train"
                if spent or not any(left > 0 for left in room.values()):
                    break
                continue
            if document.conversation is None:
                size = self._add(document, domain, room[document.part])
            else:
                size = self._add_conversation(document, document.conversation, domain)
            room[document.part] -= size
            if document.part == "train":
                bar.advance(size)

    def _add(self, document: Text, domain: str, room: float) -> int:
        """Take what fits of a document, at least its first block; returns its size."""
        blocks = list(cut(document.text, self.block_bytes))
        whole = len(blocks)
        if document.part == "train":
            size = self.measure(document.text)
            if size > room:
                blocks, size = _leading(blocks, self.measure, room)
        else:  # many beginnings say more than a few long documents
            blocks, size = _leading(blocks, _utf8_bytes, min(MEASURED_BYTES, room))
        start = 0
        for n, block in enumerate(blocks):
            end = start + _utf8_bytes(block)
            context = spans_within(document.context, start, end)
            ends = document.ends and n == whole - 1
            self.parts[document.part].add(document.name, domain, ends, block, context)
            self.counts["context_bytes"] += sum(b - a for a, b in context)
            start = end
        self._count(document)
        return size

    def _count(self, document: Text) -> None:
        self.counts[f"documents_{document.part}"] += 1
        if not document.is_utf8:
            self.counts["documents_with_invalid_utf8"] += 1
            self._first_invalid = self._first_invalid or document.name

    def _add_conversation(self, document: Text, whole: Conversation, domain: str) -> int:
        """Take a conversation, or as much of its end as a block has room for; gives its size."""
        fitting = within(whole, self.block_bytes)
        if fitting is None:
            self._leave_out(document, "its last question is longer than corpus.block_bytes")
            return 0
        conversation, turns = fitting
        self.counts["turns_taken_away"] += turns
        self.counts["answers_cut"] += conversation.cut
        part, text = document.part, conversation.text
        self.parts[part].add(document.name, domain, True, text, (), conversation)
        self._count(document)
        return self.measure(text) if part == "train" else _utf8_bytes(text)

    def _leave_out(self, document: Text, reason: str) -> None:
        self.counts["unusable_conversations"] += 1
        self._first_unusable = self._first_unusable or f"{document.name}: {reason}"

    def tell(self, progress: Progress) -> None:
        """Say what a user would want to know of the documents."""
        by_place = self.counts["documents_cut_by_place"]
        if by_place:
            progress.say(
                f"documents cut by place: {by_place}, as their hashes leave a part of the corpus "
                "without any; the end of the text is held out, and what is before it validates"
            )
        invalid = self.counts["documents_with_invalid_utf8"]
        if invalid:
            progress.say(
                f"documents with bytes that are no UTF-8, read as \ufffd (halves of characters in "
                f"JSON as ?): {invalid}; the first is {self._first_invalid}. If these are more "
                "than strays, convert the files (iconv -t UTF-8)"
            )
        unusable = self.counts["unusable_conversations"]
        if unusable:
            progress.say(
                f"conversations that cannot be learnt from, left out: {unusable:,}; the first is "
                f"{self._first_unusable}"
            )
        turns, cut_short = self.counts["turns_taken_away"], self.counts["answers_cut"]
        if turns or cut_short:
            progress.say(
                f"conversations longer than corpus.block_bytes: {turns:,} of their first turns are "
                f"taken away, and {cut_short:,} last answers are cut"
            )
        unanswered = self.counts["prompts_without_answer"]
        if unanswered:
            progress.say(f"prompts without a generated answer, left out: {unanswered:,}")
        empty = self.counts["empty_documents"]
        if empty:
            progress.say(f"documents without any text, left out: {empty}")


def _leading(
    blocks: Sequence[str], measure: Callable[[str], int], most: float
) -> tuple[list[str], int]:
    """The first block, and those after it that fit in `most` together with it; their size."""
    taken, size = [blocks[0]], measure(blocks[0])
    for block in blocks[1:]:
        more = measure(block)
        if size + more > most:
            break
        taken.append(block)
        size += more
    return taken, size


def _utf8_bytes(text: str) -> int:
    return len(text.encode())


def _longest_bytes(block: Block) -> int:
    """Of all that a model reads of a block but its template."""
    if block.conversation is None:
        return _utf8_bytes(block.text)
    return len(block.conversation.to_json().encode())


def _require_text(recipe: Recipe, parts: dict[str, "_PartWriter"]) -> None:
    cures = {"train": "check the paths and text_field of corpus.documents"} | {
        part: f"give it more text, raise corpus.{part}_share, or name a {part}_split of a dataset"
        for part in ("validation", "held_out")
    }
    for part, cure in cures.items():
        if parts[part].blocks == 0:
            raise CorpusError(f"the corpus {recipe.name!r} has no text in its part {part}; {cure}")


class _PartWriter:
    """Collects one part's blocks and writes them shard by shard."""

    def __init__(
        self, folder: StageWriter, part: str, schema: pa.Schema, shard_blocks: int
    ) -> None:
        self._folder, self._part = folder, part
        self._schema, self._shard_blocks = schema, shard_blocks
        self._pending: list[Block] = []
        self._shards = 0
        self.blocks = 0
        self.bytes_by_domain: defaultdict[str, int] = defaultdict(int)

    def add(
        self,
        document: str,
        domain: str,
        last: bool,
        text: str,
        context: Spans,
        conversation: Conversation | None = None,
    ) -> None:
        self._pending.append(
            Block(self.blocks, document, domain, last, text, context, conversation)
        )
        self.blocks += 1
        self.bytes_by_domain[domain] += _utf8_bytes(text)
        if len(self._pending) == self._shard_blocks:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()

    def _write(self) -> None:
        name = f"{self._part}-{self._shards:05d}.arrow"
        columns = block_columns(self._pending, self._schema)
        most = max(map(_longest_bytes, self._pending))
        write_table(self._folder, name, columns, self._schema, {"longest_bytes": most})
        self._shards += 1
        self._pending = []
