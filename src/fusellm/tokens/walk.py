"""Boundaries by a walk: which byte of the text each token ends at (DESIGN: token alignment).

T tokens of one block.
"""

from collections.abc import Sequence

import numba
import numpy as np

from fusellm.tokens.vocabulary import Vocabulary

_FAILED = -1


@numba.njit(cache=True)
def _walk(
    text: np.ndarray,
    ids: np.ndarray,
    flat: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    may_be_dummy: np.ndarray,
    drop_first: bool,
    ends: np.ndarray,
) -> int:
    cursor = 0
    for t in range(len(ids)):
        start, length = starts[ids[t]], lengths[ids[t]]
        skipped = 1 if drop_first and t == 0 else 0
        while True:
            matches = cursor + length - skipped <= len(text)
            if matches:
                for n in range(length - skipped):
                    if text[cursor + n] != flat[start + skipped + n]:
                        matches = False
                        break
            if matches:
                break
            if skipped == 1 or not may_be_dummy[ids[t]]:
                return t
            skipped = 1
        cursor += length - skipped
        ends[t] = cursor
    return _FAILED if cursor == len(text) else len(ids)


def boundaries(
    text: bytes, ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary
) -> np.ndarray | None:
    """The byte offset in `text` where each token ends.

    Each token's bytes must equal the text at the cursor. The one licence is a leading space mark
    whose space the text does not have there (a dummy prefix): it contributes no byte.

    Args:
        text: UTF-8 of one block.
        ids: [T] token ids, without BOS and EOS.

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
    text_array = np.frombuffer(text, dtype=np.uint8)
    surplus = int(vocabulary.lengths[ids_array].sum()) - len(text)
    first_may = bool(vocabulary.may_be_dummy[ids_array[0]])
    # Where the tokens have a byte more than the text, the dummy prefix is the first token's:
    # read greedily, `▁` `▁a` over " a" would take the dummy for the text's own space.
    for drop_first in (True, False) if surplus > 0 and first_may else (False,):
        stopped = _walk(
            text_array,
            ids_array,
            vocabulary.flat,
            vocabulary.starts,
            vocabulary.lengths,
            vocabulary.may_be_dummy,
            drop_first,
            ends,
        )
        if stopped == _FAILED:
            return ends
    return None
