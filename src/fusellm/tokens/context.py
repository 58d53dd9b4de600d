"""Context: text that a model reads and is not asked to predict, such as the prompt of an answer.

Spans are (first byte, one more than the last byte) of UTF-8, ascending. T tokens, L bytes of a
block.
"""

from collections.abc import Sequence

import numpy as np

Spans = Sequence[tuple[int, int]]


def spans_within(spans: Spans, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """What of the spans is in the bytes [start, end), counted from `start`.

    >>> spans_within([(0, 4), (6, 9)], 2, 7)
    ((0, 2), (4, 5))
    """
    cut = ((max(a, start) - start, min(b, end) - start) for a, b in spans)
    return tuple((a, b) for a, b in cut if a < b)


def context_bytes(spans: Spans, length: int) -> np.ndarray:
    """[L] bool, whether each byte is context.

    >>> context_bytes([(1, 3)], 4).tolist()
    [False, True, True, False]
    """
    is_context = np.zeros(length, dtype=np.bool_)
    for start, end in spans:
        is_context[start:end] = True
    return is_context


def is_context_token(ends: np.ndarray, spans: Spans, length: int) -> np.ndarray:
    """[T] bool, whether all bytes of each token are context.

    A token without bytes is what the byte after it is, and EOS what the byte before it is.

    Args:
        ends: [T] boundaries, in bytes.
        length: of the block, in bytes.

    >>> is_context_token(np.array([0, 3, 5, 8, 8]), [(0, 4)], 8).tolist()
    [True, True, False, False, False]
    """
    of_byte = context_bytes(spans, length)
    if not length:
        return np.zeros(len(ends), dtype=np.bool_)
    before = np.concatenate([[0], np.cumsum(of_byte)])
    starts = np.concatenate([[0], ends[:-1]])
    whole: np.ndarray = before[ends] - before[starts] == ends - starts
    return np.where(starts == ends, of_byte[np.minimum(starts, length - 1)], whole)
