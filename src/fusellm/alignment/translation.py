"""Vocabulary maps: what a source token id becomes in the target vocabulary.

Both maps of this module send ids to outcomes, an outcome being a set of target ids:

    first      each target id is an outcome of its own; a source token goes to the target token of
               its bytes, else to the first target token of its bytes
    classes    the common partition: an outcome is a class that both tokenizers can tell apart

Vs, Vt source and target vocabulary sizes; U outcomes.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.tokens.encode import Encoder

# What a token is encoded after. Each is a context in which one kind of token stands alone; the
# first that no merge crosses is used.
_ANCHORS = ("\n", "a", "0", ".", " ", "\u4e2d")
_LETTER = b"a"


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A vocabulary map of one source.

    Attributes:
        outcome_of_source: [Vs] int64, the outcome that each source id becomes; -1 for none.
        outcome_of_target: [Vt] int64, the outcome that each target id belongs to; -1 for none.
        outcomes: U.
        complete: whether an outcome has the same probability under both models, so that ids
            without one are themselves one outcome (numbered U), and not mass gone astray.
    """

    outcome_of_source: np.ndarray
    outcome_of_target: np.ndarray
    outcomes: int
    complete: bool

    @cached_property
    def has_leftover(self) -> bool:
        """Whether there are target ids without an outcome."""
        return bool((self.outcome_of_target < 0).any())

    def target_ids(self, source_id: int) -> np.ndarray:
        """Target ids of the outcome that a source token becomes; empty if it becomes none."""
        outcome = self.outcome_of_source[source_id]
        return np.nonzero((self.outcome_of_target == outcome) & (outcome >= 0))[0]

    @cached_property
    def sets(self) -> OutcomeSets:
        """The target ids of each outcome, U + 1 sets; those of the last have no outcome."""
        outcome = np.where(self.outcome_of_target < 0, self.outcomes, self.outcome_of_target)
        return OutcomeSets.of(outcome, self.outcomes + 1)


class Continuation(NamedTuple):
    """Some bytes as a tokenizer spells them after other text.

    Attributes:
        ids: its tokens.
        ends: where each ends, in bytes.
    """

    ids: list[int]
    ends: list[int]


def as_continuations(encoder: Encoder, pieces: Iterable[bytes]) -> dict[bytes, Continuation | None]:
    """The tokens of some bytes where they go on after other text, by one tokenizer.

    Returns:
        The continuation of each piece; None where the bytes are no whole characters, or no text is
        found that they stand apart from.
    """
    continuations: dict[bytes, Continuation | None] = {}
    texts: list[tuple[bytes, str]] = []
    for piece in pieces:
        try:
            texts.append((piece, piece.decode("utf-8")))
        except UnicodeDecodeError:
            continuations[piece] = None
    for anchor in _ANCHORS:
        if not texts:
            break
        before, left = len(anchor.encode()), []
        rows, (ends, offsets, covered) = encoder.bare([anchor + text for _, text in texts])
        every, cuts, whole = ends.tolist(), offsets.tolist(), covered.tolist()
        for n, (piece, text) in enumerate(texts):
            own = every[cuts[n] : cuts[n + 1]]
            at = bisect_right(own, before)  # the first token after the anchor that reads anything
            if whole[n] and at > 0 and own[at - 1] == before:
                continuations[piece] = Continuation(
                    rows[n][at:], [end - before for end in own[at:]]
                )
            else:
                left.append((piece, text))
        texts = left
    return continuations | dict.fromkeys((piece for piece, _ in texts), None)


def before_a_letter(encoder: Encoder, pieces: Iterable[bytes]) -> dict[bytes, Continuation | None]:
    """Those of the pieces that end in white space, as `as_continuations`, with a letter after them.

    Many tokenizers join a run of white space at the end of a text, and leave its last character to
    the word that comes after it.
    """
    spaced = [piece for piece in pieces if piece[-1:].isspace()]
    continuations = as_continuations(encoder, [piece + _LETTER for piece in spaced])
    return {piece: continuations[piece + _LETTER] for piece in spaced}


class FirstTokens:
    """The first token of some bytes, spelled as a continuation, by one tokenizer.

    Attributes:
        by_bytes: the token of some bytes; a byte-fallback token only where there is no other.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[bytes, int | None] = {}
        vocabulary = encoder.vocabulary
        self.by_bytes: dict[bytes, int] = {}
        for id_, token in enumerate(vocabulary.token_bytes):
            other = self.by_bytes.get(token or b"")
            if token and (other is None or vocabulary.is_fallback[other]):
                self.by_bytes[token] = id_

    def look_up(self, pieces: Iterable[bytes]) -> None:
        """Find many at once; `first` then answers from memory."""
        unknown = [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
        for piece, told in as_continuations(self._encoder, unknown).items():
            self._known[piece] = None if told is None else told.ids[0]

    def forget(self) -> None:
        """Forget all answers."""
        self._known.clear()

    def first(self, piece: bytes) -> int | None:
        """Id of the first token of the bytes; None where they are no whole characters."""
        if piece not in self._known:
            self.look_up([piece])
        return self._known[piece]

    def beginning(self, piece: bytes) -> int | None:
        """Id of the longest token whose bytes begin `piece`; for bytes that are no whole text."""
        for length in range(len(piece), 0, -1):
            if piece[:length] in self.by_bytes:
                return self.by_bytes[piece[:length]]
        return None

    def bytes_of(self, id_: int) -> bytes:
        """The bytes of a token that stands for text."""
        token = self._encoder.vocabulary.token_bytes[id_]
        assert token is not None
        return token


def same_tokenizer(source: Encoder, target: Encoder) -> bool:
    """Whether two tokenizers cut every text alike: equal tables and rules."""
    return source.rules == target.rules


def identity_translation(source: Encoder, target: Encoder) -> VocabularyMap:
    """The map between equal tokenizers: text tokens to themselves, EOS to EOS.

    The two may still differ in which token is EOS; no other special token receives mass.
    """
    ids, outcome_of_target = (
        np.where(encoder.vocabulary.is_text, np.arange(len(encoder.vocabulary)), -1)
        for encoder in (source, target)  # of different lengths where their heads are
    )
    if target.vocabulary.eos_id is not None:
        outcome_of_target[target.vocabulary.eos_id] = target.vocabulary.eos_id
    _map_eos(source, target, ids, target.vocabulary.eos_id)
    outcomes = max(len(ids), len(outcome_of_target))
    return VocabularyMap(ids, outcome_of_target, outcomes, complete=True)


def first_translation(source: Encoder, target: Encoder) -> VocabularyMap:
    """The map of the strategy `bytes`: a token's first bytes (docs/method.md, Translation).

    EOS becomes EOS; no other special token receives mass.
    """
    if same_tokenizer(source, target):
        return identity_translation(source, target)
    firsts = FirstTokens(target)
    firsts.look_up(token for token in source.vocabulary.token_bytes if token)
    outcome_of_source = np.full(len(source.vocabulary), -1, dtype=np.int64)
    for id_, token in enumerate(source.vocabulary.token_bytes):
        if token:
            outcome = firsts.first(token)
            outcome = firsts.beginning(token) if outcome is None else outcome
            outcome_of_source[id_] = -1 if outcome is None else outcome
    _map_eos(source, target, outcome_of_source, target.vocabulary.eos_id)
    return map_translation(outcome_of_source, target)


def longest_translation(source: Encoder, target: Encoder) -> VocabularyMap:
    """The map of the strategy `bpm`: the longest target token that a token's bytes begin with.

    Byte-prefix marginalization, arXiv 2607.22334. EOS becomes EOS; no other special token receives
    mass.
    """
    if same_tokenizer(source, target):
        return identity_translation(source, target)
    firsts = FirstTokens(target)
    longest = (
        firsts.beginning(token) if token else None for token in source.vocabulary.token_bytes
    )
    outcome_of_source = np.array([-1 if id_ is None else id_ for id_ in longest], dtype=np.int64)
    _map_eos(source, target, outcome_of_source, target.vocabulary.eos_id)
    return map_translation(outcome_of_source, target)


def class_translation(source: Encoder, target: Encoder) -> VocabularyMap:
    """The common partition of two vocabularies (docs/method.md).

    From a token's bytes go to the first token that the other tokenizer spells them with, from
    there to the first token of the first tokenizer, and so on. The bytes only get shorter, so it
    ends, at a token that both have: the class. It is the same from both sides.
    """
    if same_tokenizer(source, target):
        return identity_translation(source, target)
    of_source, of_target = FirstTokens(source), FirstTokens(target)
    ends = _class_bytes(source.vocabulary.token_bytes, of_target, of_source)
    target_ends = _class_bytes(target.vocabulary.token_bytes, of_source, of_target)
    both = sorted({end for end in ends if end} & {end for end in target_ends if end})
    number = {end: n for n, end in enumerate(both)}
    outcome_of_source = _numbers(ends, number)
    outcome_of_target = _numbers(target_ends, number)
    outcomes = len(both)
    if source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None:
        outcome_of_target[target.vocabulary.eos_id] = outcomes
        _map_eos(source, target, outcome_of_source, outcomes)
        outcomes += 1
    return VocabularyMap(outcome_of_source, outcome_of_target, outcomes, complete=True)


def _class_bytes(
    tokens: Sequence[bytes | None], other: FirstTokens, own: FirstTokens
) -> list[bytes | None]:
    """[V] the bytes of each token's class; None where it has none."""
    reached: list[bytes | None] = [token or None for token in tokens]
    waiting = [n for n, token in enumerate(reached) if token]
    while waiting:
        before = {n: reached[n] for n in waiting}
        for firsts in (other, own):
            firsts.look_up(piece for n in waiting if (piece := reached[n]))
            for n in waiting:
                piece = reached[n]
                id_ = None if piece is None else firsts.first(piece)
                reached[n] = None if id_ is None else firsts.bytes_of(id_)
        waiting = [n for n in waiting if reached[n] is not None and reached[n] != before[n]]
    return reached


def _numbers(ends: Sequence[bytes | None], number: dict[bytes, int]) -> np.ndarray:
    return np.array([-1 if end is None else number.get(end, -1) for end in ends], dtype=np.int64)


def _map_eos(
    source: Encoder, target: Encoder, outcome_of_source: np.ndarray, outcome: int | None
) -> None:
    if source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None:
        outcome_of_source[source.vocabulary.eos_id] = -1 if outcome is None else outcome


def map_translation(vocabulary_map: np.ndarray, target: Encoder) -> VocabularyMap:
    """The translation of a map [Vs] of target ids: each target id is an outcome of its own."""
    everything = np.arange(len(target.vocabulary), dtype=np.int64)
    return VocabularyMap(vocabulary_map, everything, len(everything), complete=False)
