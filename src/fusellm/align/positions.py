"""Which source position has read exactly what a target position has read.

T target positions, S source positions. A position's boundary is the bytes read so far; its
distribution is about the token after it.
"""

from enum import IntEnum

import numba
import numpy as np


class Situation(IntEnum):
    """How the source cuts the target's next piece at an aligned position."""

    UNALIGNED = 0
    SAME = 1
    SEVERAL = 2
    BEYOND = 3
    CROSSED = 4


@numba.njit(cache=True)
def _align(target_ends: np.ndarray, source_ends: np.ndarray, source_of_target: np.ndarray) -> None:
    j = 0
    for i in range(len(target_ends)):
        source_of_target[i] = -1
        if i + 1 < len(target_ends) and target_ends[i + 1] == target_ends[i]:
            continue  # of several positions with one boundary, the last
        while j < len(source_ends) and source_ends[j] < target_ends[i]:
            j += 1
        last = j
        while last + 1 < len(source_ends) and source_ends[last + 1] == target_ends[i]:
            last += 1
        if j < len(source_ends) and source_ends[last] == target_ends[i]:
            source_of_target[i] = last


def align(target_ends: np.ndarray, source_ends: np.ndarray) -> np.ndarray:
    """Align positions of one block by their boundaries.

    Args:
        target_ends, source_ends: non-decreasing byte offsets; BOS has read 0 bytes.

    Returns:
        [T] int64, the source position with the same boundary, or -1. Where several positions
        share a boundary only the last of them is aligned.

    >>> align(np.array([0, 3, 7, 9]), np.array([3, 5, 9])).tolist()
    [-1, 0, -1, 2]
    """
    source_of_target = np.empty(len(target_ends), dtype=np.int64)
    _align(
        np.asarray(target_ends, dtype=np.int64),
        np.asarray(source_ends, dtype=np.int64),
        source_of_target,
    )
    return source_of_target


def situations(
    target_ends: np.ndarray, source_ends: np.ndarray, source_of_target: np.ndarray
) -> np.ndarray:
    """The situation of each target position that predicts (DESIGN: the next piece).

    Args:
        target_ends: [T] boundaries.
        source_ends: [S] boundaries.
        source_of_target: [T-1] what `align` found for all positions but the last ones.

    Returns:
        [T-1] int8 of `Situation`.

    >>> target, source = np.array([0, 2, 6, 8, 9]), np.array([0, 2, 4, 6, 9])
    >>> situations(target, source, align(target[:-1], source[:-1])).tolist()
    [1, 2, 3, 0]
    """
    result = np.full(len(source_of_target), Situation.UNALIGNED, dtype=np.int8)
    aligned = source_of_target >= 0
    target_next = target_ends[1:][aligned]
    source_next = source_ends[source_of_target[aligned] + 1]
    comes_back = np.isin(target_next, source_ends)
    result[aligned] = np.where(
        source_next == target_next,
        Situation.SAME,
        np.where(
            source_next > target_next,
            Situation.BEYOND,
            np.where(comes_back, Situation.SEVERAL, Situation.CROSSED),
        ),
    )
    return result
