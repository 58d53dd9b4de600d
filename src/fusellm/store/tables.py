"""Shards as Arrow files: one row a block, ragged lists, zstd, record batches of at most 64 blocks.

Arrow IPC is read by other tools (pyarrow, polars, duckdb) and lets a record batch be read alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from fusellm.store.manifest import StageFolder, StageWriter

BATCH_BLOCKS = 64


class Ragged(NamedTuple):
    """A ragged column: entries of all rows one after another, and where each row's are [R+1]."""

    offsets: np.ndarray
    values: np.ndarray


def write_table(
    writer: StageWriter,
    name: str,
    columns: Mapping[str, Sequence[Any] | np.ndarray | Ragged],
    schema: pa.Schema,
    counts: Mapping[str, Any] | None = None,
) -> None:
    """Write a shard. `columns` has one entry a block; lists are arrays, or all of it a `Ragged`."""
    arrays = [_column(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)

    def write(file: BinaryIO) -> None:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(file, schema, options=options) as out:
            out.write_table(table, max_chunksize=BATCH_BLOCKS)

    writer.write(name, write, {"blocks": table.num_rows} | dict(counts or {}))


def _column(values: Sequence[Any] | np.ndarray | Ragged, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    dtype = kind.value_type.to_pandas_dtype()
    if not isinstance(values, Ragged):
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        flat = [np.zeros(0, dtype=dtype), *(np.asarray(value, dtype=dtype) for value in values)]
        values = Ragged(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(flat))
    offsets, flat_values = values.offsets.astype(np.int32), values.values.astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat_values, type=kind.value_type))


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

    def batches(self) -> Iterator[dict[str, Any]]:
        """The columns of each record batch: scalars as arrays, lists as `Ragged`."""
        for n in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(n)
            yield {field.name: _flat(batch.column(k)) for k, field in enumerate(batch.schema)}

    def block(self, row: int) -> dict[str, Any]:
        """The columns of one block; ragged ones as numpy arrays."""
        batch = self._batch(row // BATCH_BLOCKS)
        return {
            field.name: _value(batch.column(n), row % BATCH_BLOCKS)
            for n, field in enumerate(batch.schema)
        }


def _flat(column: pa.Array) -> Any:
    if not pa.types.is_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    return Ragged(offsets - offsets[0], values.to_numpy(zero_copy_only=False))


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
