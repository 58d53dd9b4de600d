"""Ragged arrays: rows of different lengths, one after another in a flat array.

Three rows `[4, 9]`, `[]`, `[7, 7, 1]` are the values `[4, 9, 7, 7, 1]` and the offsets
`[0, 2, 2, 5]`: row r is `values[offsets[r] : offsets[r + 1]]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """[R+1] int64 offsets of rows with these lengths.

    >>> offsets_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def take_rows(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of the given rows are.

    Returns:
        (entries, row): indices into the flat array, and for each which of `rows` (by place) it
        belongs to.

    >>> entries, row = take_rows(np.array([0, 2, 2, 5]), np.array([2, 0]))
    >>> entries.tolist(), row.tolist()
    ([2, 3, 4, 0, 1], [0, 0, 0, 1, 1])
    """
    return take_stretches(offsets[rows], offsets[rows + 1])


def take_stretches(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of these stretches of a flat array are; as `take_rows`.

    >>> entries, stretch = take_stretches(np.array([5, 1]), np.array([7, 2]))
    >>> entries.tolist(), stretch.tolist()
    ([5, 6, 1], [0, 0, 1])
    """
    lengths = stops - starts
    stretch = np.repeat(np.arange(len(starts)), lengths)
    first = np.repeat(starts - offsets_of(lengths)[:-1], lengths)
    return first + np.arange(len(stretch)), stretch


def places_by_group(group: np.ndarray) -> np.ndarray:
    """[R] int64: where each row stands once rows are put together group by group, in their order.

    Taking these places undoes it: `concat(rows of group 0, of group 1, …)[places]` is the rows as
    they were.

    >>> places_by_group(np.array([1, 0, 1])).tolist()
    [1, 0, 2]
    """
    places = np.empty(len(group), dtype=np.int64)
    places[np.argsort(group, kind="stable")] = np.arange(len(group))
    return places


class Ragged(NamedTuple):
    """Rows of different lengths.

    Attributes:
        offsets: [rows+1] int64.
        values: [entries], one row after another.

    >>> rows = Ragged.of([np.array([4, 9]), np.array([7])])
    >>> Ragged.concat([rows, rows]).take(np.array([1, 2])).values.tolist()
    [7, 4, 9]
    """

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        """Rows as they are given; int64 where there is none."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        nothing = np.zeros(0, dtype=np.int64)
        return cls(offsets_of(lengths), np.concatenate(rows) if len(rows) else nothing)

    @classmethod
    def concat(cls, several: Sequence["Ragged"]) -> "Ragged":
        """The rows of several, one after another."""
        lengths = np.concatenate([one.lengths for one in several])
        return cls(offsets_of(lengths), np.concatenate([one.values for one in several]))

    @property
    def lengths(self) -> np.ndarray:
        """[rows] entries of each."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Ragged":
        """These rows, in their order."""
        entries, _ = take_rows(self.offsets, rows)
        return Ragged(offsets_of(self.lengths[rows]), self.values[entries])
