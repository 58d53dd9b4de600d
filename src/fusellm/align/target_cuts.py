"""Whether the target, having read a token, would cut its text there if a source token came next.

The target has a boundary after `a` only where it has no longer token for what follows: one that
has `ab` as a token never reads `b` after `a`. A source that has the two apart says there how often
`b` comes next, which is nothing for the target to learn at that place.

Vs, Vt source and target vocabulary sizes; N pairs.
"""

from collections.abc import Iterable

import numpy as np

from fusellm.align.translation import as_continuations
from fusellm.tokens.encode import Encoder

_BYTES = 256


class TargetCuts:
    """Answers for pairs of a target token and the source token after it.

    The two together may be a token of the target's: it does not cut there. It may have no token
    that takes in any of the second: it does. Else its tokenizer is asked. Answers are kept.
    """

    def __init__(self, source: Encoder, target: Encoder) -> None:
        self._source = [token or b"" for token in source.vocabulary.token_bytes]
        self._target_tokens = [token or b"" for token in target.vocabulary.token_bytes]
        self._first_byte = np.array([token[0] if token else 0 for token in self._source])
        self._target, self._spelled = target, frozenset(self._target_tokens)
        self._known: dict[int, bool] = {}
        ids: dict[bytes, list[int]] = {}
        for id_, token in enumerate(self._target_tokens):
            ids.setdefault(token, []).append(id_)
        goes_on = {
            (token[:n], token[n])
            for token in self._target_tokens
            for n in range(1, len(token))
            if token[:n] in ids
        }
        beginnings = sorted({beginning for beginning, _ in goes_on})
        number = {beginning: n for n, beginning in enumerate(beginnings)}
        self._number = np.full(len(self._target_tokens), len(beginnings))
        for beginning in beginnings:
            self._number[ids[beginning]] = number[beginning]
        self._goes_on = np.zeros((len(beginnings) + 1, _BYTES), dtype=np.bool_)
        for beginning, byte in goes_on:
            self._goes_on[number[beginning], byte] = True

    def spanned(self, read: np.ndarray, following: np.ndarray) -> np.ndarray:
        """[N] bool, whether the target has no boundary between the two.

        Args:
            read: [N] target ids.
            following: [N] source ids; a special one is never spanned.
        """
        found = self._goes_on[self._number[read], self._first_byte[following]]
        places = np.nonzero(found)[0]
        pairs = read[places] * len(self._source) + following[places]
        every, where = np.unique(pairs, return_inverse=True)
        self._ask(key for key in every.tolist() if key not in self._known)
        found[places] = np.array([self._known[key] for key in every.tolist()], dtype=bool)[where]
        return np.asarray(found)

    def _ask(self, keys: Iterable[int]) -> None:
        open_: dict[int, tuple[bytes, bytes]] = {}
        for key in keys:
            read, following = divmod(key, len(self._source))
            a, b = self._target_tokens[read], self._source[following]
            self._known[key] = a + b in self._spelled
            if not self._known[key] and any(a + b[:n] in self._spelled for n in range(1, len(b))):
                open_[key] = a, b
        tokens = as_continuations(self._target, {a + b for a, b in open_.values()})
        for key, (a, b) in open_.items():
            encoded = tokens[a + b]
            ends = None if encoded is None else encoded.ends
            self._known[key] = ends is not None and len(a) not in ends
