"""Boundaries by a walk: which byte of the text each token ends at (docs/method.md).

T tokens of one block.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from fusellm.compiled import compiled
from fusellm.tokens.vocabulary import Vocabulary

_COVERED = -1
_SPACE = 0x20


@compiled()
def _walk(
    text: np.ndarray,
    ids: np.ndarray,
    flat: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    may_be_dummy: np.ndarray,
    doubles: bool,
    restarts: np.ndarray,
    ends: np.ndarray,
) -> int:
    cursor = 0
    begun_anew = doubles
    for t in range(len(ids)):
        start, length = starts[ids[t]], lengths[ids[t]]
        if may_be_dummy[ids[t]] and (begun_anew or cursor == len(text) or text[cursor] != _SPACE):
            start, length = start + 1, length - 1
        if cursor + length > len(text):
            return t
        for n in range(length):
            if text[cursor + n] != flat[start + n]:
                return t
        cursor += length
        ends[t] = cursor
        begun_anew = doubles and restarts[ids[t]]
    return _COVERED if cursor == len(text) else len(ids)


@compiled()
def _walk_all(
    text: np.ndarray,
    text_offsets: np.ndarray,
    ids: np.ndarray,
    id_offsets: np.ndarray,
    is_text: np.ndarray,
    flat: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    may_be_dummy: np.ndarray,
    doubles: bool,
    restarts: np.ndarray,
    ends: np.ndarray,
    covered: np.ndarray,
) -> None:
    for b in range(len(covered)):
        first, last = id_offsets[b], id_offsets[b + 1]
        known = True
        for t in range(first, last):
            known &= ids[t] < len(is_text) and is_text[ids[t]]
        if known:
            stopped = _walk(
                text[text_offsets[b] : text_offsets[b + 1]],
                ids[first:last],
                flat,
                starts,
                lengths,
                may_be_dummy,
                doubles,
                restarts,
                ends[first:last],
            )
            covered[b] = stopped == _COVERED


def _offsets(rows: Sequence[Sequence[int] | np.ndarray | bytes]) -> np.ndarray:
    return np.cumsum([0, *(len(row) for row in rows)])


def boundaries(
    text: bytes, ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary
) -> np.ndarray | None:
    """The byte offset in `text` where each token ends.

    Each token's bytes must equal the text at the cursor. The one licence is a leading space mark
    whose space the text does not have there (a dummy prefix): it contributes no byte. Most
    tokenizers put one only where no space is, so the text tells which mark is the dummy. Those
    that put one before a space as well (`Vocabulary.doubles`) do so where they begin: there the
    first mark is the dummy, whatever the text has.

    Args:
        text: UTF-8 of one block.
        ids: [T] token ids, without prefix and EOS.

    Returns:
        [T] int64, non-decreasing, the last equal to len(text); None where the walk fails, which
        means that the tokenizer changes the text (lower case, NFC, unknown characters).
    """
    return all_boundaries([text], [ids], vocabulary)[0]


def all_boundaries(
    texts: Sequence[bytes], rows: Sequence[Sequence[int] | np.ndarray], vocabulary: Vocabulary
) -> list[np.ndarray | None]:
    """`boundaries` of many texts at once.

    Args:
        texts: UTF-8 of each.
        rows: the token ids of each, without prefix and EOS.
    """
    offsets = _offsets(rows)
    ends = np.zeros(offsets[-1], dtype=np.int64)
    covered = np.zeros(len(texts), dtype=np.bool_)
    _walk_all(
        np.frombuffer(b"".join(texts), dtype=np.uint8),
        _offsets(texts),
        np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=len(ends)),
        offsets,
        vocabulary.is_text,
        vocabulary.flat,
        vocabulary.starts,
        vocabulary.lengths,
        vocabulary.may_be_dummy,
        vocabulary.doubles,
        vocabulary.restarts_after,
        ends,
        covered,
    )
    cuts = offsets.tolist()
    return [
        ends[cuts[b] : cuts[b + 1]] if whole else None for b, whole in enumerate(covered.tolist())
    ]
