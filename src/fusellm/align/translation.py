"""Vocabulary maps: what a source token id becomes in the target vocabulary.

Both maps of this module send ids to outcomes, an outcome being a set of target ids:

    first      each target id is an outcome of its own; a source token goes to the target token of
               its bytes, else to the first target token of its bytes
    classes    the common partition: an outcome is a class that both tokenizers can tell apart

Vs, Vt source and target vocabulary sizes; U outcomes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fusellm.align.ragged import offsets_of
from fusellm.tokens.encode import Encoder

# What a token is encoded after. Each is a context in which one kind of token stands alone; the
# first that no merge crosses is used.
_ANCHORS = ("\n", "a", "0", ".", " ", "\u4e2d")
# Share of the target's tokens above which a class says too little, and its token is glued.
_LARGE_CLASS = 1 / 64


@dataclass(frozen=True)
class Glued:
    """A finer partition: some source tokens are taken together with the token after them.

    A source that spells a space apart from its word says with " " next to nothing; with the
    distribution after it, it says which word. Where the text goes on with such a token, that
    distribution is at hand. Outcomes are numbered after those of the translation they refine.

    Attributes:
        row_of_source: [Vs] int64, the row in `outcome_of_pair` of each token that is glued; -1.
        outcome_of_pair: [G, Vs] int64, the outcome of a glued token and the one after it; -1.
        outcome_of_source: [Vs] int64, the outcome of each other token; -1.
        outcome_of_target: [Vt] int64, the outcome that each target id belongs to; -1 for none.
        outcomes: how many there are.
    """

    row_of_source: np.ndarray
    outcome_of_pair: np.ndarray
    outcome_of_source: np.ndarray
    outcome_of_target: np.ndarray
    outcomes: int

    @cached_property
    def has_leftover(self) -> bool:
        """Whether there are target ids without an outcome."""
        return bool((self.outcome_of_target < 0).any())


@dataclass(frozen=True)
class Translation:
    """A vocabulary map of one source.

    Attributes:
        outcome_of_source: [Vs] int64, the outcome that each source id becomes; -1 for none.
        outcome_of_target: [Vt] int64, the outcome that each target id belongs to; -1 for none.
        outcomes: U.
        complete: whether an outcome has the same probability under both models, so that ids
            without one are themselves one outcome (numbered U), and not mass gone astray.
        glued: a finer partition for positions at which it can be used, if there is one; its
            outcomes, and one more of what is left over, are numbered from U+1.
    """

    outcome_of_source: np.ndarray
    outcome_of_target: np.ndarray
    outcomes: int
    complete: bool
    glued: Glued | None = None

    @cached_property
    def has_leftover(self) -> bool:
        """Whether there are target ids without an outcome."""
        return bool((self.outcome_of_target < 0).any())

    def number_of(self, target_id: int, finer: bool) -> int | None:
        """The outcome of a target token, of the finer partition if that is asked for and there."""
        glued = self.glued if finer else None
        found = int((glued or self).outcome_of_target[target_id])
        if glued is not None:
            return self.outcomes + 1 + (found if found >= 0 else glued.outcomes)
        # Tokens that no outcome takes are together one, where outcomes are complete.
        return found if found >= 0 else self.outcomes if self.complete else None

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, target ids): the target ids of each outcome, by its number.

        After the outcomes of a partition come the ids that have none.
        """
        offsets, ids = _members(self.outcome_of_target, self.outcomes)
        if self.glued is None:
            return offsets, ids
        more, more_ids = _members(self.glued.outcome_of_target, self.glued.outcomes)
        return np.concatenate([offsets, more[1:] + offsets[-1]]), np.concatenate([ids, more_ids])


def _members(outcome_of_target: np.ndarray, outcomes: int) -> tuple[np.ndarray, np.ndarray]:
    outcome = np.where(outcome_of_target < 0, outcomes, outcome_of_target)
    ids = np.argsort(outcome, kind="stable").astype(np.int64)
    return offsets_of(np.bincount(outcome, minlength=outcomes + 1)), ids


class FirstTokens:
    """The first token of some bytes, spelled as a continuation, by one tokenizer."""

    def __init__(self, encoder: Encoder, glued: frozenset[int] = frozenset()) -> None:
        """`glued` tokens count as one with the token after them, in `first_bytes`."""
        self._encoder, self._glued = encoder, glued
        self._known: dict[bytes, int | None] = {}
        self._known_bytes: dict[bytes, bytes | None] = {}
        vocabulary = encoder.vocabulary
        self._by_bytes: dict[bytes, int] = {}
        for id_, token in enumerate(vocabulary.token_bytes):
            other = self._by_bytes.get(token or b"")
            if token and (other is None or vocabulary.is_fallback[other]):
                self._by_bytes[token] = id_

    def look_up(self, pieces: Iterable[bytes]) -> None:
        """Find many at once; `first` then answers from memory."""
        texts: dict[bytes, str] = {}
        for piece in pieces:
            if piece in self._known or piece in texts:
                continue
            try:
                texts[piece] = piece.decode("utf-8")
            except UnicodeDecodeError:
                self._known[piece] = None
        for anchor in _ANCHORS:
            texts = self._try(anchor, texts)
        self._known.update(dict.fromkeys(texts, None))

    def _try(self, anchor: str, texts: dict[bytes, str]) -> dict[bytes, str]:
        encoded = self._encoder.encode(
            [anchor + text for text in texts.values()], [False] * len(texts)
        )
        left = {}
        for (piece, text), block in zip(texts.items(), encoded, strict=True):
            at = self._boundary(block.ends, len(anchor.encode()))
            if at is None:
                left[piece] = text
            else:
                self._known[piece] = int(block.ids[at])
                self._known_bytes[piece] = self._taken(block.ids[at : at + 2].tolist())
        return left

    def _taken(self, ids: list[int]) -> bytes:
        taken = ids if ids[0] in self._glued else ids[:1]
        return b"".join(self.bytes_of(id_) for id_ in taken)

    @staticmethod
    def _boundary(ends: np.ndarray | None, anchor_bytes: int) -> int | None:
        """Index of the first token after the anchor that reads anything."""
        if ends is None:
            return None
        after = int(np.searchsorted(ends, anchor_bytes, side="right"))
        return after if after > 0 and ends[after - 1] == anchor_bytes else None

    def first(self, piece: bytes) -> int | None:
        """Id of the first token of the bytes; None where they are no whole characters."""
        if piece not in self._known:
            self.look_up([piece])
        return self._known[piece]

    def first_bytes(self, piece: bytes) -> bytes | None:
        """Bytes of the first token, glued ones with the next; None where they are no whole text."""
        self.first(piece)
        return self._known_bytes.get(piece)

    def beginning(self, piece: bytes) -> int | None:
        """Id of the longest token whose bytes begin `piece`; for bytes that are no whole text."""
        for length in range(len(piece), 0, -1):
            if piece[:length] in self._by_bytes:
                return self._by_bytes[piece[:length]]
        return None

    def bytes_of(self, id_: int) -> bytes:
        """The bytes of a token that stands for text."""
        token = self._encoder.vocabulary.token_bytes[id_]
        assert token is not None
        return token


def same_tokenizer(source: Encoder, target: Encoder) -> bool:
    """Whether two tokenizers cut every text alike: equal tables and rules."""
    return source.rules == target.rules


def identity_translation(source: Encoder, target: Encoder) -> Translation:
    """The map between equal tokenizers: text tokens to themselves, EOS to EOS.

    The two may still differ in which token is EOS; no other special token receives mass.
    """
    text = source.vocabulary.is_text
    ids = np.where(text, np.arange(len(text)), -1)
    outcome_of_target = ids.copy()
    if target.vocabulary.eos_id is not None:
        outcome_of_target[target.vocabulary.eos_id] = target.vocabulary.eos_id
    _map_eos(source, target, ids, target.vocabulary.eos_id)
    return Translation(ids, outcome_of_target, len(ids), complete=True)


def first_translation(source: Encoder, target: Encoder) -> Translation:
    """The map `first` (DESIGN: vocabulary maps).

    EOS becomes EOS; no other special token receives mass.
    """
    if same_tokenizer(source, target):
        return identity_translation(source, target)
    firsts = FirstTokens(target)
    firsts.look_up(token for token in source.vocabulary.token_bytes if token)
    outcome_of_source = np.full(len(source.vocabulary), -1, dtype=np.int64)
    for id_, token in enumerate(source.vocabulary.token_bytes):
        if token:
            found = firsts.first(token)
            found = firsts.beginning(token) if found is None else found
            outcome_of_source[id_] = -1 if found is None else found
    _map_eos(source, target, outcome_of_source, target.vocabulary.eos_id)
    return map_translation(outcome_of_source, target)


def class_translation(source: Encoder, target: Encoder) -> Translation:
    """The common partition of two vocabularies (DESIGN: the common partition).

    From a token's bytes go to the first token that the other tokenizer spells them with, from
    there to the first token of the first tokenizer, and so on. The bytes only get shorter, so it
    ends, at a token that both have: the class. It is the same from both sides.
    """
    if same_tokenizer(source, target):
        return identity_translation(source, target)
    coarse = _partition(source, target, frozenset(), [])
    sizes = np.bincount(coarse.of_target[coarse.of_target >= 0], minlength=coarse.outcomes)
    most = len(target.vocabulary) * _LARGE_CLASS
    glued = [
        id_
        for id_, token in enumerate(source.vocabulary.token_bytes)
        if token in coarse.number and sizes[coarse.number[token]] > most
    ]
    return Translation(
        coarse.of_source,
        coarse.of_target,
        coarse.outcomes,
        True,
        _glued(source, target, glued) if glued else None,
    )


class _Partition(NamedTuple):
    of_source: np.ndarray
    of_target: np.ndarray
    of_extra: np.ndarray
    outcomes: int
    number: dict[bytes | None, int]


def _partition(
    source: Encoder, target: Encoder, glued: frozenset[int], extra: Sequence[bytes]
) -> _Partition:
    """The common partition, of some `extra` bytes too, with some tokens glued to the next."""
    of_source, of_target = FirstTokens(source, glued), FirstTokens(target)
    mine = [*source.vocabulary.token_bytes, *extra]
    ends = _class_bytes(mine, of_target, of_source)
    target_ends = _class_bytes(target.vocabulary.token_bytes, of_source, of_target)
    both = sorted({end for end in ends if end} & {end for end in target_ends if end})
    number: dict[bytes | None, int] = {end: n for n, end in enumerate(both)}
    outcomes, size = len(both), len(source.vocabulary)
    found = _numbers(ends, number)
    outcome_of_source, outcome_of_target = found[:size], _numbers(target_ends, number)
    if source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None:
        outcome_of_target[target.vocabulary.eos_id] = outcomes
        _map_eos(source, target, outcome_of_source, outcomes)
        outcomes += 1
    return _Partition(outcome_of_source, outcome_of_target, found[size:], outcomes, number)


def _glued(source: Encoder, target: Encoder, glued: Sequence[int]) -> Glued:
    """The finer partition over a source vocabulary in which some tokens take the next with them.

    At the end of a document nothing follows a token: then it is what it is alone.
    """
    tokens = source.vocabulary.token_bytes
    pairs = [(tokens[g] or b"") + (token or b"") for g in glued for token in tokens]
    found = _partition(source, target, frozenset(glued), pairs)
    of_pair = found.of_extra.reshape(len(glued), len(tokens))
    no_text = ~source.vocabulary.is_text
    if source.vocabulary.eos_id is not None:
        no_text[source.vocabulary.eos_id] = False
    of_pair[:, no_text] = -1
    row_of_source = np.full(len(tokens), -1, dtype=np.int64)
    row_of_source[glued] = np.arange(len(glued))
    return Glued(row_of_source, of_pair, found.of_source, found.of_target, found.outcomes)


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
                reached[n] = None if piece is None else firsts.first_bytes(piece)
        waiting = [n for n in waiting if reached[n] is not None and reached[n] != before[n]]
    return reached


def _numbers(ends: Sequence[bytes | None], number: dict[bytes | None, int]) -> np.ndarray:
    return np.array([-1 if end is None else number.get(end, -1) for end in ends], dtype=np.int64)


def _map_eos(
    source: Encoder, target: Encoder, outcome_of_source: np.ndarray, outcome: int | None
) -> None:
    if source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None:
        outcome_of_source[source.vocabulary.eos_id] = -1 if outcome is None else outcome


def map_translation(vocabulary_map: np.ndarray, target: Encoder) -> Translation:
    """The translation of a map [Vs] of target ids: each target id is an outcome of its own."""
    everything = np.arange(len(target.vocabulary), dtype=np.int64)
    return Translation(vocabulary_map, everything, len(everything), complete=False)
