"""Shards as Arrow files: one row a block, ragged lists, zstd, record batches of at most 64 blocks.

Arrow IPC is read by other tools (pyarrow, polars, duckdb) and lets a record batch be read alone.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from fusellm.store.manifest import StageFolder, StageWriter

BATCH_BLOCKS = 64


def write_table(
    writer: StageWriter,
    name: str,
    columns: Mapping[str, Sequence[Any]],
    schema: pa.Schema,
    counts: Mapping[str, Any] | None = None,
) -> None:
    """Write a shard. `columns` holds one entry a block; ragged columns hold numpy arrays."""
    arrays = [_column(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)

    def write(file: BinaryIO) -> None:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(file, schema, options=options) as out:
            out.write_table(table, max_chunksize=BATCH_BLOCKS)

    writer.write(name, write, {"blocks": table.num_rows} | dict(counts or {}))


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    lengths = np.array([len(value) for value in values], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    dtype = kind.value_type.to_pandas_dtype()
    flat = (
        np.concatenate([np.asarray(value, dtype=dtype) for value in values])
        if len(values)
        else np.zeros(0, dtype=dtype)
    )
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind.value_type))


class Shard:
    """A finished shard, verified when opened; record batches are read as they are asked for."""

    def __init__(self, folder: StageFolder, name: str, cached_batches: int | None = 4) -> None:
        """`cached_batches` record batches are kept once read; None keeps all."""
        self._reader = pyarrow.ipc.open_file(pa.memory_map(str(folder.file(name))))
        self._sizes: int = folder.shards[name]["counts"]["blocks"]
        self._batch = lru_cache(maxsize=cached_batches)(self._reader.get_batch)

    def __len__(self) -> int:
        return self._sizes

    def lengths(self, column: str) -> np.ndarray:
        """[blocks] entries of a ragged column."""
        found = [
            np.diff(self._reader.get_batch(n).column(column).offsets.to_numpy())
            for n in range(self._reader.num_record_batches)
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def block(self, row: int) -> dict[str, Any]:
        """The columns of one block; ragged ones as numpy arrays."""
        batch = self._batch(row // BATCH_BLOCKS)
        return {
            field.name: _value(batch.column(n), row % BATCH_BLOCKS)
            for n, field in enumerate(batch.schema)
        }


def _value(column: pa.Array, row: int) -> Any:
    if pa.types.is_list(column.type):
        start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
        return column.values.slice(start, stop - start).to_numpy(zero_copy_only=False)
    return column[row].as_py()


def shard_names(folder: StageFolder, prefix: str = "") -> list[str]:
    """Names of the finished shards, in order."""
    return sorted(
        name for name in folder.shards if name.endswith(".arrow") and name.startswith(prefix)
    )


def folder_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
