"""One block or text as a source has read it, for people and programs to look at.

T tokens of it, P positions that predict: all but the last, or of a conversation those before what
is learnt. K entries kept at one position.
"""

import operator
from dataclasses import dataclass

import numpy as np

from fusellm.arrays.distributions import Kept
from fusellm.errors import StoreError


@dataclass(frozen=True)
class Distribution:
    """The distribution at one position, and what is true of it.

    Attributes:
        position: its number in the block, from 0.
        token: the token last read.
        read_bytes: how much of the block's text has been read.
        true_id: the token that follows.
        true_log_prob: its log-probability, nats.
        ids: [K] tokens; in order of id (`sampled`) or of probability (`top`).
        log_probs: [K] float32 nats; of the share of the draws (`sampled`).
        masses: [K] float64 probabilities.
        counts: [K] uint8 draws (`sampled`); empty for `top`.
        tail: mass of what was not kept (`top`); 0 for `sampled`.
    """

    position: int
    token: int
    read_bytes: int
    true_id: int
    true_log_prob: float
    ids: np.ndarray
    log_probs: np.ndarray
    masses: np.ndarray
    counts: np.ndarray
    tail: float


@dataclass(frozen=True)
class StoredBlock:
    """One block as a source read it. Its arrays are the caller's own.

    Attributes:
        number: within the corpus' part train, or of the text among those that were read.
        usable: whether it was read; if not, it has ids only.
        reason: why it is not usable.
        ids: [T] int64 token ids, prefix and EOS included; in memory [0] where not usable.
        ends: [T] int64, byte of the block's text where each token ends; [0] where not usable.
        kept: the distributions at the positions, each about the token that follows.
        places: of a conversation [P] the number of the token last read at each; None where it is
            the position's own.
    """

    number: int
    usable: bool
    reason: str | None
    ids: np.ndarray
    ends: np.ndarray
    kept: Kept
    places: np.ndarray | None = None

    def __repr__(self) -> str:
        reads = f"{self.positions:,} distributions" if self.usable else f"not read: {self.reason}"
        return f"{type(self).__name__}({self.number}, {len(self.ids):,} tokens, {reads})"

    @property
    def positions(self) -> int:
        """How many distributions there are: P, or none."""
        return len(self.kept.tail)

    def at(self, position: int) -> Distribution:
        """The distribution at the position of this number, from 0.

        Of plain text that is after the token of this number.

        Raises:
            StoreError: the block has no such position.

        >>> kept = Kept(np.array([0, 2]), np.array([5, 3]), np.log(np.float32([0.5, 0.25])),
        ...             np.zeros(0, np.uint8), np.float32([0.25]), np.log(np.float32([0.25])))
        >>> block = StoredBlock(0, True, None, np.array([1, 3]), np.array([0, 4]), kept)
        >>> block
        StoredBlock(0, 2 tokens, 1 distributions)
        >>> first = block.at(0)
        >>> first.ids.tolist(), first.masses.round(6).tolist(), first.tail, first.true_id
        ([5, 3], [0.5, 0.25], 0.25, 3)
        """
        position = operator.index(position)
        if not 0 <= position < self.positions:
            numbers = f", from 0 to {self.positions - 1}" if self.positions else ""
            why = f" ({self.reason})" if self.reason else ""
            raise StoreError(
                f"there is no position {position}: block {self.number} has {self.positions:,}"
                f"{numbers}{why}"
            )
        kept = self.kept
        entries = slice(kept.offsets[position], kept.offsets[position + 1])
        counts = kept.counts[entries]
        if len(counts):
            masses = counts / counts.sum(dtype=np.int64)
            log_probs = np.log(masses).astype(np.float32)
        else:
            log_probs = kept.log_probs[entries]
            masses = np.exp(log_probs.astype(np.float64))
        place = position if self.places is None else int(self.places[position])
        return Distribution(
            position,
            int(self.ids[place]),
            int(self.ends[place]),
            int(self.ids[place + 1]),
            float(kept.true_log_prob[position]),
            kept.ids[entries],
            log_probs,
            masses,
            counts,
            float(kept.tail[position]),
        )
