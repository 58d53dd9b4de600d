"""Cross-entropy against the text, made comparable between tokenizers.

N positions that predict, T = N + 1 tokens, L bytes of the block.
"""

import math

import numpy as np

NATS_PER_BIT = math.log(2)


def nats_by_byte(ends: np.ndarray, true_log_prob: np.ndarray, length_bytes: int) -> np.ndarray:
    """A block's cross-entropy, each token's nats spread evenly over its bytes.

    A token without bytes (a dummy prefix standing alone) adds its nats to the token after it. EOS
    has no bytes and nothing after it, and is not counted.

    Args:
        ends: [T] boundaries in bytes.
        true_log_prob: [N] nats, of tokens 1 … N.
        length_bytes: L.

    Returns:
        [L] float64 nats; NaN at bytes that no prediction covers (the first token's, where the
        model has no BOS).

    >>> nats_by_byte(np.array([0, 1, 3]), np.array([-1.0, -4.0]), 3).tolist()
    [1.0, 2.0, 2.0]
    """
    by_byte = np.full(length_bytes, np.nan)
    lengths = np.diff(ends)
    with_bytes = np.nonzero(lengths)[0]
    if len(with_bytes) == 0:
        return by_byte
    group = np.searchsorted(with_bytes, np.arange(len(lengths)))
    counted = group < len(with_bytes)
    nats = np.bincount(
        group[counted],
        weights=-true_log_prob[counted].astype(np.float64),
        minlength=len(with_bytes),
    )
    widths = lengths[with_bytes]
    by_byte[ends[0] : ends[0] + widths.sum()] = np.repeat(nats / widths, widths)
    return by_byte


def sums_over(by_byte: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """[…] sums of `by_byte` [L] over spans [start, stop), NaN counting as 0."""
    cumulative = np.concatenate([[0.0], np.cumsum(np.nan_to_num(by_byte))])
    return np.asarray(cumulative[stops] - cumulative[starts])
