"""Shards as Arrow files: one row a block, ragged lists, zstd, record batches of at most 64 blocks.

Arrow IPC is read by other tools (pyarrow, polars, duckdb) and lets a record batch be read alone.
Each record batch is verified when it is first read, what frames them when the shard is opened:
the bytes by their checksums, the values by the shard's layout. docs/store-format.md says why Arrow
and not Parquet.
"""

import io
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from fusellm.arrays.ragged import Ragged
from fusellm.errors import StoreError
from fusellm.store.layout import Batch, Layout, Wrong
from fusellm.store.manifest import SHARD_SUFFIX, Segment, StageFolder, segments_of
from fusellm.store.writer import StageWriter

BATCH_BLOCKS = 64
_MAGIC_BYTES = 8  # with its padding
_MOST_ENTRIES = 2**31 - 1
_ZSTD_LEVEL = 6  # docs/store-format.md has what the others cost


Columns = Mapping[str, Sequence[Any] | np.ndarray | Ragged]


class EncodedShard(NamedTuple):
    """A shard's file before it is written, with the checksums of its record batches and frame.

    `numbers` are its first block's and one more than its last one's; None where it has no blocks.
    """

    data: bytes
    segments: list[Segment]
    blocks: int
    numbers: tuple[int, int] | None = None


def write_table(
    writer: StageWriter,
    name: str,
    columns: Columns,
    schema: pa.Schema,
    counts: Mapping[str, Any] | None = None,
) -> None:
    """Write a shard. `columns` has one entry a block; lists are arrays, or all of it a `Ragged`."""
    write_encoded(writer, name, encode_table(columns, schema), counts)


def encode_table(columns: Columns, schema: pa.Schema) -> EncodedShard:
    """A shard's file, in memory."""
    arrays = [_column(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    file = io.BytesIO()
    # pyarrow writes magic and schema together with what comes first after them.
    cuts = [_MAGIC_BYTES + schema.serialize().size]
    with pyarrow.ipc.new_file(
        file, schema, options=pyarrow.ipc.IpcWriteOptions(compression=_codec())
    ) as out:
        for batch in table.to_batches(max_chunksize=BATCH_BLOCKS):
            out.write_batch(batch)
            cuts.append(file.tell())
    data = file.getvalue()
    return EncodedShard(data, segments_of(data, cuts), table.num_rows, _numbers(table))


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=_ZSTD_LEVEL)


def _numbers(table: pa.Table) -> tuple[int, int] | None:
    if "block" not in table.schema.names or table.num_rows == 0:
        return None
    numbers = table.column("block")
    return numbers[0].as_py(), numbers[-1].as_py() + 1


def write_encoded(
    writer: StageWriter, name: str, shard: EncodedShard, counts: Mapping[str, Any] | None = None
) -> None:
    """Write a shard that has been encoded."""
    own: dict[str, Any] = {"blocks": shard.blocks}
    if shard.numbers is not None:
        own["numbers"] = list(shard.numbers)
    writer.write(name, shard.data, own | dict(counts or {}), shard.segments)


def _column(values: Sequence[Any] | np.ndarray | Ragged, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind)
    dtype = kind.value_type.to_pandas_dtype()
    if not isinstance(values, Ragged):
        lengths = np.array([len(value) for value in values], dtype=np.int64)
        flat = [np.zeros(0, dtype=dtype), *(np.asarray(value, dtype=dtype) for value in values)]
        values = Ragged(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(flat))
    if values.offsets[-1] > _MOST_ENTRIES:
        raise StoreError(
            f"a shard would have {values.offsets[-1]:,} entries in one column, and Arrow's lists "
            f"hold {_MOST_ENTRIES:,}; lower corpus.shard_blocks"
        )
    offsets, flat_values = values.offsets.astype(np.int32), values.values.astype(dtype, copy=False)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat_values, type=kind.value_type), type=kind
    )


class Shard:
    """A finished shard; record batches are read as they are asked for."""

    def __init__(
        self, folder: StageFolder, name: str, layout: Layout, cached_batches: int | None = 4
    ) -> None:
        """Open a shard and verify all but its record batches.

        Args:
            layout: what its columns and their values must be.
            cached_batches: record batches that are kept once read; None keeps all.

        Raises:
            StoreError: it is missing, truncated or damaged, or has other columns.
        """
        self._folder, self._name, self._layout = folder, name, layout
        path, segments = folder.sized_file(name), folder.segments(name)
        counts = folder.shards[name]["counts"]
        self._blocks: int = counts["blocks"]
        if len(segments) - 2 != -(-self._blocks // BATCH_BLOCKS) or path.stat().st_size == 0:
            raise folder.damaged(name, "its record batches are not those of the manifest")
        self.numbers: tuple[int, int] = tuple(counts.get("numbers", (0, self._blocks)))
        if self.numbers[1] - self.numbers[0] != self._blocks:
            raise folder.damaged(name, "its blocks are not those of the manifest")
        self._map = _mapped(path)
        starts = np.cumsum([0, *(segment.length for segment in segments)]).tolist()
        self._segments = list(zip(starts, segments, strict=False))
        self._verified = [False] * len(segments)
        self._checked = [False] * (len(segments) - 2)
        self._verify(0)
        self._verify(len(segments) - 1)
        self._reader = self._open()
        # Not lru_cache over a method: the cycle would keep a map and batches until some collection.
        self._cache: dict[int, pa.RecordBatch] = {}
        self._cached_batches = cached_batches

    def _open(self, columns: Sequence[int] | None = None) -> pyarrow.ipc.RecordBatchFileReader:
        """A reader of some columns, by their places, or of all."""
        options = pyarrow.ipc.IpcReadOptions(included_fields=columns)
        with self._arrow_explained("what frames its record batches"):
            buffer = pa.BufferReader(pa.py_buffer(self._map))
            reader = pyarrow.ipc.open_file(buffer, options=options)
            if columns is None and not any(map(reader.schema.equals, self._layout.schemas)):
                raise self.damaged("its columns are not those of its stage")
            if reader.num_record_batches != self.record_batches:
                how = "its record batches are not those of the manifest"
                raise self.damaged(how)
        return reader

    @contextmanager
    def _arrow_explained(self, part: str) -> Iterator[None]:
        """Say which part Arrow cannot read.

        Raises:
            StoreError: instead of Arrow's errors.
        """
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            how = f"{part} is no Arrow: {' '.join(str(error).split())}"
            raise self.damaged(how) from error

    def __len__(self) -> int:
        return self._blocks

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self._reader.schema

    @property
    def record_batches(self) -> int:
        """How many there are."""
        return len(self._segments) - 2

    def check(self) -> None:
        """Verify and check all of it.

        Raises:
            StoreError: a record batch is damaged, or holds what it cannot.
        """
        for n in range(self.record_batches):
            self._read(n)

    def damaged(self, how: str) -> StoreError:
        """The error that says what is wrong with the shard."""
        return self._folder.damaged(self._name, how)

    def refused(self, n: int, wrong: Wrong) -> StoreError:
        """The error that says what is wrong with a record batch."""
        number = self.numbers[0] + n * BATCH_BLOCKS + wrong.row
        how = f"block {number}, column {wrong.column!r}: {wrong.what}"
        return self.damaged(how)

    def _verify(self, segment: int) -> None:
        if self._verified[segment]:
            return
        start, (length, crc32) = self._segments[segment]
        if zlib.crc32(memoryview(self._map)[start : start + length]) != crc32:
            framing = segment in (0, len(self._segments) - 1)
            part = "its frame" if framing else f"record batch {segment - 1}"
            raise self.damaged(f"the checksum of {part} differs")
        self._verified[segment] = True

    def _read(self, n: int) -> pa.RecordBatch:
        self._verify(n + 1)
        with self._arrow_explained(f"record batch {n}"):
            batch = self._reader.get_batch(n)
        if not self._checked[n]:
            self._check(n, batch)
            self._checked[n] = True
        return batch

    def _check(self, n: int, batch: pa.RecordBatch) -> None:
        """Check what Arrow does not by itself: its own offsets, rows, nulls, and all values.

        Raises:
            StoreError: something cannot be.
        """
        with self._arrow_explained(f"record batch {n}"):
            batch.validate(full=True)
        rows = min(BATCH_BLOCKS, self._blocks - n * BATCH_BLOCKS)
        if batch.num_rows != rows:
            how = f"record batch {n} has {batch.num_rows} blocks, and {rows} belong there"
            raise self.damaged(how)
        for field, column in zip(batch.schema, batch.columns, strict=True):
            values = column.values if pa.types.is_list(field.type) else column
            if column.null_count or values.null_count:
                raise self.refused(n, Wrong(0, field.name, "there are nulls"))
        columns = _decoded(batch)
        wrong = self._wrong_number(n, columns) or self._layout.wrong(columns)
        if wrong is not None:
            raise self.refused(n, wrong)

    def _wrong_number(self, n: int, columns: Batch) -> Wrong | None:
        """The first block whose number is not that of its row."""
        if "block" not in columns:
            return None
        first = self.numbers[0] + n * BATCH_BLOCKS
        differs = columns["block"] != np.arange(first, first + len(columns["block"]))
        row = int(np.argmax(differs))
        number = columns["block"][row]
        return Wrong(row, "block", f"its number is {number}") if differs[row] else None

    def column_bytes(self, n: int) -> dict[str, int]:
        """What each column of a record batch takes on disk."""
        batch, codec = self._read(n), _codec()
        return {
            field.name: sum(len(codec.compress(b)) for b in batch.column(k).buffers() if b)
            for k, field in enumerate(batch.schema)
        }

    def _batch(self, n: int) -> pa.RecordBatch:
        """A record batch, kept for the next time; of those kept the one not used longest goes."""
        batch = self._cache.pop(n, None)
        if batch is None:
            batch = self._read(n)
            if self._cached_batches is not None and len(self._cache) >= self._cached_batches:
                self._cache.pop(next(iter(self._cache)), None)
        self._cache[n] = batch
        return batch

    def forget(self, n: int) -> None:
        """Keep a record batch no longer."""
        self._cache.pop(n, None)

    def lengths(self, column: str) -> np.ndarray:
        """[blocks] entries of a ragged column; no other column is decompressed."""
        reader = self._open([self._reader.schema.get_field_index(column)])
        lengths = [np.zeros(0, dtype=np.int64)]
        for n in range(self.record_batches):
            self._verify(n + 1)
            with self._arrow_explained(f"record batch {n}"):
                batch = reader.get_batch(n)
                batch.validate(full=True)
            lengths.append(np.diff(batch.column(0).offsets.to_numpy()))
        return np.concatenate(lengths)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The columns of each record batch: scalars as arrays, lists as `Ragged`."""
        for n in range(self.record_batches):
            yield self.columns(n)

    def columns(self, n: int) -> dict[str, Any]:
        """The columns of a record batch: scalars as arrays, lists as `Ragged`."""
        return _decoded(self._read(n))

    @staticmethod
    def place(row: int) -> tuple[int, int]:
        """(record batch, row in it) of a row."""
        return divmod(row, BATCH_BLOCKS)

    def block(self, row: int) -> dict[str, Any]:
        """The columns of one block; ragged ones as numpy arrays."""
        n, within = self.place(row)
        batch = self._batch(n)
        return {field.name: _value(batch.column(k), within) for k, field in enumerate(batch.schema)}


def _decoded(batch: pa.RecordBatch) -> dict[str, Any]:
    return {field.name: _flat(batch.column(k)) for k, field in enumerate(batch.schema)}


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
        name for name in folder.shards if name.endswith(SHARD_SUFFIX) and name.startswith(prefix)
    )


def folder_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    size = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # a checkpoint may be removed while it is looked at
            size += file.stat().st_size if file.is_file() else 0
    return size
