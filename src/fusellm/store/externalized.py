"""Distributions of the sources on disk, and the target's tokens, shard by shard of the corpus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.align.ragged import offsets_of
from fusellm.align.strategies import Tokens
from fusellm.fusion.kept import Kept
from fusellm.store.manifest import StageFolder

TARGET = "target"

_TOKENS_SCHEMA = [
    ("block", pa.int64()),
    ("read", pa.bool_()),
    ("ids", pa.list_(pa.uint32())),
    ("ends", pa.list_(pa.uint32())),
]
TOKENS_SCHEMA = pa.schema(_TOKENS_SCHEMA)
SOURCE_SCHEMA = pa.schema(
    [
        *_TOKENS_SCHEMA,
        ("kept", pa.list_(pa.uint16())),
        ("kept_ids", pa.list_(pa.uint32())),
        ("log_probs", pa.list_(pa.float16())),
        ("counts", pa.list_(pa.uint8())),
        ("tail", pa.list_(pa.float32())),
        ("true_log_prob", pa.list_(pa.float32())),
    ]
)


def externalized_folder(run: Path, name: str) -> Path:
    """Folder of one source, or of the target's tokens."""
    return run / "externalize" / name


def open_externalized(run: Path, name: str) -> StageFolder:
    """One source's finished distributions, or the target's tokens.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    return StageFolder(externalized_folder(run, name)).require_complete(
        f"fusellm externalize {run}"
    )


def tokens_of(columns: Mapping[str, Any]) -> Tokens:
    """Tokens with boundaries, of the blocks of a record batch.

    A block that could not be read has none.

    Args:
        columns: as `Shard.batches` gives them.
    """
    ids, ends = columns["ids"], columns["ends"]
    there = np.repeat(columns["read"].astype(np.bool_), np.diff(ids.offsets))
    return Tokens(ends.offsets, ids.values[there].astype(np.int64), ends.values.astype(np.int64))


def kept_of(columns: Mapping[str, Any]) -> Kept:
    """A source's distributions at all positions that predict, of the blocks of a record batch."""
    return Kept(
        offsets_of(columns["kept"].values.astype(np.int64)),
        columns["kept_ids"].values.astype(np.int64),
        columns["log_probs"].values.astype(np.float32),
        columns["counts"].values,
        columns["tail"].values,
        columns["true_log_prob"].values,
    )
