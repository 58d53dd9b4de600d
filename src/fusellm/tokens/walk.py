"""Boundaries by a walk: which byte of the text each token ends at (docs/method.md).

T tokens of one block.
"""

from collections.abc import Sequence

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
    ids_array = np.asarray(ids, dtype=np.int64)
    ends = np.zeros(len(ids_array), dtype=np.int64)
    if len(ids_array) == 0:
        return ends if not text else None
    if ids_array.max() >= len(vocabulary) or not vocabulary.is_text[ids_array].all():
        return None
    stopped = _walk(
        np.frombuffer(text, dtype=np.uint8),
        ids_array,
        vocabulary.flat,
        vocabulary.starts,
        vocabulary.lengths,
        vocabulary.may_be_dummy,
        vocabulary.doubles,
        vocabulary.restarts_after,
        ends,
    )
    return ends if stopped == _COVERED else None
