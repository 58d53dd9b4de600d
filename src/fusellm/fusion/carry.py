"""Kept distributions carried through a vocabulary map: sparse in, sparse out.

N source positions; R parts, each one source's distribution at one target position; M outcomes in
all; U outcomes of a translation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from fusellm.align.ragged import offsets_of, take_rows
from fusellm.align.translation import Translation
from fusellm.fusion.kept import Kept


@dataclass(frozen=True)
class Carried:
    """Distributions over outcomes.

    Attributes:
        lengths: [R] outcomes of each part.
        outcomes: [M] int64.
        masses: [M] float64.
        rest: [R] float64, mass in none of them.
    """

    lengths: np.ndarray
    outcomes: np.ndarray
    masses: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class Losses:
    """What the map does to the distributions at some positions.

    Attributes:
        kept: [N] mass that the source kept.
        carried: [N] mass of what of it has an outcome.
        met: [N] entries whose outcome another entry of the position has too.
    """

    kept: np.ndarray
    carried: np.ndarray
    met: np.ndarray


class _Entries(NamedTuple):
    """Kept entries of all positions, as the kernels take them."""

    offsets: np.ndarray
    ids: np.ndarray
    mass: np.ndarray
    tail: np.ndarray


class _Out(NamedTuple):
    """Where a kernel writes: `Carried`, and which row has been at an outcome last, and where."""

    lengths: np.ndarray
    outcomes: np.ndarray
    masses: np.ndarray
    rest: np.ndarray
    seen_by: np.ndarray
    place_of: np.ndarray


@numba.njit(cache=True)
def _put(outcome: int, mass: float, first_only: bool, r: int, used: int, out: _Out) -> int:
    if outcome < 0:
        out.rest[r] += mass
    elif out.seen_by[outcome] != r:
        out.seen_by[outcome], out.place_of[outcome] = r, used
        out.outcomes[used], out.masses[used] = outcome, mass
        return used + 1
    elif first_only:
        out.rest[r] += mass
    else:
        out.masses[out.place_of[outcome]] += mass
    return used


@numba.njit(cache=True)
def _carry(
    rows: np.ndarray,
    entries: _Entries,
    outcome_of_source: np.ndarray,
    leftover: int,
    first_only: bool,
    out: _Out,
) -> int:
    used = 0
    for r in range(len(rows)):
        row, begin = rows[r], used
        out.rest[r] = entries.tail[row]
        for n in range(entries.offsets[row], entries.offsets[row + 1]):
            outcome = outcome_of_source[entries.ids[n]]
            outcome = leftover if outcome < 0 else outcome
            used = _put(outcome, entries.mass[n], first_only, r, used, out)
        out.lengths[r] = used - begin
    return used


@numba.njit(cache=True)
def _carry_glued(
    rows: np.ndarray,
    entries: _Entries,
    row_of_source: np.ndarray,
    outcome_of_pair: np.ndarray,
    outcome_of_source: np.ndarray,
    leftover: int,
    out: _Out,
) -> int:
    used = 0
    for r in range(len(rows)):
        row, begin = rows[r], used
        out.rest[r] = entries.tail[row]
        for n in range(entries.offsets[row], entries.offsets[row + 1]):
            pair = row_of_source[entries.ids[n]]
            if pair < 0:
                outcome = outcome_of_source[entries.ids[n]]
                outcome = leftover if outcome < 0 else outcome
                used = _put(outcome, entries.mass[n], False, r, used, out)
                continue
            out.rest[r] += entries.mass[n] * entries.tail[row + 1]
            for m in range(entries.offsets[row + 1], entries.offsets[row + 2]):
                outcome = outcome_of_pair[pair, entries.ids[m]]
                outcome = leftover if outcome < 0 else outcome
                mass = entries.mass[n] * entries.mass[m]
                used = _put(outcome, mass, False, r, used, out)
        out.lengths[r] = used - begin
    return used


@numba.njit(cache=True)
def _may_glue(
    rows: np.ndarray,
    true_next: np.ndarray,
    entries: _Entries,
    row_of_source: np.ndarray,
    may: np.ndarray,
    bound: np.ndarray,
) -> None:
    for r in range(len(rows)):
        row = rows[r]
        kept = entries.offsets[row + 1] - entries.offsets[row]
        may[r], bound[r] = True, kept
        for n in range(entries.offsets[row], entries.offsets[row + 1]):
            if row_of_source[entries.ids[n]] < 0:
                continue
            if entries.ids[n] != true_next[r]:
                may[r] = False
            else:
                bound[r] += entries.offsets[row + 2] - entries.offsets[row + 1]


def carry(
    kept: Kept,
    masses: np.ndarray,
    rows: np.ndarray,
    true_next: np.ndarray,
    translation: Translation,
    first_only: bool = False,
) -> Carried:
    """The distributions at `rows`, over the translation's outcomes.

    Mass of ids that meet in an outcome is added. Mass without an outcome joins the rest, but for
    draws where the outcomes have the same probability under both models: what no outcome takes is
    then one more outcome, numbered U.

    Where the translation glues tokens to the next one, and of these only the true next token is
    kept at a row, its mass is split by the distribution of the row after it, and the row is over
    the finer partition.

    Args:
        masses: [K] `kept.masses()`.
        rows: [R] positions of `kept`, as often as wanted.
        true_next: [R] the source's true next token at each; -1 where the row after it is none of
            the same block.
        first_only: of ids that meet only the first keeps its mass (the authors' rule).
    """
    entries = _Entries(kept.offsets, kept.ids, masses, kept.tail)
    leftover = kept.sampled and translation.complete
    bound = np.diff(kept.offsets)[rows]
    fine = np.zeros(len(rows), dtype=np.bool_)
    glued = translation.glued
    if glued is not None:
        _may_glue(rows, true_next, entries, glued.row_of_source, fine, bound)
    coarse = _out(bound[~fine], translation.outcomes + 1)
    used = _carry(
        rows[~fine],
        entries,
        translation.outcome_of_source,
        translation.outcomes if leftover and translation.has_leftover else -1,
        first_only,
        coarse,
    )
    found = Carried(coarse.lengths, coarse.outcomes[:used], coarse.masses[:used], coarse.rest)
    if glued is None:
        return found
    finer = _out(bound[fine], glued.outcomes + 1)
    used = _carry_glued(
        rows[fine],
        entries,
        glued.row_of_source,
        glued.outcome_of_pair,
        glued.outcome_of_source,
        glued.outcomes if leftover and glued.has_leftover else -1,
        finer,
    )
    finer_outcomes = finer.outcomes[:used] + translation.outcomes + 1
    more = Carried(finer.lengths, finer_outcomes, finer.masses[:used], finer.rest)
    return interleave(len(rows), [(np.nonzero(~fine)[0], found), (np.nonzero(fine)[0], more)])


def _out(bound: np.ndarray, outcomes: int) -> _Out:
    rows, most = len(bound), int(bound.sum())
    return _Out(
        np.zeros(rows, dtype=np.int64),
        np.zeros(most, dtype=np.int64),
        np.zeros(most),
        np.zeros(rows),
        np.full(outcomes, -1, dtype=np.int64),
        np.zeros(outcomes, dtype=np.int64),
    )


def interleave(rows: int, pieces: Sequence[tuple[np.ndarray, Carried]]) -> Carried:
    """One `Carried` of so many rows from several, each with the rows that it is of, ascending."""
    lengths, rest = np.zeros(rows, dtype=np.int64), np.zeros(rows)
    for at, piece in pieces:
        lengths[at], rest[at] = piece.lengths, piece.rest
    starts = offsets_of(lengths)
    outcomes, masses = np.zeros(starts[-1], dtype=np.int64), np.zeros(starts[-1])
    for at, piece in pieces:
        places, _ = take_rows(starts, at)
        outcomes[places], masses[places] = piece.outcomes, piece.masses
    return Carried(lengths, outcomes, masses, rest)


@numba.njit(cache=True)
def _losses(
    rows: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    mass: np.ndarray,
    outcome_of_source: np.ndarray,
    seen_by: np.ndarray,
    kept: np.ndarray,
    carried: np.ndarray,
    met: np.ndarray,
) -> None:
    for r in range(len(rows)):
        for entry in range(offsets[rows[r]], offsets[rows[r] + 1]):
            outcome = outcome_of_source[ids[entry]]
            kept[r] += mass[entry]
            if outcome >= 0:
                carried[r] += mass[entry]
                met[r] += seen_by[outcome] == r
                seen_by[outcome] = r


def losses(kept: Kept, masses: np.ndarray, rows: np.ndarray, translation: Translation) -> Losses:
    """What of the distributions at `rows` has an outcome, and how many ids meet in one."""
    found = Losses(np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64))
    _losses(
        rows,
        kept.offsets,
        kept.ids,
        masses,
        translation.outcome_of_source,
        np.full(translation.outcomes + 1, -1, dtype=np.int64),
        found.kept,
        found.carried,
        found.met,
    )
    return found
