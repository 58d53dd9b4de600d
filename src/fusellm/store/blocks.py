"""The corpus of a run on disk: blocks, in shards, in the parts train, validation and held_out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names

BLOCKS_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("document", pa.string()),
        ("domain", pa.string()),
        ("last", pa.bool_()),
        ("text", pa.large_string()),
    ]
)


@dataclass(frozen=True)
class Block:
    """One block. `number` counts blocks within its part."""

    number: int
    document: str
    domain: str
    last: bool
    text: str


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
    """All blocks of a shard."""
    shard = Shard(folder, name)
    rows = (shard.block(n) for n in range(len(shard)))
    return [
        Block(row["block"], row["document"], row["domain"], row["last"], row["text"])
        for row in rows
    ]


def digest_of_blocks(blocks: Sequence[Block]) -> str:
    """SHA-256 over the texts of blocks and where documents end: what a model reads of them."""
    found = hashlib.sha256()
    for block in blocks:
        data = block.text.encode()
        found.update(f"{len(data)} {block.last}\n".encode() + data)
    return found.hexdigest()


def read_part(folder: StageFolder, part: str) -> list[Block]:
    """All blocks of a part that is small enough to hold: validation or held_out."""
    return [block for name in shard_names(folder, f"{part}-") for block in read_shard(folder, name)]
