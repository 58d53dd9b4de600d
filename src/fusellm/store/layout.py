"""What the columns of a shard must hold: a description beside each schema.

A store may come from somebody else, and its checksums say only that it is what he wrote. Its
numbers become indices of compiled loops and masses of distributions. So each record batch is
checked against its layout, by whole arrays, before anything of it is given out
(`fusellm.store.tables.Shard`). Compiled loops, which check no index, rely on it.

A batch is a record batch decoded: scalars as arrays [rows], lists as `Ragged`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fusellm.arrays.ragged import offsets_of

Batch = Mapping[str, Any]


class Wrong(NamedTuple):
    """A value that cannot be: its row in the record batch, its column, and what is wrong."""

    row: int
    column: str
    what: str


Rule = Callable[[Batch], Wrong | None]
"""Something that holds of every record batch; gives the first value of which it does not."""

Count = Callable[[Batch], np.ndarray]
"""[rows] how many entries each row has to have."""


@dataclass(frozen=True)
class Layout:
    """What a shard's columns are, and what their values must be.

    Attributes:
        schemas: columns and their types; a shard has one of these.
        rules: a rule may rely on those before it.
    """

    schemas: tuple[pa.Schema, ...]
    rules: tuple[Rule, ...] = ()

    def wrong(self, batch: Batch) -> Wrong | None:
        """The first value of a record batch that breaks a rule; None where all hold."""
        return next((wrong for rule in self.rules if (wrong := rule(batch)) is not None), None)


def id_type(count: int) -> pa.DataType:
    """The narrowest type for ids below `count`."""
    return pa.uint16() if count <= 1 << 16 else pa.uint32()


def list_field(name: str, kind: pa.DataType) -> pa.Field:
    """A ragged column without nulls."""
    return pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)


def within(column: str, least: float, most: float) -> Rule:
    """Every value is a number from `least` to `most`; NaN is not.

    >>> from fusellm.arrays.ragged import Ragged
    >>> batch = {"ids": Ragged(np.array([0, 2, 3]), np.array([4, 9, 7]))}
    >>> within("ids", 0, 9)(batch), within("ids", 0, 8)(batch)
    (None, Wrong(row=0, column='ids', what='9 is not from 0 to 8'))
    """

    def rule(batch: Batch) -> Wrong | None:
        values = batch[column].values
        if len(values) == 0 or (values.min() >= least and values.max() <= most):
            return None
        at = int(np.argmin((values >= least) & (values <= most)))
        return wrong_at(batch, column, at, f"{values[at]} is not from {least:g} to {most:.10g}")

    return rule


def as_many(column: str, count: Count) -> Rule:
    """Every row has as many entries as `count` says.

    >>> from fusellm.arrays.ragged import Ragged
    >>> batch = {"kept": Ragged(np.array([0, 2]), np.array([1, 2])),
    ...          "kept_ids": Ragged(np.array([0, 4]), np.array([5, 6, 7, 8]))}
    >>> as_many("kept_ids", total("kept"))(batch)
    Wrong(row=0, column='kept_ids', what='there are 4 entries, and 3 belong there')
    """

    def rule(batch: Batch) -> Wrong | None:
        lengths, wanted = np.diff(batch[column].offsets), count(batch)
        if np.array_equal(lengths, wanted):
            return None
        row = int(np.argmax(lengths != wanted))
        what = f"there are {lengths[row]:,} entries, and {wanted[row]:,} belong there"
        return Wrong(row, column, what)

    return rule


def entries(column: str) -> Count:
    """As many as another column has."""
    return lambda batch: np.diff(batch[column].offsets)


def all_but_one(column: str) -> Count:
    """As many as another column has but for the last; none where it has none."""
    return lambda batch: np.maximum(np.diff(batch[column].offsets) - 1, 0)


def only_where(flag: str, count: Count) -> Count:
    """None where a column of booleans is false."""
    return lambda batch: np.where(batch[flag], count(batch), 0)


def total(column: str) -> Count:
    """As many as the entries of another column add up to."""
    return lambda batch: sums_of(batch[column].values, np.diff(batch[column].offsets))


def ascending(column: str, lengths: str) -> Rule:
    """Entries ascend strictly within each of the runs whose lengths another column has."""

    def rule(batch: Batch) -> Wrong | None:
        values = batch[column].values
        ends = np.cumsum(batch[lengths].values, dtype=np.int64)
        ascends = values[1:] > values[:-1]
        ascends[ends[(ends > 0) & (ends < len(values))] - 1] = True  # from one run to the next
        if ascends.all():
            return None
        at = int(np.argmin(ascends)) + 1
        what = f"{values[at]} follows {values[at - 1]}, and entries of a position ascend"
        return wrong_at(batch, column, at, what)

    return rule


def sums_of(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] sums of runs of values, of these lengths [N]: int64, or float64 of floats.

    >>> sums_of(np.array([1, 2, 3], dtype=np.uint8), np.array([2, 0, 1])).tolist()
    [3, 0, 3]
    """
    kind = np.float64 if values.dtype.kind == "f" else np.int64
    sums = np.zeros(len(lengths), dtype=kind)
    there = lengths > 0
    sums[there] = np.add.reduceat(values, offsets_of(lengths)[:-1][there], dtype=kind)
    return sums


def wrong_at(batch: Batch, column: str, entry: int, what: str) -> Wrong:
    """What is wrong with an entry of a ragged column, counted over all rows."""
    row = int(np.searchsorted(batch[column].offsets, entry, side="right")) - 1
    return Wrong(row, column, what)
