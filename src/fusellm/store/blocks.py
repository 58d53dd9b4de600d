"""The corpus of a run on disk: blocks, in shards, in the parts train, validation and held_out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.arrays.ragged import Ragged
from fusellm.store.layout import Batch, Layout, Wrong, list_field
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.tokens.chat import ChatEncoder
from fusellm.tokens.conversation import Conversation
from fusellm.tokens.encode import Encoded, Encoder

CONTEXT, SPANS, CONVERSATION = "context", "spans", "conversation"
BLOCKS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("document", pa.string()),
        ("domain", pa.string()),
        ("last", pa.bool_()),
        ("text", pa.large_string()),
    ]
)
BLOCKS_WITH_CONTEXT_SCHEMA = BLOCKS_SCHEMA.append(list_field(CONTEXT, pa.uint32()))
CONVERSATIONS_SCHEMA = BLOCKS_SCHEMA.append(list_field(SPANS, pa.uint32())).append(
    pa.field(CONVERSATION, pa.large_string())
)


def _context_is_of_the_text(batch: Batch) -> Wrong | None:
    """Spans of context ascend, and end within the block's text."""
    if CONTEXT not in batch:
        return None
    spans: Ragged = batch[CONTEXT]
    for row, length in enumerate(text_bytes(batch)):
        edges = spans.values[spans.offsets[row] : spans.offsets[row + 1]]
        if len(edges) % 2 or (edges[1:] < edges[:-1]).any() or (edges > length).any():
            what = f"{edges.tolist()[:6]} are no spans of a text of {length:,} bytes"
            return Wrong(row, CONTEXT, what)
    return None


def _spans_make_up_the_text(batch: Batch) -> Wrong | None:
    """What is learnt of a conversation is one span after another, to the end of the text."""
    if SPANS not in batch:
        return None
    spans: Ragged = batch[SPANS]
    for row, length in enumerate(text_bytes(batch)):
        ends = spans.values[spans.offsets[row] : spans.offsets[row + 1]].astype(np.int64)
        if len(ends) == 0 or ends[-1] != length or (np.diff(ends, prepend=0) <= 0).any():
            what = f"spans that end at {ends.tolist()[:6]} are not a text of {length:,} bytes"
            return Wrong(row, SPANS, what)
    return None


def _conversations_are_of_the_text(batch: Batch) -> Wrong | None:
    """What is learnt of a conversation is the text, span by span."""
    if CONVERSATION not in batch:
        return None
    spans: Ragged = batch[SPANS]
    for row, (told, text) in enumerate(zip(batch[CONVERSATION], batch["text"], strict=True)):
        try:
            one = Conversation.from_json(told)
            ends = spans.values[spans.offsets[row] : spans.offsets[row + 1]]
            same = one.text == text and [*one.span_ends] == ends.tolist()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            same = False
        if not same:
            return Wrong(row, CONVERSATION, f"{told[:40]!r}… does not say the block's text")
    return None


BLOCKS = Layout(
    (BLOCKS_SCHEMA, BLOCKS_WITH_CONTEXT_SCHEMA, CONVERSATIONS_SCHEMA),
    (_context_is_of_the_text, _spans_make_up_the_text, _conversations_are_of_the_text),
)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        number: counts blocks within its part.
        document: that it is of.
        domain: of its document.
        last: whether it ends its document.
        text: of it.
        context: bytes of it that a model reads and is not asked to predict, each span as (first,
            one more than the last), ascending.
        conversation: that it is, if it is one; the text is then what is learnt of it.
    """

    number: int
    document: str
    domain: str
    last: bool
    text: str
    context: tuple[tuple[int, int], ...] = ()
    conversation: Conversation | None = None


def corpus_folder(run: Path) -> Path:
    """Folder of a run's corpus."""
    return run / "corpus"


def open_corpus(run: Path) -> StageFolder:
    """A run's finished corpus.

    Raises:
        StoreError: it is missing, unfinished or damaged.
    """
    return StageFolder(corpus_folder(run)).require_complete(f"fusellm corpus {run}")


def read_shard(folder: StageFolder, name: str) -> list[Block]:
    """All blocks of a shard.

    Raises:
        StoreError: it is missing or damaged.
    """
    shard = Shard(folder, name, BLOCKS)
    return [block_of(shard.block(n)) for n in range(len(shard))]


def block_of(row: Mapping[str, Any]) -> Block:
    """A block, of its row as `Shard.block` gives it."""
    return Block(
        row["block"],
        row["document"],
        row["domain"],
        row["last"],
        row["text"],
        context_of(row),
        Conversation.from_json(row[CONVERSATION]) if CONVERSATION in row else None,
    )


def context_of(row: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The spans of context of a block, as `Shard.block` gives it."""
    flat = row[CONTEXT].tolist() if CONTEXT in row else []
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def text_bytes(columns: Batch) -> np.ndarray:
    """[blocks] bytes of the texts of a record batch."""
    return np.array([len(text.encode()) for text in columns["text"]], dtype=np.int64)


def block_columns(blocks: Sequence[Block], schema: pa.Schema) -> dict[str, Sequence[Any]]:
    """Blocks as columns of a shard."""
    columns: dict[str, Sequence[Any]] = {
        "block": [block.number for block in blocks],
        "document": [block.document for block in blocks],
        "domain": [block.domain for block in blocks],
        "last": [block.last for block in blocks],
        "text": [block.text for block in blocks],
    }
    if CONTEXT in schema.names:
        spans = [np.array(block.context, dtype=np.uint32).ravel() for block in blocks]
        columns[CONTEXT] = spans
    if CONVERSATION in schema.names:
        told = [block.conversation for block in blocks if block.conversation is not None]
        columns[SPANS] = [np.array(one.span_ends, dtype=np.uint32) for one in told]
        columns[CONVERSATION] = [one.to_json() for one in told]
    return {name: columns[name] for name in schema.names}


def encode_blocks(encoder: Encoder, blocks: Sequence[Block]) -> list[Encoded]:
    """Blocks as a tokenizer cuts them; conversations by its chat template."""
    conversations = [block.conversation for block in blocks if block.conversation is not None]
    if conversations:
        assert isinstance(encoder, ChatEncoder)
        return encoder.encode_conversations(conversations)
    return encoder.encode([block.text for block in blocks], [block.last for block in blocks])


def digest_of_blocks(blocks: Sequence[Block]) -> str:
    """SHA-256 over the texts of blocks and where documents end: what a model reads of them."""
    sha256 = hashlib.sha256()
    for block in blocks:
        told = block.text if block.conversation is None else block.conversation.to_json()
        data = told.encode()
        sha256.update(f"{len(data)} {block.last}\n".encode() + data)
    return sha256.hexdigest()


def read_part(folder: StageFolder, part: str) -> list[Block]:
    """All blocks of a part that is small enough to hold: validation or held_out."""
    return [block for name in shard_names(folder, f"{part}-") for block in read_shard(folder, name)]
