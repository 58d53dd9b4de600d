"""What is left of a source's token when its first bytes have been read already.

A source that has `;` and a line end as one token says nothing of line ends once it has read `;`
alone: it said so one token before, when it gave mass to the longer token. Of that token, once `;`
is read, a line end is left. Fusion asks for it with `fusellm.fusion.healing`.

Vs source vocabulary size.
"""

import numpy as np

from fusellm.align.ragged import offsets_of
from fusellm.align.translation import FirstTokens, as_continuations
from fusellm.tokens.encode import Encoder

_UNKNOWN = -2


class Continuations:
    """The source token that the rest of a source token begins with, of one source and the target.

    A token v of which the first n bytes are read has the slot `offsets[v] + n`. Slots are filled
    as they are asked for: few of all are met in a text.

    Attributes:
        offsets: [Vs+1] int64, where each token's bytes are; special tokens have none.
        spelled: uint8, the bytes of all tokens.
    """

    NOTHING = -1
    """Where no boundary of the target can be: its own tokens span the place."""

    def __init__(self, source: Encoder, target: Encoder) -> None:
        tokens = [token or b"" for token in source.vocabulary.token_bytes]
        self.offsets = offsets_of(np.array([len(token) for token in tokens], dtype=np.int64))
        self.spelled = np.frombuffer(b"".join(tokens), dtype=np.uint8)
        self._tokens = tokens
        self._target = target
        self._of_target = {token for token in target.vocabulary.token_bytes if token}
        self._id = {token: id_ for id_, token in enumerate(tokens) if token}
        self._firsts = FirstTokens(source)
        self._next = np.full(len(self.spelled), _UNKNOWN, dtype=np.int64)

    def __getitem__(self, slots: np.ndarray) -> np.ndarray:
        """Source ids of `slots`, of the same shape; `NOTHING` where the target's tokens span it."""
        found = self._next[slots]
        if (found == _UNKNOWN).any():
            self._fill(np.unique(slots[found == _UNKNOWN]))
            found = self._next[slots]
        return np.asarray(found)

    def _fill(self, slots: np.ndarray) -> None:
        ids = np.searchsorted(self.offsets, slots, side="right") - 1
        asked = [
            (slot, self._tokens[id_], slot - int(self.offsets[id_]))
            for slot, id_ in zip(slots.tolist(), ids.tolist(), strict=True)
        ]
        cuts = self._cuts({token for _, token, _ in asked})
        rests = {slot: token[n:] for slot, token, n in asked if n in cuts[token]}
        self._next[slots] = self.NOTHING
        self._firsts.look_up(rest for rest in rests.values() if rest not in self._id)
        for slot, rest in rests.items():
            self._next[slot] = self._first(rest)

    def _cuts(self, tokens: set[bytes]) -> dict[bytes, set[int]]:
        """Where the target has boundaries within each token.

        It has none in its own tokens. Of other bytes that are no whole characters a tokenizer
        cannot be asked: it is taken to cut between any two.
        """
        found: dict[bytes, set[int]] = {token: set() for token in tokens & self._of_target}
        for token, encoded in as_continuations(self._target, tokens - self._of_target).items():
            ends = None if encoded is None else encoded.ends
            found[token] = set(range(len(token)) if ends is None else ends.tolist())
        return found

    def _first(self, rest: bytes) -> int:
        """Id of the token of these bytes, else of the first of their tokens."""
        found = self._id.get(rest)
        found = self._firsts.first(rest) if found is None else found
        found = self._firsts.beginning(rest) if found is None else found
        return self.NOTHING if found is None else found
