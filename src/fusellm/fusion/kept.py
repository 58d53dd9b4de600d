"""Distributions of a block as they are kept: sparse, ragged.

N positions that predict.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kept:
    """Distributions of the N positions of a block.

    Attributes:
        offsets: [N+1] int64, where each position's entries are.
        ids: int64 token ids; in order of id (`sampled`) or of probability (`top`).
        log_probs: float32 nats (`top`); empty for `sampled`.
        counts: uint8 draws (`sampled`); empty for `top`.
        tail: [N] float32, mass of what was not kept (`top`); zero for `sampled`.
        true_log_prob: [N] float32 nats, of the true next token.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    counts: np.ndarray
    tail: np.ndarray
    true_log_prob: np.ndarray

    def masses(self) -> np.ndarray:
        """float64 probability of each entry."""
        if len(self.counts) == 0:
            return np.exp(self.log_probs.astype(np.float64))
        lengths = np.diff(self.offsets)
        draws = np.add.reduceat(self.counts.astype(np.int64), self.offsets[:-1])
        return np.asarray(self.counts / np.repeat(draws, lengths))
