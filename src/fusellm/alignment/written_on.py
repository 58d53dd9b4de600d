r"""What the target reads first, once a source has written on: the outcomes of a refined class.

A class of the common partition has all target tokens that begin alike: where a source spells digits
one by one and the target has numbers as tokens, the class of `2` has `2`, `20`, `201`, … . At one
position of a text the source says more than the class: after `2` it says what comes next, and so
on. So what the source may write from a position on makes a tree:

    ""  ──  2  ──  0  ──  1  ──  9       the text, spelled by the source: the *path*
            │      │      └ ` ` …        p = `201`, w = ` `: the target reads `201` first
            │      └ 5, `,` …            p = `20`, w = `5`: it reads `205` first
            └ 3, ` ` …                   p = `2`, w = `3`: `23`, or `230` to `239`

A *state* is a spelling p that some text has followed; (p, w) leaves the path by the source token w.
What the target then reads first is one token f, for which its tokenizer is asked. Where it has
tokens that the source spells p w …, it depends on what comes after w whether it reads one of these:
then it is a *stretch* of the order of ids, the smallest that has all of them and f. If `205` is no
token and `2050` is one, `20` or `2050` may be read after `205`; the order has `20` beside all that
go on with what is no token (its *front*), so that the smallest stretch does not have `201` too.
`fusellm.fusion.refine` has the masses.

Vs, Vt source and target vocabulary sizes; U outcomes of the vocabulary map.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fusellm.alignment.translation import FirstTokens, VocabularyMap, as_continuations
from fusellm.arrays.known_numbers import KnownNumbers, with_room
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.tokens.encode import Encoder

SPLIT_RULE = 2
"""Of how classes are split: what was fused by another one is made anew."""
_BYTES = 256
_MOST_STATES, _MOST_LEAVES = 100_000, 1_000_000  # 150 bytes each
_LETTER = b"a"
NOTHING = -1


class Steps(NamedTuple):
    """Pairs by which a path goes on, for compiled loops.

    Attributes:
        slots, pairs: as of `KnownNumbers`.
        state_after: the state that a path comes to; -1 where no target token goes on any further,
            so that what is read first is settled.
    """

    slots: np.ndarray
    pairs: np.ndarray
    state_after: np.ndarray


class Leaves(NamedTuple):
    """Pairs that leave a path, for compiled loops; S sets, Vs and Vt vocabularies.

    Attributes:
        slots, pairs: as of `KnownNumbers`.
        first: the target token that is read first; -1 for none.
        stretch: the set of `first` and of all tokens that are spelled so, where there are any: then
            it counts, and not `first`. -1 for none.
        asks: [states, 256] bool, whether what is read first can depend on a w that begins so.
        otherwise: [states] int64, what is read first where it cannot.
        first_byte: [Vs] int64, of each source token; -1 of those without bytes.
        starts, stops: [S] where each set is in the order of all ids, and
        rank: [Vt] where each id is.
        single: [Vt] int64, the set of each target token alone.
    """

    slots: np.ndarray
    pairs: np.ndarray
    first: np.ndarray
    stretch: np.ndarray
    asks: np.ndarray
    otherwise: np.ndarray
    first_byte: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    rank: np.ndarray
    single: np.ndarray


class WrittenOn:
    """The tree of a source and a target. It grows as texts are read.

    A pair is numbered state · Vs + source token.

    Attributes:
        sets: the map's outcomes, the set of ids that have none, and all stretches.
        shared: [U + 1] bool, whether an outcome has several target tokens.
        source_lengths, target_lengths: [Vs], [Vt] int64, bytes of each token.
        reads_past: whether paths go on behind the true next token.
    """

    def __init__(
        self, source: Encoder, target: Encoder, translation: VocabularyMap, longest: bool = False
    ) -> None:
        """The tree's root.

        Args:
            longest: what is read first is the longest token whose bytes begin the text (BPM), and
                not what the target's tokenizer says; a path ends with the true next token, and
                there are no stretches.
        """
        self._source = [token or b"" for token in source.vocabulary.token_bytes]
        self._sorted = sorted({token for token in target.vocabulary.token_bytes if token})
        self._firsts = FirstTokens(target)
        self._longest, self.reads_past = longest, not longest
        self._next_bytes: dict[bytes, np.ndarray] = {}
        self._joins: dict[bytes, np.ndarray] = {}
        spelled = {} if longest else _spelled(source, target, translation)
        self.sets, self._nodes, self._fronts, self._single = _sets_of(translation, spelled)
        self._rank = np.argsort(self.sets.ids)
        outcome = translation.outcome_of_target
        self._outcome = np.where(outcome < 0, translation.outcomes, outcome)
        sizes = (self.sets.stops - self.sets.starts)[: translation.outcomes + 1]
        self.shared = sizes > 1
        self._classless = translation.outcomes
        self.shared[self._classless] = False
        self.source_lengths = np.array([len(token) for token in self._source], dtype=np.int64)
        self.target_lengths = target.vocabulary.lengths
        self._first_byte = np.array([token[0] if token else NOTHING for token in self._source])
        self._clear()

    def _clear(self) -> None:
        self._steps, self._leaves = KnownNumbers(), KnownNumbers()
        self._state_after, self._first_id, self._stretch, self._otherwise = (
            np.zeros(0, dtype=np.int64) for _ in range(4)
        )
        self._asked = np.zeros((0, _BYTES), dtype=np.bool_)
        self._spellings: list[tuple[int, ...]] = []
        self._texts: list[bytes] = []
        self._next_bytes.clear()
        self._joins.clear()
        self._firsts.forget()
        self._add_states([()])

    @property
    def steps(self) -> Steps:
        """The steps that are known."""
        return Steps(self._steps.slots, self._steps.numbers, self._state_after)

    @property
    def leaves(self) -> Leaves:
        """The leaves that are known."""
        return Leaves(
            self._leaves.slots,
            self._leaves.numbers,
            self._first_id,
            self._stretch,
            self._asked,
            self._otherwise,
            self._first_byte,
            self.sets.starts,
            self.sets.stops,
            self._rank,
            self._single,
        )

    def make_room(self) -> None:
        """Forget what was asked, once it is much. The numbers of states end with it."""
        if len(self._spellings) > _MOST_STATES or len(self._leaves) > _MOST_LEAVES:
            self._clear()

    def ask(self, pairs: np.ndarray) -> None:
        """Learn leaves that are not known, each once."""
        asked = self._told_apart(pairs)
        begin = len(self._leaves)
        self._leaves.add(pairs)
        end = len(self._leaves)
        self._first_id = with_room(self._first_id, end)
        self._stretch = with_room(self._stretch, end)
        texts = [self._texts[state] + self._source[w] for state, w in asked]
        at_end = self._first(texts)
        further = self._first_before_a_letter(texts, at_end)
        for n, (state, w) in enumerate(asked):
            both = int(at_end[n]), int(further[n])
            stretch = self._undecided((*self._spellings[state], w), both)
            # Two readings without a set in common: nearly every text goes on. A first piece keeps
            # to its class, which was made by the reading at the end.
            goes_on = stretch == NOTHING and state > 0
            self._first_id[begin + n] = both[1] if goes_on else both[0]
            self._stretch[begin + n] = stretch

    def _first_before_a_letter(self, texts: Sequence[bytes], at_end: np.ndarray) -> np.ndarray:
        """[texts] what is read first where a text goes on; of most as `at_end`.

        White space is read otherwise at the end of a text: two line ends as one token, which before
        a letter are two, by GPT-2's rule. Where the letter joins the whole text it says nothing.
        """
        spaced = [n for n, t in enumerate(texts) if t[-1:].isspace() and not self._longest]
        further = at_end.copy()
        if spaced:
            ids = self._first([texts[n] + _LETTER for n in spaced])
            for n, id_ in zip(spaced, ids.tolist(), strict=True):
                if id_ != NOTHING and self.target_lengths[id_] <= len(texts[n]):
                    further[n] = id_
        return further

    def _undecided(self, spelling: tuple[int, ...], firsts: tuple[int, int]) -> int:
        """The smallest set of all tokens that are spelled so and on, and of `firsts`.

        Those are read of the text so spelled, if nothing follows that makes it one of the others.
        -1 where it is one token, or they are of several classes.
        """
        stretch = self._nodes.get(spelling, NOTHING)
        if NOTHING in firsts or (stretch == NOTHING and firsts[0] == firsts[1]):
            return stretch
        ranks = [self._rank[id_] for id_ in firsts]
        if stretch != NOTHING:
            ranks += [self.sets.starts[stretch], self.sets.stops[stretch] - 1]
        # From the longest beginning to the shortest, and of each its front, which is a part of all
        # that begins so: the first set that has all is the smallest.
        above = [spelling[:n] for n in range(len(spelling), 0, -1)]
        wider = (table.get(some) for some in above for table in (self._fronts, self._nodes))
        whole = int(self._outcome[firsts[0]])
        for chosen in (*wider, whole):
            # What has no class is told by `fusion.refine`: it may be in no outcome.
            if chosen is not None and chosen != self._classless and self._has_all(chosen, ranks):
                return chosen
        return NOTHING

    def _has_all(self, chosen: int, ranks: Iterable[int]) -> bool:
        start, stop = self.sets.starts[chosen], self.sets.stops[chosen]
        return all(start <= rank < stop for rank in ranks)

    def follow(self, pairs: np.ndarray) -> None:
        """Learn steps that are not known, each once."""
        begin = len(self._steps)
        self._steps.add(pairs)
        self._state_after = with_room(self._state_after, len(self._steps))
        new: list[tuple[int, ...]] = []
        for n, (state, token) in enumerate(self._told_apart(pairs)):
            goes_on = self._goes_on(self._texts[state] + self._source[token])
            self._state_after[begin + n] = len(self._texts) + len(new) if goes_on else NOTHING
            if goes_on:
                new.append((*self._spellings[state], token))
        self._add_states(new)

    def _told_apart(self, pairs: np.ndarray) -> list[tuple[int, int]]:
        states, tokens = np.divmod(pairs, len(self._source))
        return list(zip(states.tolist(), tokens.tolist(), strict=True))

    def _add_states(self, spellings: Sequence[tuple[int, ...]]) -> None:
        texts = [b"".join(self._source[token] for token in spelling) for spelling in spellings]
        begin = len(self._texts)
        self._spellings += spellings
        self._texts += texts
        end = len(self._texts)
        self._asked = with_room(self._asked, end)
        self._otherwise = with_room(self._otherwise, end)
        self._otherwise[begin:end] = self._first(texts)
        for n, text in enumerate(texts, begin):
            self._asked[n] = self._asks(text)

    def _first(self, texts: Sequence[bytes]) -> np.ndarray:
        """[texts] the target's first token of each; -1 where no token begins so.

        Of bytes that end within a character, that of the whole characters.
        """
        whole = [b"" if self._longest else _whole_characters(text) for text in texts]
        self._firsts.look_up(text for text in whole if text)
        first = np.full(len(texts), NOTHING, dtype=np.int64)
        for n, (text, characters) in enumerate(zip(texts, whole, strict=True)):
            id_ = self._firsts.first(characters) if characters else None
            id_ = self._firsts.beginning(text) if id_ is None else id_
            first[n] = NOTHING if id_ is None else id_
        return first

    def _asks(self, text: bytes) -> np.ndarray:
        """[256] bool: with which next byte a token may join what stands before it.

        White space at the end may be read otherwise whatever follows.
        """
        if self._longest and text:
            return self._begins(text)
        if not text or text[-1:].isspace():
            return np.ones(_BYTES, dtype=np.bool_)
        if text not in self._joins:
            mask = self._begins(text)
            self._joins[text] = mask | self._asks(text[1:]) if len(text) > 1 else mask
        return self._joins[text]

    def _goes_on(self, text: bytes) -> bool:
        """Whether a token of the target begins with a text, and is longer."""
        at = bisect_left(self._sorted, text + b"\x00")
        return at < len(self._sorted) and self._sorted[at].startswith(text)

    def _begins(self, text: bytes) -> np.ndarray:
        """[256] bool: the bytes with which target tokens go on that begin with a text."""
        if text not in self._next_bytes:
            mask = np.zeros(_BYTES, dtype=np.bool_)
            at = bisect_left(self._sorted, text + b"\x00")
            while at < len(self._sorted) and self._sorted[at].startswith(text):
                byte = self._sorted[at][len(text)]
                mask[byte] = True
                after = text + bytes([byte + 1]) if byte + 1 < _BYTES else None
                at = len(self._sorted) if after is None else bisect_left(self._sorted, after, at)
            self._next_bytes[text] = mask
        return self._next_bytes[text]


def _whole_characters(text: bytes) -> bytes:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


def _spelled(
    source: Encoder, target: Encoder, translation: VocabularyMap
) -> dict[int, tuple[int, ...]]:
    """How the source spells the target tokens that share their class, as ids."""
    outcome = translation.outcome_of_target
    sizes = np.bincount(outcome[outcome >= 0], minlength=translation.outcomes)
    ids = np.nonzero((outcome >= 0) & (sizes[outcome] > 1))[0].tolist()
    known = target.vocabulary.token_bytes
    pieces = {id_: piece for id_ in ids if (piece := known[id_])}
    told = as_continuations(source, set(pieces.values()))
    by_id = ((id_, told[piece]) for id_, piece in pieces.items())
    return {id_: tuple(one.ids) for id_, one in by_id if one is not None}


def _sets_of(
    translation: VocabularyMap, spelled: dict[int, tuple[int, ...]]
) -> tuple[OutcomeSets, dict[tuple[int, ...], int], dict[tuple[int, ...], int], np.ndarray]:
    """(all sets, the set of each spelling's tokens, its front, the set of each token alone).

    Within a class ids stand in the order of their spellings, so that those that are spelled alike
    up to some token stand side by side. Behind a token come first those that go on with what is no
    token with it: behind `20`, if `205` is none, `2050` to `2059`, and then `201`. They are its
    *front*: after `205` it is open whether `20` is read or one of these, and never `201`.
    """
    outcome = np.where(
        translation.outcome_of_target < 0, translation.outcomes, translation.outcome_of_target
    )
    tokens = set(spelled.values())

    def key(id_: int) -> tuple[int, list[tuple[bool, int]], int]:
        own = spelled.get(id_, ())
        return outcome[id_], [(own[: n + 1] in tokens, piece) for n, piece in enumerate(own)], id_

    order = sorted(range(len(outcome)), key=key)
    stops = np.cumsum(np.bincount(outcome, minlength=translation.outcomes + 1))
    starts = stops - np.bincount(outcome, minlength=translation.outcomes + 1)
    whole = zip(starts.tolist(), stops.tolist(), strict=True)
    numbers = {stretch: n for n, stretch in enumerate(whole) if stretch[0] < stretch[1]}
    count = len(starts)
    stretches: list[tuple[int, int]] = []
    nodes: dict[tuple[int, ...], tuple[int, int]] = {}
    fronts: dict[tuple[int, ...], tuple[int, int]] = {}
    single = outcome.copy()
    for place, id_ in enumerate(order):
        spelling = spelled.get(id_, ())
        for length in range(1, len(spelling) + 1):
            some, goes_on = spelling[:length], spelling[: length + 1]
            nodes[some] = nodes.get(some, (place,))[0], place + 1
            if some in tokens and (goes_on == some or goes_on not in tokens):
                fronts[some] = fronts.get(some, (place,))[0], place + 1
    alone = [(place, place + 1) for place, id_ in enumerate(order) if id_ in spelled]
    for stretch in [*nodes.values(), *fronts.values(), *alone]:
        if stretch not in numbers:
            numbers[stretch] = count + len(stretches)
            stretches.append(stretch)
    for start, stop in alone:
        single[order[start]] = numbers[start, stop]
    more = np.array(stretches, dtype=np.int64).reshape(-1, 2)
    sets = OutcomeSets(
        np.concatenate([starts, more[:, 0]]),
        np.concatenate([stops, more[:, 1]]),
        np.array(order, dtype=np.int64),
    )
    of_nodes, of_fronts = (
        {spelling: numbers[stretch] for spelling, stretch in table.items()}
        for table in (nodes, fronts)
    )
    return sets, of_nodes, of_fronts, single
