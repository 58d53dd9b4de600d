"""Fused distributions on disk: one a target position, in parts, each with the source it is of."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, id_type, list_field, write_table
from fusellm.store.writer import StageWriter

_MEMBERS_SCHEMA = pa.schema([("offsets", pa.list_(pa.int64())), ("members", pa.list_(pa.int64()))])


def fused_schema(vocabulary: int, outcomes: int) -> pa.Schema:
    """Columns of fused distributions.

    Args:
        vocabulary: of the target.
        outcomes: most that a source has.
    """
    return pa.schema(
        [
            pa.field("block", pa.int64(), nullable=False),
            list_field("ids", id_type(vocabulary)),
            list_field("parts", pa.uint8()),
            list_field("source", pa.int8()),
            list_field("lengths", pa.uint16()),
            list_field("outcomes", id_type(outcomes)),
            list_field("masses", pa.float32()),
            list_field("rest", pa.float32()),
        ]
    )


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
