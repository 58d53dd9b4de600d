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

CONTEXT = "context"
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


BLOCKS = Layout((BLOCKS_SCHEMA, BLOCKS_WITH_CONTEXT_SCHEMA), (_context_is_of_the_text,))


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
    """

    number: int
    document: str
    domain: str
    last: bool
    text: str
    context: tuple[tuple[int, int], ...] = ()


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
    rows = (shard.block(n) for n in range(len(shard)))
    return [
        Block(
            row["block"],
            row["document"],
            row["domain"],
            row["last"],
            row["text"],
            context_of(row),
        )
        for row in rows
    ]


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
        CONTEXT: [np.array(block.context, dtype=np.uint32).ravel() for block in blocks],
    }
    return {name: columns[name] for name in schema.names}


def digest_of_blocks(blocks: Sequence[Block]) -> str:
    """SHA-256 over the texts of blocks and where documents end: what a model reads of them."""
    sha256 = hashlib.sha256()
    for block in blocks:
        data = block.text.encode()
        sha256.update(f"{len(data)} {block.last}\n".encode() + data)
    return sha256.hexdigest()


def read_part(folder: StageFolder, part: str) -> list[Block]:
    """All blocks of a part that is small enough to hold: validation or held_out."""
    return [block for name in shard_names(folder, f"{part}-") for block in read_shard(folder, name)]
