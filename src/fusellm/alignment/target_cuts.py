"""Whether the target, having read a token, would cut its text there if a source token came next.

The target has a boundary after `a` only where it has no longer token for what follows: one that
has `ab` as a token never reads `b` after `a`. A source that has the two apart says there how often
`b` comes next, which is nothing for the target to learn at that place.

N pairs of a target token and a source token.
"""

from collections.abc import Iterable

import numpy as np

from fusellm.alignment.translation import as_continuations, before_a_letter
from fusellm.tokens.encode import Encoded, Encoder

_BYTES = 256
_MOST_KEPT = 4_000_000


class TargetCuts:
    """Answers for pairs of a target token and the source token after it.

    Most pairs are told by the vocabulary: the target has no token that begins with the first and
    takes in some of the second. For the others its tokenizer is asked. Answers are kept.
    """

    def __init__(self, source: Encoder, target: Encoder) -> None:
        self._source = [token or b"" for token in source.vocabulary.token_bytes]
        self._target_tokens = [token or b"" for token in target.vocabulary.token_bytes]
        self._first_byte = np.array([token[0] if token else 0 for token in self._source])
        self._has_bytes = np.array([bool(token) for token in self._source])
        self._target, self._spelled = target, frozenset(self._target_tokens)
        self._known: dict[int, bool] = {}
        ids: dict[bytes, list[int]] = {}
        for id_, token in enumerate(self._target_tokens):
            ids.setdefault(token, []).append(id_)
        longer = {
            (token[:n], token[n])
            for token in self._target_tokens
            for n in range(1, len(token))
            if token[:n] in ids
        }
        beginnings = sorted({beginning for beginning, _ in longer})
        number = {beginning: n for n, beginning in enumerate(beginnings)}
        self._number = np.full(len(self._target_tokens), len(beginnings))
        for beginning in beginnings:
            self._number[ids[beginning]] = number[beginning]
        self._has_longer = np.zeros((len(beginnings) + 1, _BYTES), dtype=np.bool_)
        for beginning, byte in longer:
            self._has_longer[number[beginning], byte] = True

    def spanned(self, read: np.ndarray, following: np.ndarray) -> np.ndarray:
        """[N] bool, whether the target has no boundary between the two.

        Args:
            read: [N] target ids.
            following: [N] source ids; a special one is never spanned.
        """
        spanned = self._has_longer[self._number[read], self._first_byte[following]]
        spanned &= self._has_bytes[following]
        places = np.nonzero(spanned)[0]
        pairs = read[places] * len(self._source) + following[places]
        every, where = np.unique(pairs, return_inverse=True)
        if len(self._known) > _MOST_KEPT:
            self._known.clear()
        self._ask(key for key in every.tolist() if key not in self._known)
        spanned[places] = np.array([self._known[key] for key in every.tolist()], dtype=bool)[where]
        return np.asarray(spanned)

    def _ask(self, keys: Iterable[int]) -> None:
        asked: dict[int, tuple[bytes, bytes]] = {}
        for key in keys:
            read, following = divmod(key, len(self._source))
            a, b = self._target_tokens[read], self._source[following]
            self._known[key] = any(a + b[:n] in self._spelled for n in range(1, len(b) + 1))
            if self._known[key]:
                asked[key] = a, b
        whole = as_continuations(self._target, {a + b for a, b in asked.values()})
        spaced = before_a_letter(self._target, whole)
        for key, (a, b) in asked.items():
            readings = whole[a + b], spaced.get(a + b, whole[a + b])
            self._known[key] = all(_joins(reading, len(a)) for reading in readings)


def _joins(encoded: Encoded | None, place: int) -> bool:
    return encoded is not None and encoded.ends is not None and place not in encoded.ends
