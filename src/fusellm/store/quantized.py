"""Log-probabilities as small integers: steps of 1/64 nat, and only the drops within a position.

The most probable of 10 kept tokens costs a byte or so, each further one 4 to 6 bits after
compression. N positions, K entries in all.
"""

import numpy as np

STEP_NATS = 1 / 64
ERROR_NATS = 1 / 64
"""Bound of |read − written|: half a step of rounding, and as much again because masses read are
scaled to sum to 1."""
_MOST_STEPS = 65_535  # −1,024 nats; what is less probable is kept as this, and is 0 in float64
_PROBABILITIES = np.exp(-STEP_NATS * np.arange(_MOST_STEPS + 1))


def to_steps(log_probs: np.ndarray) -> np.ndarray:
    """uint16 steps below 0 of log-probabilities; −inf becomes the most.

    >>> to_steps(np.array([0.0, -0.5, -np.inf])).tolist()
    [0, 32, 65535]
    """
    steps = np.rint(np.minimum(-log_probs.astype(np.float64) / STEP_NATS, _MOST_STEPS))
    return np.maximum(steps, 0.0).astype(np.uint16)


def from_steps(steps: np.ndarray) -> np.ndarray:
    """float32 log-probabilities.

    >>> from_steps(np.array([0, 32], dtype=np.uint16)).tolist()
    [0.0, -0.5]
    """
    return (0.0 - STEP_NATS * steps).astype(np.float32)  # and not -0.0


def to_drops(log_probs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[K] uint16: at each position the first entry's steps below 0, then each below the last.

    Args:
        log_probs: [K], falling within a position.
        offsets: [N+1] where each position's entries are.

    >>> to_drops(np.array([-0.5, -1.0, -0.25]), np.array([0, 2, 3])).tolist()
    [32, 32, 16]
    """
    steps = to_steps(log_probs)
    drops = np.diff(steps, prepend=np.zeros(1, dtype=np.uint16))
    first = offsets[:-1][np.diff(offsets) > 0]
    drops[first] = steps[first]
    return drops


def from_drops(drops: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[K] float32 log-probabilities; what `to_drops` takes."""
    return from_steps(steps_of(drops, np.diff(offsets)))


def steps_of(drops: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[K] uint32 steps below 0 of each entry.

    Args:
        lengths: [N] entries of each position, fewer than 65,536.

    >>> steps_of(np.array([32, 32, 16], dtype=np.uint16), np.array([2, 1])).tolist()
    [32, 64, 16]
    """
    # Sums over all positions may pass 2**32; the differences within one are right all the same.
    sums = np.cumsum(drops, dtype=np.uint32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    before = np.concatenate([np.zeros(1, dtype=np.uint32), sums])[starts]
    return np.asarray(sums - np.repeat(before, lengths))


def probabilities(steps: np.ndarray) -> np.ndarray:
    """float64 of steps below 0; of the most and more it is 0.

    >>> probabilities(np.array([0, 64, 70_000])).round(3).tolist()
    [1.0, 0.368, 0.0]
    """
    masses: np.ndarray = _PROBABILITIES.take(steps, mode="clip")
    return masses


def to_sum_one(
    log_probs: np.ndarray, tail: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Undo what rounding does to the sum of a position's masses.

    Returns:
        ([K] float32 log-probabilities, [N] float32 tails) of positions that sum to 1.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.exp(log_probs.astype(np.float64)))])
    whole = sums[offsets[1:]] - sums[offsets[:-1]] + tail
    whole[whole <= 0] = 1.0  # nothing kept, no tail: no distribution
    scaled = log_probs - np.repeat(np.log(whole), np.diff(offsets))
    return np.minimum(scaled, 0.0).astype(np.float32), (tail / whole).astype(np.float32)
