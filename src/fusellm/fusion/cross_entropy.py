"""Cross-entropy against the text, made comparable between tokenizers.

B blocks, one after another in flat arrays with offsets; T tokens, N = T - B positions that
predict, L bytes, in all; S sources.
"""

import math

import numpy as np

from fusellm.compiled import compiled

NATS_PER_BIT = math.log(2)


@compiled()
def _nats_by_byte(
    ends: np.ndarray,
    token_offsets: np.ndarray,
    true_log_prob: np.ndarray,
    byte_offsets: np.ndarray,
    prefix_tokens: int,
    by_byte: np.ndarray,
) -> None:
    # Tokens " con" (4 bytes, 2 nats) and "st" (2 bytes, 3 nats) give bytes 0.5 0.5 0.5 0.5 1.5 1.5:
    # their sum over any stretch is the cost of that stretch, whoever cut it and wherever.
    # `pending` is what a token without bytes has cost, until one with bytes comes.
    #
    # Relies on: ends that ascend within a block to no more than its bytes (require_text).
    position = 0
    for b in range(len(token_offsets) - 1):
        pending = 0.0
        for t in range(token_offsets[b], token_offsets[b + 1] - 1):
            if t + 1 - token_offsets[b] >= prefix_tokens:
                pending -= true_log_prob[position]
            position += 1
            width = ends[t + 1] - ends[t]
            if width > 0:
                first = byte_offsets[b] + ends[t]
                by_byte[first : first + width] = pending / width
                pending = 0.0


def nats_by_byte(
    ends: np.ndarray,
    token_offsets: np.ndarray,
    true_log_prob: np.ndarray,
    byte_offsets: np.ndarray,
    prefix_tokens: int = 0,
) -> np.ndarray:
    """Cross-entropy of blocks, each token's nats spread evenly over its bytes.

    A token without bytes (a dummy prefix standing alone) adds its nats to the token after it. EOS
    has no bytes and nothing after it, and is not counted; nor are the tokens that are put before a
    text, which no model is asked to predict.

    Args:
        ends: [T] boundaries in bytes, counted from each block's beginning.
        token_offsets: [B+1] where each block's tokens are; a block may have none.
        true_log_prob: [N] nats, of each block's tokens but the first.
        byte_offsets: [B+1] where each block's bytes are.
        prefix_tokens: of each block, tokens that are put before its text.

    Returns:
        [L] float64 nats; NaN at bytes that no prediction covers (the first token's, where nothing
        is put before a text).

    >>> nats_by_byte(np.array([0, 1, 3]), np.array([0, 3]), np.array([-1.0, -4.0]),
    ...              np.array([0, 3])).tolist()
    [1.0, 2.0, 2.0]
    """
    by_byte = np.full(byte_offsets[-1], np.nan)
    nats = true_log_prob.astype(np.float64)
    _nats_by_byte(ends, token_offsets, nats, byte_offsets, prefix_tokens, by_byte)
    return by_byte


@compiled()
def _span_nats(
    by_byte: np.ndarray,
    read: np.ndarray,
    ends: np.ndarray,
    token_offsets: np.ndarray,
    byte_offsets: np.ndarray,
    reach: int,
    hindsight: bool,
    nats: np.ndarray,
    scored: np.ndarray,
) -> None:
    # Sums over a window in constant time: sums[s, n] is the cost of a block's first n bytes, so
    # that from a to b it costs sums[s, b] − sums[s, a]. A byte that one of the sources did not
    # score (its first token's) counts for none of them: all are compared over the same bytes.
    #
    # Relies on the same as `_nats_by_byte`.
    sources = len(by_byte)
    position = 0
    for b in range(len(token_offsets) - 1):
        first, length = byte_offsets[b], byte_offsets[b + 1] - byte_offsets[b]
        sums = np.zeros((sources + 1, length + 1))  # the last row counts bytes
        for n in range(length):
            by_all = True
            for s in range(sources):
                if read[s, b] and np.isnan(by_byte[s, first + n]):
                    by_all = False
            for s in range(sources):
                add = by_byte[s, first + n] if by_all and read[s, b] else 0.0
                sums[s, n + 1] = sums[s, n] + add
            sums[sources, n + 1] = sums[sources, n] + by_all
        for t in range(token_offsets[b], token_offsets[b + 1] - 1):
            start, stop = 0, length
            if reach >= 0:
                start = max(ends[t] - reach, 0)
                stop = max(min(ends[t] + reach, length), ends[t + 1])
            if not hindsight:
                stop = ends[t]
            for s in range(sources):
                nats[s, position] = sums[s, stop] - sums[s, start]
            scored[position] = sums[sources, stop] - sums[sources, start]
            position += 1


def span_nats(
    by_byte: np.ndarray,
    read: np.ndarray,
    ends: np.ndarray,
    token_offsets: np.ndarray,
    byte_offsets: np.ndarray,
    reach: int | None,
    hindsight: bool = True,
    stopped: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each source around each target position.

    Only bytes are counted that all sources scored which read the block. Behind the end of a source
    that did not read all of it (`stopped`), the others are compared without it.

    Args:
        by_byte: [S, L] `nats_by_byte` of each source.
        read: [S, B] bool, whether a source read a block.
        ends, token_offsets: the target's boundaries.
        reach: bytes to each side of the position, the next token always included; None for the
            whole block.
        hindsight: whether bytes after the position count, the true next token's among them.
        stopped: [S, N] bool, whether a source that read the block had stopped before a position;
            None where all have read to the end.

    Returns:
        (nats [S, N], bytes counted [N]), float64. Without hindsight nothing is counted at the
        beginning of a block.

    >>> nats, scored = span_nats(np.array([[1.0, 2.0, 4.0]]), np.ones((1, 1), bool),
    ...                          np.array([0, 1, 3]), np.array([0, 2]), np.array([0, 3]), 0)
    >>> nats.tolist(), scored.tolist()
    ([[1.0]], [1.0])
    """
    positions = int(np.maximum(np.diff(token_offsets) - 1, 0).sum())
    nats, scored = np.zeros((len(by_byte), positions)), np.zeros(positions)
    whole = -1 if reach is None else reach
    where = (ends, token_offsets, byte_offsets, whole, hindsight)
    _span_nats(by_byte, read, *where, nats, scored)
    if stopped is None or not stopped.any():
        return nats, scored
    # Sources stop one after another, so that those that have stopped at a position are told by
    # their number: once for each number, without as many.
    block = np.repeat(np.arange(read.shape[1]), np.maximum(np.diff(token_offsets) - 1, 0))
    number = stopped.sum(axis=0)
    places = np.array([np.bincount(block, own, read.shape[1]) for own in stopped])
    order = np.argsort(np.argsort(-places, axis=0, kind="stable"), axis=0)  # the first to stop is 0
    for count in range(1, int(number.max()) + 1):
        left = read & ~((places > 0) & (order < count))
        own_nats, own_scored = np.zeros_like(nats), np.zeros_like(scored)
        _span_nats(by_byte, left, *where, own_nats, own_scored)
        at = number == count
        nats[:, at], scored[at] = own_nats[:, at], own_scored[at]
    return nats, scored
