"""Boundaries by a walk: which byte of the text each token ends at (docs/method.md).

T tokens of one block.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from fusellm.compiled import compiled
from fusellm.tokens.vocabulary import Vocabulary

_COVERED = -1
_SPACE = 0x20


class _Spelled(NamedTuple):
    """A vocabulary's tokens as bytes, as of `Vocabulary`, for compiled loops."""

    is_text: np.ndarray
    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    may_be_dummy: np.ndarray
    doubles: bool
    restarts: np.ndarray


@compiled()
def _walk(
    text: np.ndarray,
    ids: np.ndarray,
    spelled: _Spelled,
    ends: np.ndarray,
) -> int:
    cursor = 0
    begun_anew = spelled.doubles
    for t in range(len(ids)):
        start, length = spelled.starts[ids[t]], spelled.lengths[ids[t]]
        here = begun_anew or cursor == len(text) or text[cursor] != _SPACE
        if here and spelled.may_be_dummy[ids[t]]:
            start, length = start + 1, length - 1
        if cursor + length > len(text):
            return t
        for n in range(length):
            if text[cursor + n] != spelled.flat[start + n]:
                return t
        cursor += length
        ends[t] = cursor
        begun_anew = spelled.doubles and spelled.restarts[ids[t]]
    return _COVERED if cursor == len(text) else len(ids)


@compiled()
def _walk_all(
    text: np.ndarray,
    text_offsets: np.ndarray,
    ids: np.ndarray,
    id_offsets: np.ndarray,
    spelled: _Spelled,
    ends: np.ndarray,
    covered: np.ndarray,
) -> None:
    for b in range(len(covered)):
        first, last = id_offsets[b], id_offsets[b + 1]
        known = True
        for t in range(first, last):
            known &= ids[t] < len(spelled.is_text) and spelled.is_text[ids[t]]
        if known:
            own = text[text_offsets[b] : text_offsets[b + 1]]
            stopped = _walk(own, ids[first:last], spelled, ends[first:last])
            covered[b] = stopped == _COVERED


def _offsets(rows: Sequence[Sequence[int] | np.ndarray | bytes]) -> np.ndarray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=offsets[1:])
    return offsets


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


class Walked(NamedTuple):
    """Boundaries of many texts.

    Attributes:
        ends: int64, the byte offset in its text where each token ends; of all texts, one after
            another.
        offsets: [texts + 1] where the tokens of each begin.
        covered: [texts] bool, whether the walk came to the text's end.
    """

    ends: np.ndarray
    offsets: np.ndarray
    covered: np.ndarray


def walked(
    texts: Sequence[bytes], rows: Sequence[Sequence[int] | np.ndarray], vocabulary: Vocabulary
) -> Walked:
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
        _Spelled(
            vocabulary.is_text,
            vocabulary.flat,
            vocabulary.starts,
            vocabulary.lengths,
            vocabulary.may_be_dummy,
            vocabulary.doubles,
            vocabulary.restarts_after,
        ),
        ends,
        covered,
    )
    return Walked(ends, offsets, covered)


def all_boundaries(
    texts: Sequence[bytes], rows: Sequence[Sequence[int] | np.ndarray], vocabulary: Vocabulary
) -> list[np.ndarray | None]:
    """`boundaries` of many texts, each on its own."""
    ends, offsets, covered = walked(texts, rows, vocabulary)
    cuts = offsets.tolist()
    return [
        ends[cuts[b] : cuts[b + 1]] if whole else None for b, whole in enumerate(covered.tolist())
    ]
