"""Distributions as they are kept: sparse, ragged.

N positions that predict, of one block or of many one after another; K entries in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fusellm.arrays.ragged import offsets_of, take_rows


@dataclass(frozen=True)
class Kept:
    """Distributions of N positions.

    Attributes:
        offsets: [N+1] int64, where each position's entries are.
        ids: [K] int64 token ids; in order of id (`sampled`) or of probability (`top`).
        log_probs: [K] float32 nats (`top`); empty for `sampled`.
        counts: [K] uint8 draws (`sampled`); empty for `top`.
        tail: [N] float32, mass of what was not kept (`top`); zero for `sampled`.
        true_log_prob: [N] float32 nats, of the true next token.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    counts: np.ndarray
    tail: np.ndarray
    true_log_prob: np.ndarray

    @classmethod
    def concat(cls, several: Sequence["Kept"]) -> "Kept":
        """The positions of several, one after another; none of none."""
        nothing = np.zeros(0, dtype=np.float32)
        ids, counts = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)
        none = cls(np.zeros(1, dtype=np.int64), ids, nothing, counts, nothing, nothing)
        several = [none, *several]
        lengths = np.concatenate([np.diff(one.offsets) for one in several])
        names = [field.name for field in fields(cls) if field.name != "offsets"]
        columns = (np.concatenate([getattr(one, name) for one in several]) for name in names)
        return cls(offsets_of(lengths), *columns)

    @property
    def sampled(self) -> bool:
        """Whether these are draws."""
        return len(self.counts) > 0

    def masses(self) -> np.ndarray:
        """[K] float64 probability of each entry."""
        if not self.sampled:
            return np.exp(self.log_probs.astype(np.float64))
        draws = np.add.reduceat(self.counts.astype(np.int64), self.offsets[:-1])
        return np.asarray(self.counts / np.repeat(draws, np.diff(self.offsets)))

    def take(self, positions: np.ndarray) -> "Kept":
        """The distributions at these positions, in their order."""
        entries, _ = take_rows(self.offsets, positions)
        return Kept(
            offsets_of(np.diff(self.offsets)[positions]),
            self.ids[entries],
            self.log_probs[entries] if len(self.log_probs) else self.log_probs,
            self.counts[entries] if len(self.counts) else self.counts,
            self.tail[positions],
            self.true_log_prob[positions],
        )

    def distributions(self) -> "Distributions":
        """As fusion works on them."""
        tail = self.tail.astype(np.float64)
        return Distributions(self.offsets, self.ids, self.masses(), tail, self.sampled)


@dataclass(frozen=True)
class Distributions:
    """Probabilities at N positions; with the tail they sum to 1 at each.

    Attributes:
        offsets: [N+1] int64, where each position's entries are.
        ids: [K] int64 token ids, each at most once at a position.
        masses: [K] float64 probabilities.
        tail: [N] float64, mass of what was not kept.
        sampled: whether the masses are shares of draws, and so leave no tail.
    """

    offsets: np.ndarray
    ids: np.ndarray
    masses: np.ndarray
    tail: np.ndarray
    sampled: bool

    def and_then(self, others: "Distributions") -> "Distributions":
        """With the positions of others, kept alike, behind these."""
        lengths = np.concatenate([np.diff(self.offsets), np.diff(others.offsets)])
        ids = np.concatenate([self.ids, others.ids])
        masses = np.concatenate([self.masses, others.masses])
        tail = np.concatenate([self.tail, others.tail])
        return Distributions(offsets_of(lengths), ids, masses, tail, self.sampled)
