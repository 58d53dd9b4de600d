"""What is left of a source's token when its first bytes have been read already.

A source that has `;` and a line end as one token gives line ends no mass once it has read `;`
alone: their mass is in the longer token, one position earlier. Taking `;` away from that token
leaves the line end. `fusellm.fusion.healing` moves the mass there.

Vs is the source's vocabulary size.
"""

import numpy as np

from fusellm.alignment.translation import FirstTokens, as_continuations, before_a_letter
from fusellm.arrays.ragged import offsets_of
from fusellm.compiled import compiled
from fusellm.tokens.encode import Encoder

_UNKNOWN = -2


@compiled()
def begins_so(spelled: np.ndarray, token: int, other: int, count: int) -> bool:
    """Whether two tokens begin with the same bytes.

    Args:
        spelled: that of `Continuations`.
        token, other: where they begin there; both have at least `count` bytes.
    """
    same = 0
    while same < count and spelled[token + same] == spelled[other + same]:
        same += 1
    return bool(same == count)


class Continuations:
    """For each source token and each number of its bytes, the token that the rest begins with.

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
        self._firsts = FirstTokens(source)
        self._next = np.full(len(self.spelled), _UNKNOWN, dtype=np.int64)

    def __getitem__(self, slots: np.ndarray) -> np.ndarray:
        """Source ids of `slots`, of the same shape; `NOTHING` where the target's tokens span it."""
        ids = self._next[slots]
        if (ids == _UNKNOWN).any():
            self._fill(np.unique(slots[ids == _UNKNOWN]))
            ids = self._next[slots]
        return np.asarray(ids)

    def _fill(self, slots: np.ndarray) -> None:
        ids = np.searchsorted(self.offsets, slots, side="right") - 1
        asked = [
            (slot, self._tokens[id_], slot - int(self.offsets[id_]))
            for slot, id_ in zip(slots.tolist(), ids.tolist(), strict=True)
        ]
        pieces = self._target_pieces({token for _, token, _ in asked})
        rests = {slot: pieces[token][n] for slot, token, n in asked if n in pieces[token]}
        self._next[slots] = self.NOTHING
        self._firsts.look_up(rest for rest in rests.values() if rest not in self._firsts.by_bytes)
        for slot, rest in rests.items():
            self._next[slot] = self._first(rest)

    def _target_pieces(self, tokens: set[bytes]) -> dict[bytes, dict[int, bytes]]:
        """By token: where the target may cut it, and the piece that it reads next there.

        A token that ends in white space is asked for as the end of a text and before a letter.
        Where the target's tokenizer cannot be asked (bytes that are no whole characters), it has
        the token itself, or is taken to cut between any two bytes.
        """
        at_end = as_continuations(self._target, tokens)
        spaced = before_a_letter(self._target, tokens)
        by_token: dict[bytes, dict[int, bytes]] = {}
        for token in tokens:
            by_token[token] = {}
            for told in (at_end[token], spaced.get(token)):  # the last one counts
                if told is not None:
                    inside = [end for end in told.ends if end < len(token)]
                    stops = [*inside[1:], len(token)][: len(inside)]
                    pieces = zip(inside, stops, strict=True)
                    by_token[token] |= {start: token[start:stop] for start, stop in pieces}
            if at_end[token] is None and token not in self._of_target:
                by_token[token] = {n: token[n:] for n in range(1, len(token))}
        return by_token

    def _first(self, rest: bytes) -> int:
        """Id of the token of these bytes, else of the first of their tokens."""
        id_ = self._firsts.by_bytes.get(rest)
        id_ = self._firsts.first(rest) if id_ is None else id_
        id_ = self._firsts.beginning(rest) if id_ is None else id_
        return self.NOTHING if id_ is None else id_
