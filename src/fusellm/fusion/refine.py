r"""A class split along the text: what a source says further on, put on single target tokens.

At a target position let u be the true next token and v1 v2 v3 … the source's tokens from there on.
The source's distribution q1 at the position gives the class of u a mass. Inside the class,

    a token w of the source that is not v1 says        q1(w)
    going on with v1 … v(k−1) and then w, not vk       q1(v1) q2(v2) … q(k−1)(v(k−1)) qk(w)
    going on with all of v1 … vn                       q1(v1) q2(v2) … qn(vn)

where qk is the source's distribution after v1 … v(k−1), as it stands in its store. Each is a text
that begins so, and goes to what the target would read of it first
(`fusellm.alignment.written_on`); the last one to u, which is what the target reads of this text.
The path ends where no token of the target goes on any further. If the block ends before, it is open
whether u is read or a longer token, and the two are one outcome. All other classes stay as they
are. If v1 is of another class than u (*crossed*, *beyond*), both classes are split: that the target
reads u is known of this text.

qk(vk) is the probability that is stored with the text, exact. The others share what it leaves in
proportion to what was kept of them and of the tail, whose share is in no outcome. Of draws that is
nearly right on average, since those that are not vk are draws from the rest. Only where all of n
draws are vk nothing is known of what leaves, less than 1/n as a rule: it stays with u. So over the
texts that a source writes the outcomes get what it says of them.

Example. q1 gives `2` 0.5 and a space 0.5; after `2`, `0` 0.8 and `3` 0.2; after `20`, `1` 0.25, `,`
0.75. The text is `201`, one token of a target with all numbers of three digits. `201` gets 0.5 ·
0.8 · 0.25 = 0.1, `20` 0.5 · 0.8 · 0.75 = 0.3, the stretch `23`, `230` … `239` 0.5 · 0.2 = 0.1, and
the class of the space 0.5.

R positions that are refined; K entries of the source's distributions; S sets.
"""

from typing import NamedTuple

import numpy as np

from fusellm.alignment.translation import VocabularyMap
from fusellm.alignment.written_on import Leaves, Steps, WrittenOn
from fusellm.arrays.distributions import Distributions
from fusellm.arrays.known_numbers import place_of
from fusellm.arrays.tokens import Tokens
from fusellm.compiled import compiled
from fusellm.fusion.carry import Carried

_MOST_PIECES = 16
"""Of a path. What the target reads in one token is seldom more to a source."""


class TextPaths(NamedTuple):
    """How a source spells the text from some target positions on.

    Attributes:
        rows: [R] the position's row in the source's distributions.
        true_ids: [R] the true next token of the target.
        begins: [R] the source's true next token, by its place in the source's tokens.
        ends: [R] where the tokens of its block end.
    """

    rows: np.ndarray
    true_ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def take(self, which: np.ndarray) -> "TextPaths":
        """Some of the positions."""
        return TextPaths(*(column[which] for column in self))


class _Walked(NamedTuple):
    """Paths, and what is asked along them.

    Attributes:
        rows, begins, true_ids: as of `TextPaths`.
        classes: [R, 2] the outcomes that are split: that of the true next token, and that of the
            source's own.
        states: [R, pieces] the state after each number of tokens.
        levels: [R] at how many of them something is asked.
        is_open: [R] bool, whether the path breaks off: tokens of the target go on further.
        tokens: of the source, all.
    """

    rows: np.ndarray
    begins: np.ndarray
    true_ids: np.ndarray
    classes: np.ndarray
    states: np.ndarray
    levels: np.ndarray
    is_open: np.ndarray
    tokens: np.ndarray


class _Entries(NamedTuple):
    """Kept tokens of distributions, as of `Distributions`, of one type each."""

    offsets: np.ndarray
    ids: np.ndarray
    masses: np.ndarray
    tail: np.ndarray

    @classmethod
    def of(cls, given: Distributions) -> "_Entries":
        ids = given.ids.astype(np.int64, copy=False)
        return cls(given.offsets, ids, given.masses, given.tail.astype(np.float64, copy=False))


class _Map(NamedTuple):
    """A vocabulary map.

    Attributes:
        of_source, of_target: the outcome of each token.
        leftover: of source tokens without one; -1 for none.
        without: of target tokens without one.
    """

    of_source: np.ndarray
    of_target: np.ndarray
    leftover: int
    without: int


class _Gathered(NamedTuple):
    """Masses by sets, position after position.

    Attributes:
        seen_by: [S] the last position that has the set, and
        place_of: [S] its place in `sets`. Nothing has to be cleared from position to position.
        sets, masses: what is gathered.
        stretches: those of one position.
        first, waiting: its single tokens, and their masses, until all its stretches are known: a
            token may be in one of them.
    """

    seen_by: np.ndarray
    place_of: np.ndarray
    sets: np.ndarray
    masses: np.ndarray
    stretches: np.ndarray
    first: np.ndarray
    waiting: np.ndarray


# Compiled loops rely on: tokens below the vocabulary's size, rows and begins that are places, and
# offsets that ascend to the entries' number. A store's layout and the aligner hold these.


@compiled()
def _states(
    paths: TextPaths,
    tokens: np.ndarray,
    lengths: np.ndarray,
    target_lengths: np.ndarray,
    reads_past: bool,
    steps: Steps,
    states: np.ndarray,
    levels: np.ndarray,
    is_open: np.ndarray,
    wanted: np.ndarray,
) -> int:
    # wanted: steps that are not known yet; a path that comes to one waits for the next call.
    # is_open: until what ends a path is found, a text's end (a token without bytes) or a state.
    count = 0
    for r in range(len(paths.begins)):
        state, k, read = 0, 0, 0
        is_open[r] = reads_past
        while k + 1 < states.shape[1] and paths.begins[r] + k < paths.ends[r]:
            states[r, k] = state
            k += 1
            token = tokens[paths.begins[r] + k - 1]
            read += lengths[token]
            if lengths[token] == 0:
                is_open[r] = False
                break
            if not reads_past and read >= target_lengths[paths.true_ids[r]]:
                break
            pair = state * len(lengths) + token
            place = place_of(steps.slots, steps.pairs, pair)
            if place < 0:
                wanted[count] = pair
                count += 1
                break
            state = steps.state_after[place]
            if state < 0:
                is_open[r] = False
                break
        levels[r] = k
    return count


@compiled()
def _is_split(outcome: int, classes: np.ndarray) -> bool:
    return bool(outcome >= 0 and (outcome == classes[0] or outcome == classes[1]))


@compiled()
def _last_step(walked: _Walked, r: int) -> tuple[int, int]:
    # (the last state of a path, the token after it)
    k = walked.levels[r] - 1
    return walked.states[r, k], walked.tokens[walked.begins[r] + k]


@compiled()
def _unknown(
    walked: _Walked,
    of_source: np.ndarray,
    given: _Entries,
    stored: _Entries,
    leaves: Leaves,
    wanted: np.ndarray,
) -> int:
    # wanted: leaves that are not known yet, some of them often.
    count, vocabulary = 0, len(leaves.first_byte)
    for r in range(len(walked.rows)):
        if walked.is_open[r]:
            state, path = _last_step(walked, r)
            pair = state * vocabulary + path
            if leaves.asks[state, leaves.first_byte[path]] and (
                place_of(leaves.slots, leaves.pairs, pair) < 0
            ):
                wanted[count] = pair
                count += 1
        for k in range(walked.levels[r]):
            state, path = walked.states[r, k], walked.tokens[walked.begins[r] + k]
            entries = given if k == 0 else stored
            for entry in range(*_row(entries, walked.rows[r] + k)):
                w = entries.ids[entry]
                byte = leaves.first_byte[w]
                if w == path or byte < 0 or not leaves.asks[state, byte]:
                    continue
                if k > 0 or _is_split(of_source[w], walked.classes[r]):
                    pair = state * vocabulary + w
                    if place_of(leaves.slots, leaves.pairs, pair) < 0:
                        wanted[count] = pair
                        count += 1
    return count


@compiled()
def _row(entries: _Entries, row: int) -> tuple[int, int]:
    return entries.offsets[row], entries.offsets[row + 1]


@compiled()
def _add(out: _Gathered, r: int, chosen: int, mass: float, used: int) -> int:
    # (how many are gathered now)
    if out.seen_by[chosen] != r:
        out.seen_by[chosen], out.place_of[chosen] = r, used
        out.sets[used], out.masses[used] = chosen, 0.0
        used += 1
    out.masses[out.place_of[chosen]] += mass
    return used


@compiled()
def _add_stretch(
    out: _Gathered, r: int, chosen: int, mass: float, used: int, open_: int
) -> tuple[int, int]:
    # (how many sets are gathered now, how many of them are stretches)
    now = _add(out, r, chosen, mass, used)
    if now > used:
        out.stretches[open_] = chosen
        open_ += 1
    return now, open_


@compiled()
def _leave(leaves: Leaves, state: int, w: int) -> tuple[int, int]:
    # (the token that is read first, the stretch): one of them is -1, or both. Where there is a
    # stretch, that token is in it.
    byte = leaves.first_byte[w]
    if byte < 0 or not leaves.asks[state, byte]:
        return leaves.otherwise[state], -1
    place = place_of(leaves.slots, leaves.pairs, state * len(leaves.first_byte) + w)
    if leaves.stretch[place] >= 0:
        return -1, leaves.stretch[place]
    return leaves.first[place], -1


@compiled()
def _left_open(walked: _Walked, leaves: Leaves, r: int) -> int:
    # The stretch of what may be read where a path breaks off; -1 where it is the true next token.
    if not walked.is_open[r]:
        return -1
    _, stretch = _leave(leaves, *_last_step(walked, r))
    rank = leaves.rank[walked.true_ids[r]]
    if stretch >= 0 and leaves.starts[stretch] <= rank < leaves.stops[stretch]:
        return stretch
    return -1


@compiled()
def _widest(leaves: Leaves, stretches: np.ndarray, start: int, stop: int, own: int) -> int:
    # The largest of some stretches that has all ranks from start to stop; `own` where none has. Two
    # stretches overlap only where one is a part of the other.
    for other in stretches:
        is_larger = (
            leaves.stops[other] - leaves.starts[other] > leaves.stops[own] - leaves.starts[own]
        )
        if is_larger and leaves.starts[other] <= start and stop <= leaves.stops[other]:
            own = other
    return own


@compiled()
def _join(leaves: Leaves, out: _Gathered, begin: int, used: int, open_: int) -> int:
    # A stretch within another one of the position is a part of it. How many sets are left.
    stretches, joined = out.stretches[:open_], False
    for inner in stretches:
        outer = _widest(leaves, stretches, leaves.starts[inner], leaves.stops[inner], inner)
        if outer != inner:
            place = out.place_of[inner]
            out.masses[out.place_of[outer]] += out.masses[place]
            out.sets[place], joined = -1, True
    if not joined:
        return used
    kept = begin
    for n in range(begin, used):
        if out.sets[n] >= 0:
            out.sets[kept], out.masses[kept] = out.sets[n], out.masses[n]
            out.place_of[out.sets[kept]] = kept
            kept += 1
    return kept


@compiled()
def _settle(
    leaves: Leaves,
    map_: _Map,
    classes: np.ndarray,
    out: _Gathered,
    r: int,
    used: int,
    open_: int,
    count: int,
    rest: np.ndarray,
) -> int:
    # Single tokens go to their sets, once all stretches of the position are known.
    for n in range(count):
        if out.waiting[n] <= 0.0:
            continue
        token = out.first[n]
        chosen = map_.of_target[token]
        if chosen < 0 and map_.leftover < 0:  # what the source has without a class is there too
            rest[r] += out.waiting[n]
            continue
        if chosen < 0:
            chosen = map_.without
        if chosen == classes[0] or chosen == classes[1]:
            rank, alone = leaves.rank[token], leaves.single[token]
            chosen = _widest(leaves, out.stretches[:open_], rank, rank + 1, alone)
        used = _add(out, r, chosen, out.waiting[n], used)
    return used


@compiled()
def _beside(stored: _Entries, row: int, path: int, probability: float) -> tuple[float, float]:
    # (mass of the other tokens that are kept, mass of those that are not): not of the path's.
    others, tail, is_kept = 0.0, stored.tail[row], False
    for entry in range(*_row(stored, row)):
        if stored.ids[entry] == path:
            is_kept = True
        else:
            others += stored.masses[entry]
    return others, tail if is_kept else max(tail - probability, 0.0)


@compiled()
def _split(
    walked: _Walked,
    given: _Entries,
    stored: _Entries,
    true_log_prob: np.ndarray,
    map_: _Map,
    leaves: Leaves,
    out: _Gathered,
    lengths: np.ndarray,
    rest: np.ndarray,
) -> int:
    # Every leaf is known. `stays` is what goes on with the first k tokens of the path, `share` what
    # leaves it after them, over what is known of where it goes.
    used = 0
    for r in range(len(walked.rows)):
        row, classes, begin, stays = walked.rows[r], walked.classes[r], used, 0.0
        open_, count = 0, 0  # stretches, single tokens
        for k in range(walked.levels[r]):
            path = walked.tokens[walked.begins[r] + k]
            entries, share = given, 1.0
            if k > 0:
                entries, goes_on = stored, min(np.exp(true_log_prob[row + k]), 1.0)
                others, tail = _beside(stored, row + k, path, goes_on)
                if others + tail <= 0.0 or stays <= 0.0 or goes_on >= 1.0:
                    continue  # all of n draws are the path's: what leaves is not known, and stays
                share = stays * (1.0 - goes_on) / (others + tail)
                rest[r] += share * tail
                stays *= goes_on
            for entry in range(*_row(entries, row + k)):
                w, mass = entries.ids[entry], entries.masses[entry] * share
                token, chosen = -1, -1
                if w == path:
                    stays += mass if k == 0 else 0.0
                    continue
                left = k > 0 or _is_split(map_.of_source[w], classes)
                if left:
                    token, chosen = _leave(leaves, walked.states[r, k], w)
                else:
                    chosen = map_.of_source[w]
                    chosen = map_.leftover if chosen < 0 else chosen
                if chosen >= 0 and left:
                    used, open_ = _add_stretch(out, r, chosen, mass, used, open_)
                elif chosen >= 0:
                    used = _add(out, r, chosen, mass, used)
                elif token < 0:
                    rest[r] += mass
                elif count > 0 and out.first[count - 1] == token:
                    out.waiting[count - 1] += mass
                else:
                    out.first[count], out.waiting[count] = token, mass
                    count += 1
        chosen = _left_open(walked, leaves, r)
        if chosen >= 0 and stays > 0.0:
            used, open_ = _add_stretch(out, r, chosen, stays, used, open_)
            stays = 0.0
        out.first[count], out.waiting[count] = walked.true_ids[r], stays
        used = _join(leaves, out, begin, used, open_)
        used = _settle(leaves, map_, classes, out, r, used, open_, count + 1, rest)
        lengths[r] = used - begin
    return used


@compiled()
def _count(walked: _Walked, given: _Entries, stored: _Entries) -> tuple[int, int]:
    # (entries that are looked at in all, most of one position)
    whole, most = 0, 0
    for r in range(len(walked.rows)):
        row = walked.rows[r]
        count = 1 + given.offsets[row + 1] - given.offsets[row]  # 1: where the path breaks off
        if walked.levels[r] > 1:
            count += stored.offsets[row + walked.levels[r]] - stored.offsets[row + 1]
        whole, most = whole + count, max(most, count)
    return whole, most


def paths_of(
    target: Tokens, tokens: Tokens, rows: np.ndarray, positions: np.ndarray, block: np.ndarray
) -> TextPaths:
    """The text from some positions on, as a source spells it.

    Args:
        rows: [R] of the source's distributions at them.
        positions: [R] of the target, and `block` [R] of each.
    """
    true_ids = target.ids[target.predicting[positions] + 1]
    return TextPaths(rows, true_ids, tokens.predicting[rows] + 1, tokens.offsets[block + 1])


def _classes(paths: TextPaths, tokens: Tokens, map_: VocabularyMap) -> np.ndarray:
    of_target = map_.outcome_of_target[paths.true_ids]
    of_source = map_.outcome_of_source[tokens.ids[paths.begins]]
    return np.stack([of_target, np.where(of_source < 0, of_target, of_source)], axis=1)


def is_split(paths: TextPaths, tokens: Tokens, map_: VocabularyMap, tree: WrittenOn) -> np.ndarray:
    """[R] bool, whether there is anything to split at a position.

    There is not where the class of the text is one token of the target, and the source's next
    token is of it too.
    """
    classes = _classes(paths, tokens, map_)
    shared = tree.shared[classes[:, 0]] | (classes[:, 0] != classes[:, 1])
    return np.asarray(shared & (classes[:, 0] >= 0))


def _walk(paths: TextPaths, tokens: Tokens, map_: VocabularyMap, tree: WrittenOn) -> _Walked:
    states = np.zeros((len(paths.rows), _MOST_PIECES), dtype=np.int32)
    levels, wanted = (np.zeros(len(paths.rows), dtype=np.int64) for _ in range(2))
    is_open = np.zeros(len(paths.rows), dtype=np.bool_)
    arrays = states, levels, is_open, wanted
    lengths = tree.source_lengths, tree.target_lengths, tree.reads_past
    while count := _states(paths, tokens.ids, *lengths, tree.steps, *arrays):
        tree.follow(np.unique(wanted[:count]))
    classes, where = _classes(paths, tokens, map_), (paths.rows, paths.begins, paths.true_ids)
    return _Walked(*where, classes, states, levels, is_open, tokens.ids)


def refine(
    paths: TextPaths,
    tokens: Tokens,
    given: Distributions,
    stored: Distributions,
    true_log_prob: np.ndarray,
    map_: VocabularyMap,
    tree: WrittenOn,
) -> Carried:
    """The distributions at some positions over the tree's sets, the class of the text split.

    Args:
        paths: the positions.
        tokens: of the source, with its distributions `stored` and the log-probability of each
            next token.
        given: its distributions at the positions: healed, or the same.
    """
    tree.make_room()
    walked = _walk(paths, tokens, map_, tree)
    at_first, further = _Entries.of(given), _Entries.of(stored)
    whole, most = _count(walked, at_first, further)
    wanted = np.zeros(whole, dtype=np.int64)
    count = _unknown(walked, map_.outcome_of_source, at_first, further, tree.leaves, wanted)
    tree.ask(np.unique(wanted[:count]))
    leftover = given.sampled and map_.complete and map_.has_leftover
    positions = len(paths.rows)
    out = _Gathered(
        np.full(len(tree.sets), -1, dtype=np.int64),
        np.zeros(len(tree.sets), dtype=np.int64),
        np.zeros(whole + positions, dtype=np.int64),
        np.zeros(whole + positions),
        np.zeros(most, dtype=np.int64),
        np.zeros(most + 1, dtype=np.int64),
        np.zeros(most + 1),
    )
    lengths, rest = np.zeros(positions, dtype=np.int64), given.tail[paths.rows]
    used = _split(
        walked,
        at_first,
        further,
        true_log_prob.astype(np.float64),
        _Map(
            map_.outcome_of_source,
            map_.outcome_of_target,
            map_.outcomes if leftover else -1,
            map_.outcomes,
        ),
        tree.leaves,
        out,
        lengths,
        rest,
    )
    return Carried(lengths, out.sets[:used], out.masses[:used], rest)
