"""Ragged arrays: rows of different lengths, one after another in a flat array."""

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
    lengths = offsets[rows + 1] - offsets[rows]
    row = np.repeat(np.arange(len(rows)), lengths)
    first = np.repeat(offsets[rows] - offsets_of(lengths)[:-1], lengths)
    return first + np.arange(len(row)), row
