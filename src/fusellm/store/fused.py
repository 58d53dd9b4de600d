"""Fused distributions on disk: one a target position, in parts, each with the source it is of."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from fusellm.store.manifest import StageFolder, StageWriter
from fusellm.store.tables import Shard, write_table

FUSED_SCHEMA = pa.schema(
    [
        ("block", pa.int64()),
        ("ids", pa.list_(pa.uint32())),
        ("parts", pa.list_(pa.uint8())),
        ("source", pa.list_(pa.int8())),
        ("lengths", pa.list_(pa.uint16())),
        ("outcomes", pa.list_(pa.uint32())),
        ("masses", pa.list_(pa.float32())),
        ("rest", pa.list_(pa.float32())),
    ]
)
_MEMBERS_SCHEMA = pa.schema([("offsets", pa.list_(pa.int64())), ("members", pa.list_(pa.int64()))])


def fused_folder(run: Path) -> Path:
    """Folder of a run's fused distributions."""
    return run / "fuse"


def open_fused(run: Path) -> StageFolder:
    """A run's finished fused distributions.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    return StageFolder(fused_folder(run)).require_complete(f"fusellm fuse {run}")


def read_members(folder: StageFolder, source: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, target ids) of a source's outcomes."""
    row = Shard(folder, _members_shard(source)).block(0)
    return row["offsets"], row["members"]


def write_members(
    folder: StageWriter, source: str, offsets: np.ndarray, members: np.ndarray
) -> None:
    """Write a source's outcomes as sets of target ids."""
    columns = {"offsets": [offsets], "members": [members]}
    write_table(folder, _members_shard(source), columns, _MEMBERS_SCHEMA)


def _members_shard(source: str) -> str:
    return f"members-{source}.arrow"
