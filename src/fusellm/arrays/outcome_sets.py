"""Outcomes as sets of target ids: each a stretch of one order of all ids.

ids      7  12  13  40  41  5  …      V target ids, each once
set 3        [12  13  40  41]         starts 1, stops 5: a class
set 90           [13  40]             starts 2, stops 4: some of its tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusellm.arrays.ragged import offsets_of, take_stretches
from fusellm.compiled import compiled


@dataclass(frozen=True, eq=False)
class OutcomeSets:
    """The outcomes that a source's distributions are over.

    Any two sets are apart, or one is a part of the other.

    Attributes:
        starts, stops: [S] int64, set s is `ids[starts[s]:stops[s]]`.
        ids: [V] int64, every target id once.

    >>> sets = OutcomeSets(np.array([0, 1]), np.array([1, 3]), np.array([7, 12, 13]))
    >>> len(sets), sets[1].tolist()
    (2, [12, 13])
    >>> ids, which = sets.take(np.array([1, 0]))
    >>> ids.tolist(), which.tolist()
    ([12, 13, 7], [0, 0, 1])
    """

    starts: np.ndarray
    stops: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, outcome: np.ndarray, count: int) -> "OutcomeSets":
        """The ids of each of `count` outcomes.

        Args:
            outcome: [V] of each id, from 0 to below `count`.

        >>> sets = OutcomeSets.of(np.array([1, 0, 1]), 3)
        >>> [sets[n].tolist() for n in range(3)]
        [[1], [0, 2], []]
        """
        ids = np.argsort(outcome, kind="stable").astype(np.int64)
        offsets = offsets_of(np.bincount(outcome, minlength=count))
        return cls(offsets[:-1], offsets[1:], ids)

    @classmethod
    def concat(cls, several: Sequence["OutcomeSets"]) -> "OutcomeSets":
        """The sets of several, one after another. Each keeps an order of ids of its own."""
        base = np.cumsum([0, *(len(one.ids) for one in several)])[:-1]
        starts = [one.starts + n for one, n in zip(several, base, strict=True)]
        stops = [one.stops + n for one, n in zip(several, base, strict=True)]
        ids = np.concatenate([one.ids for one in several])
        return cls(np.concatenate(starts), np.concatenate(stops), ids)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.ids[self.starts[number] : self.stops[number]]

    def contain(self, numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """[M] bool, whether each of M sets has the id beside it."""
        rank = np.argsort(self.ids)[ids]
        return np.asarray((self.starts[numbers] <= rank) & (rank < self.stops[numbers]))

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, which): the ids of these sets, and for each id which of `numbers`, by place."""
        entries, which = take_stretches(self.starts[numbers], self.stops[numbers])
        return self.ids[entries], which

    def overlapping(self, numbers: np.ndarray, lengths: np.ndarray) -> int:
        """The first of some sets that has ids in common with another one of its group; -1 for none.

        Args:
            numbers: [M] sets, group after group.
            lengths: [R] sets of each group.
        """
        return int(_overlapping(self.starts[numbers], self.stops[numbers], offsets_of(lengths)))


@compiled()
def _overlapping(starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray) -> int:
    for g in range(len(offsets) - 1):
        order = np.argsort(starts[offsets[g] : offsets[g + 1]]) + offsets[g]
        reached = -1
        for at in order:
            if stops[at] > starts[at]:
                if starts[at] < reached:
                    return int(at)
                reached = stops[at]
    return -1
