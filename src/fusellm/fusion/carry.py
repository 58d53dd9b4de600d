"""Distributions carried through a vocabulary map: sparse in, sparse out.

N source positions; R parts, each one source's distribution at one target position; M outcomes in
all; U outcomes of a translation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fusellm.alignment.translation import VocabularyMap
from fusellm.arrays.distributions import Distributions
from fusellm.arrays.ragged import offsets_of, take_rows
from fusellm.compiled import compiled


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

    @classmethod
    def certain(cls, outcomes: np.ndarray) -> "Carried":
        """One part for each of these outcomes, which has all mass."""
        ones, count = np.ones(len(outcomes), dtype=np.int64), len(outcomes)
        return cls(ones, outcomes, np.ones(count), np.zeros(count))

    @classmethod
    def concat(cls, several: Sequence["Carried"]) -> "Carried":
        """The parts of several, one after another."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(one, name) for one in several]) for name in names))

    def take(self, parts: np.ndarray) -> "Carried":
        """These parts, in their order."""
        entries, _ = take_rows(offsets_of(self.lengths), parts)
        return Carried(
            self.lengths[parts], self.outcomes[entries], self.masses[entries], self.rest[parts]
        )


@dataclass(frozen=True)
class MapCounts:
    """What the map does to the distributions at some positions.

    Attributes:
        kept: [N] mass that the source kept.
        carried: [N] mass of what of it has an outcome.
        met: [N] entries whose outcome another entry of the position has too.
    """

    kept: np.ndarray
    carried: np.ndarray
    met: np.ndarray


@compiled()
def _carry(
    rows: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    mass: np.ndarray,
    tail: np.ndarray,
    outcome_of_source: np.ndarray,
    leftover: int,
    first_only: bool,
    seen_by: np.ndarray,
    place_of: np.ndarray,
    lengths: np.ndarray,
    outcomes: np.ndarray,
    masses: np.ndarray,
    rest: np.ndarray,
) -> int:
    # Entries (id 5, 0.4), (id 9, 0.3), (id 6, 0.2), tail 0.1, and a map 5 → 2, 6 → 2, 9 → none:
    # outcome 2 gets 0.4 + 0.2, the rest 0.3 + 0.1. `seen_by[outcome] == r` says that this part has
    # the outcome already, at `place_of[outcome]`; nothing has to be cleared from part to part.
    #
    # Relies on: ids below len(outcome_of_source), offsets that ascend to len(ids), outcomes from -1
    # to len(seen_by) - 1. A store's layout and the reader of kept maps hold these.
    used = 0
    for r in range(len(rows)):
        row, begin = rows[r], used
        rest[r] = tail[row]
        for entry in range(offsets[row], offsets[row + 1]):
            outcome = outcome_of_source[ids[entry]]
            if outcome < 0:
                outcome = leftover
            if outcome < 0:
                rest[r] += mass[entry]
            elif seen_by[outcome] != r:
                seen_by[outcome], place_of[outcome] = r, used
                outcomes[used], masses[used] = outcome, mass[entry]
                used += 1
            elif first_only:
                rest[r] += mass[entry]
            else:
                masses[place_of[outcome]] += mass[entry]
        lengths[r] = used - begin
    return used


def carry(
    given: Distributions, rows: np.ndarray, translation: VocabularyMap, first_only: bool
) -> Carried:
    """The distributions at `rows`, over the translation's outcomes.

    Mass of ids that meet in an outcome is added. Mass without an outcome joins the rest, but for
    draws where the outcomes have the same probability under both models: what no outcome takes is
    then one more outcome, numbered U.

    Args:
        rows: [R] positions of `given`, as often as wanted.
        first_only: of ids that meet only the first keeps its mass (the authors' rule).
    """
    bound = int((given.offsets[rows + 1] - given.offsets[rows]).sum())
    lengths, rest = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    outcomes, masses = np.zeros(bound, dtype=np.int64), np.zeros(bound)
    whole = given.sampled and translation.complete and translation.has_leftover
    used = _carry(
        rows,
        given.offsets,
        given.ids,
        given.masses,
        given.tail,
        translation.outcome_of_source,
        translation.outcomes if whole else -1,
        first_only,
        np.full(translation.outcomes + 1, -1, dtype=np.int64),
        np.zeros(translation.outcomes + 1, dtype=np.int64),
        lengths,
        outcomes,
        masses,
        rest,
    )
    return Carried(lengths, outcomes[:used], masses[:used], rest)


@compiled()
def _count(
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
    # Relies on the same as `_carry`.
    for r in range(len(rows)):
        for entry in range(offsets[rows[r]], offsets[rows[r] + 1]):
            outcome = outcome_of_source[ids[entry]]
            kept[r] += mass[entry]
            if outcome >= 0:
                carried[r] += mass[entry]
                met[r] += seen_by[outcome] == r
                seen_by[outcome] = r


def map_counts(given: Distributions, rows: np.ndarray, translation: VocabularyMap) -> MapCounts:
    """What of the distributions at `rows` has an outcome, and how many ids meet in one."""
    counts = MapCounts(
        np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    )
    _count(
        rows,
        given.offsets,
        given.ids,
        given.masses,
        translation.outcome_of_source,
        np.full(translation.outcomes + 1, -1, dtype=np.int64),
        counts.kept,
        counts.carried,
        counts.met,
    )
    return counts
