"""Distributions of the sources on disk, and the target's tokens, shard by shard of the corpus."""

from pathlib import Path

import pyarrow as pa

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
