"""Fusion functions: whose distribution stands at each target position.

S sources, in the recipe's order; N target positions that predict; L bytes of the block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusellm.fusion.cross_entropy import sums_over

NO_SOURCE = -1


@dataclass(frozen=True)
class Compared:
    """What a fusion function may look at, for one block.

    Attributes:
        aligned: [S, N] bool, whether a source is aligned at a position.
        nats_by_byte: [S, L] float64 cross-entropy against the text, NaN where not scored.
        ends: [N + 1] the target's boundaries, in bytes.
        window_bytes: reach to each side of a position's window; None compares whole blocks.
    """

    aligned: np.ndarray
    nats_by_byte: np.ndarray
    ends: np.ndarray
    window_bytes: int | None


def mince(compared: Compared) -> np.ndarray:
    """MinCE: the source with the least cross-entropy against the text (FuseLLM, section 3.2).

    Sources are compared over the bytes that all of them scored, of the block (the paper) or of a
    window around the position which has the next token in it. Ties go to the source named first.

    Returns:
        [N] int8 place of the winning source among those aligned there; NO_SOURCE where none is.
    """
    sources, length_bytes = compared.nats_by_byte.shape
    positions = compared.aligned.shape[1]
    by_all = np.isfinite(compared.nats_by_byte).all(axis=0)
    if compared.window_bytes is None:
        starts = np.zeros(positions, dtype=np.int64)
        stops = np.full(positions, length_bytes)
    else:
        here = compared.ends[:-1]
        starts = np.maximum(here - compared.window_bytes, 0)
        stops = np.maximum(
            np.minimum(here + compared.window_bytes, length_bytes), compared.ends[1:]
        )
    nats = np.full((sources, positions), np.inf)
    for s in range(sources):
        by_byte = np.where(by_all, compared.nats_by_byte[s], 0.0)
        sums = sums_over(by_byte, starts, stops)
        nats[s] = np.where(compared.aligned[s], sums, np.inf)
    winner: np.ndarray = nats.argmin(axis=0).astype(np.int8)
    winner[~compared.aligned.any(axis=0)] = NO_SOURCE
    return winner


FUNCTIONS: dict[str, Callable[[Compared], np.ndarray]] = {
    "mince": mince,  # FuseLLM, ICLR 2024, section 3.2
}
