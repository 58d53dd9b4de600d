"""Whether the target, having read a token, would cut its text there if a source token came next.

The target has a boundary after `a` only where it has no longer token for what follows: one that
has `ab` as a token never reads `b` after `a`. A source that has the two apart says there how often
`b` comes next, which is nothing for the target to learn at that place.

R rows, each a target token and what source tokens may come after it; E entries of all rows.
"""

from typing import NamedTuple

import numpy as np

from fusellm.alignment.translation import Continuation, as_continuations, before_a_letter
from fusellm.arrays.known_numbers import KnownNumbers, place_of, with_room
from fusellm.compiled import compiled
from fusellm.tokens.encode import Encoder

_BYTES = 256
_MOST_KEPT = 4_000_000


class _Pairs(NamedTuple):
    """What is known of pairs, for compiled loops; Vs, Vt vocabularies.

    Attributes:
        beginning: [Vt] the number of each target token's bytes among those that longer tokens
            begin with; the last number for none.
        has_longer: [numbers, 257] bool, whether a longer token goes on with a byte. None does with
            number 256.
        first_byte: [Vs] of each source token; 256 of those without bytes.
        slots, pairs: of those that were asked for, as of `KnownNumbers`; target token · Vs + source
            token.
        joined: whether the tokenizer joined them, by their places.
    """

    beginning: np.ndarray
    has_longer: np.ndarray
    first_byte: np.ndarray
    slots: np.ndarray
    pairs: np.ndarray
    joined: np.ndarray


@compiled()
def _look_up(
    read: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    following: np.ndarray,
    known: _Pairs,
    spanned: np.ndarray,
    wanted: np.ndarray,
) -> int:
    # wanted: pairs that are not known, some of them often.
    count = 0
    for r in range(len(read)):
        longer = known.has_longer[known.beginning[read[r]]]
        for entry in range(starts[r], stops[r]):
            if longer[known.first_byte[following[entry]]]:
                pair = read[r] * len(known.first_byte) + following[entry]
                place = place_of(known.slots, known.pairs, pair)
                if place < 0:
                    wanted[count] = pair
                    count += 1
                else:
                    spanned[entry] = known.joined[place]
    return count


class TargetCuts:
    """Answers for pairs of a target token and the source token after it.

    Most pairs are told by the vocabulary: the target has no token that begins with the first and
    takes in some of the second. For the others its tokenizer is asked. Answers are kept.
    """

    def __init__(self, source: Encoder, target: Encoder) -> None:
        self._source = [token or b"" for token in source.vocabulary.token_bytes]
        self._target_tokens = [token or b"" for token in target.vocabulary.token_bytes]
        self._first_byte = np.array([token[0] if token else _BYTES for token in self._source])
        self._target, self._spelled = target, frozenset(self._target_tokens)
        self._known, self._joined = KnownNumbers(), np.zeros(0, dtype=np.bool_)
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
        self._beginning = np.full(len(self._target_tokens), len(beginnings))
        for beginning in beginnings:
            self._beginning[ids[beginning]] = number[beginning]
        self._has_longer = np.zeros((len(beginnings) + 1, _BYTES + 1), dtype=np.bool_)
        for beginning, byte in longer:
            self._has_longer[number[beginning], byte] = True

    def spanned(self, read: np.ndarray, following: np.ndarray) -> np.ndarray:
        """[R] bool, whether the target has no boundary between two tokens.

        Args:
            read: [R] target ids.
            following: [R] source ids; a special one is never spanned.
        """
        places = np.arange(len(read) + 1)
        return self.spanned_entries(read, places[:-1], places[1:], following)

    def spanned_entries(
        self, read: np.ndarray, starts: np.ndarray, stops: np.ndarray, following: np.ndarray
    ) -> np.ndarray:
        """[E] bool, the same for rows of source tokens; False of those in no row.

        Args:
            read: [R] target ids.
            starts, stops: [R] where the tokens that may come after each are in `following`.
            following: [E] source ids.
        """
        if len(self._known) > _MOST_KEPT:
            self._known = KnownNumbers()
        spanned = np.zeros(len(following), dtype=np.bool_)
        wanted = np.empty(len(following), dtype=np.int64)
        where = read, starts, stops, following
        while count := _look_up(*where, self._pairs(), spanned, wanted):
            self._ask(np.unique(wanted[:count]))
        return spanned

    def _pairs(self) -> _Pairs:
        known = self._known.slots, self._known.numbers, self._joined
        return _Pairs(self._beginning, self._has_longer, self._first_byte, *known)

    def _ask(self, pairs: np.ndarray) -> None:
        begin = len(self._known)
        self._known.add(pairs)
        self._joined = with_room(self._joined, len(self._known))
        asked: dict[int, tuple[bytes, bytes]] = {}
        for place, pair in enumerate(pairs.tolist(), begin):
            read, following = divmod(pair, len(self._source))
            a, b = self._target_tokens[read], self._source[following]
            self._joined[place] = False
            if any(a + b[:n] in self._spelled for n in range(1, len(b) + 1)):
                asked[place] = a, b
        whole = as_continuations(self._target, {a + b for a, b in asked.values()})
        spaced = before_a_letter(self._target, whole)
        for place, (a, b) in asked.items():
            readings = whole[a + b], spaced.get(a + b, whole[a + b])
            self._joined[place] = all(_joins(reading, len(a)) for reading in readings)


def _joins(told: Continuation | None, place: int) -> bool:
    return told is not None and place not in told.ends
