"""Numbers that are known already, and where each was put: a hash table for compiled loops."""

import numpy as np

from fusellm.compiled import compiled

_EMPTY = -1
_LEAST = 1024
_SPREAD = 0x9E3779B97F4A7C15 - 2**64  # odd, 2^64 over the golden ratio: neighbours land far apart


@compiled()
def place_of(slots: np.ndarray, numbers: np.ndarray, number: int) -> int:
    """The place of a number, -1 where it is not known.

    Args:
        slots, numbers: those of `KnownNumbers`.
    """
    # A slot holds a place in `numbers`. A number that finds its slot taken goes to the next one.
    mask = len(slots) - 1
    at = ((number * _SPREAD) >> 20) & mask
    while slots[at] != _EMPTY:
        if numbers[slots[at]] == number:
            return int(slots[at])
        at = (at + 1) & mask
    return _EMPTY


@compiled()
def _put(slots: np.ndarray, numbers: np.ndarray, first: int, stop: int) -> None:
    mask = len(slots) - 1
    for place in range(first, stop):
        at = ((numbers[place] * _SPREAD) >> 20) & mask
        while slots[at] != _EMPTY:
            at = (at + 1) & mask
        slots[at] = place


def with_room(array: np.ndarray, count: int) -> np.ndarray:
    """An array of at least so many rows that begins with these: twice as many where it grows."""
    if count <= len(array):
        return array
    larger = np.zeros((max(2 * len(array), count), *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    return larger


class KnownNumbers:
    """Different numbers in the order in which they came.

    Attributes:
        numbers: int64, not negative; room for more behind the first `len`.
        slots: a power of two of them, at least half empty: the place of a number, or -1.

    >>> known = KnownNumbers()
    >>> known.add(np.array([70, 4]))
    >>> place_of(known.slots, known.numbers, 4), place_of(known.slots, known.numbers, 5)
    (1, -1)
    """

    def __init__(self) -> None:
        self.numbers = np.zeros(_LEAST, dtype=np.int64)
        self.slots = np.full(_LEAST, _EMPTY, dtype=np.int64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, numbers: np.ndarray) -> None:
        """Put numbers behind the others, none of which is known, each once."""
        first, self._count = self._count, self._count + len(numbers)
        self.numbers = with_room(self.numbers, self._count)
        self.numbers[first : self._count] = numbers
        if 2 * self._count > len(self.slots):
            size = 1 << (2 * self._count).bit_length()
            self.slots, first = np.full(size, _EMPTY, dtype=np.int64), 0
        _put(self.slots, self.numbers, first, self._count)
