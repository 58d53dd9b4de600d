"""Fused distributions: of each position parts, of each part outcomes.

    position   7                              one of N: after a token of the target
      part       source 0, rest 0.02          one of R: what source 0 says, weighted
        outcome    number 512, mass 0.41      one of M: an event that both vocabularies tell apart
        outcome    number 77, mass 0.17
      part       source 1, rest 0.04
        outcome    number 12, mass 0.36

Each level stands flat: `parts` says how many parts a position has, `lengths` how many outcomes a
part has. This one is `parts [2]`, `source [0, 1]`, `rest [0.02, 0.04]`, `lengths [2, 1]`,
`outcomes [512, 77, 12]`, `masses [0.41, 0.17, 0.36]`. What an outcome is, a set of the target's
ids, says the vocabulary map of its part's source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from fusellm.arrays.ragged import offsets_of, take_rows


@dataclass(frozen=True)
class Fused:
    """Fused distributions.

    Attributes:
        parts: [N] uint8, sources that have a share in the distribution; 0 where there is none.
        source: [R] int8, whose part it is, and so whose outcomes these are.
        lengths: [R] outcomes of each part.
        outcomes: [M] int64, numbers of that source's vocabulary map.
        masses: [M] float32, weighted: with the rests they sum to 1 at each position.
        rest: [R] float32, weighted mass in none of a part's outcomes.

    >>> columns = [2], [0, 1], [2, 1], [512, 77, 12], [0.41, 0.17, 0.36], [0.02, 0.04]
    >>> both = Fused(*map(np.array, columns))
    >>> twice = Fused.concat([both, both])
    >>> twice.take(np.array([1])).outcomes.tolist(), twice.part_offsets.tolist()
    ([512, 77, 12], [0, 2, 4])
    >>> twice.position_of_part.tolist(), both.part_of_outcome.tolist()
    ([0, 0, 1, 1], [0, 0, 1])
    """

    parts: np.ndarray
    source: np.ndarray
    lengths: np.ndarray
    outcomes: np.ndarray
    masses: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Fused":
        """Those of a block's row in the fused store."""
        return cls(*(columns[field.name] for field in fields(cls)))

    @classmethod
    def concat(cls, several: Sequence["Fused"]) -> "Fused":
        """The positions of several, one after another."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(one, name) for one in several]) for name in names))

    def columns(self) -> dict[str, np.ndarray]:
        """By name, as the fused store has them of a block."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def part_offsets(self) -> np.ndarray:
        """[N+1] where each position's parts are."""
        return offsets_of(self.parts)

    @cached_property
    def outcome_offsets(self) -> np.ndarray:
        """[R+1] where each part's outcomes are."""
        return offsets_of(self.lengths)

    @cached_property
    def position_of_part(self) -> np.ndarray:
        """[R] int64, ascending."""
        return np.repeat(np.arange(len(self.parts)), self.parts)

    @cached_property
    def part_of_outcome(self) -> np.ndarray:
        """[M] int64, ascending."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def part_weights(self) -> np.ndarray:
        """[R] float64, the share that each part has of its position's distribution.

        >>> two = Fused(*map(np.array, ([2], [0, 1], [1, 1], [5, 6], [0.25, 0.5], [0.125, 0.125])))
        >>> two.part_weights.tolist()
        [0.375, 0.625]
        """
        parts = len(self.lengths)
        return np.bincount(self.part_of_outcome, self.masses, parts) + self.rest.astype(np.float64)

    def take(self, positions: np.ndarray) -> "Fused":
        """The distributions at these positions, in their order."""
        part, _ = take_rows(self.part_offsets, positions)
        return self._of(positions, part, take_rows(self.outcome_offsets, part)[0])

    def between(self, start: int, stop: int) -> "Fused":
        """Those at the positions from `start` to before `stop`, without a copy."""
        part = slice(*self.part_offsets[[start, stop]].tolist())
        outcome = slice(*self.outcome_offsets[[part.start, part.stop]].tolist())
        return self._of(slice(start, stop), part, outcome)

    def _of(self, position: Any, part: Any, outcome: Any) -> "Fused":
        return Fused(
            self.parts[position],
            self.source[part],
            self.lengths[part],
            self.outcomes[outcome],
            self.masses[outcome],
            self.rest[part],
        )
