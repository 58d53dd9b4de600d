r"""What a source says within one of its tokens, of which the target has read the beginning.

Let the source's next token be v, and let the target have read the first bytes r of it. The source
has no boundary there, and no distribution. But before v it had one, Q, and it says of the bytes
that have been read since:

    P(a)   =  sum of Q(w) over w = r u, u not empty, with a first in u  /  Z
    tail   =  Q(r), where r is a token                                  /  Z
    Z      =  the sum of Q over all of these

for every source token a. The tail is what the source would have read as a token of its own: how
that goes on does not stand in its store. Where it would have spelled r by several tokens is left
out. Q(v) is stored exactly; the others share what it leaves in proportion to what was kept.

Example. Q gives `return` 0.5, `returns` 0.2, `ret` 0.1, `if` 0.2. The target has read `ret`: `urn`
gets 0.5 / 0.8, `urns` 0.2 / 0.8 (as its first source token), the tail is 0.1 / 0.8.

N target positions that predict; R of them within a source's token; K entries.
"""

from typing import NamedTuple

import numpy as np

from fusellm.alignment.continuations import Continuations, begins_so
from fusellm.arrays.distributions import Distributions, Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.compiled import compiled

LEAST_DRAWS = 5
"""That fit what has been read; of fewer there is no distribution."""


class Within(NamedTuple):
    """Target positions within a token of a source.

    Attributes:
        positions: [R] of the target.
        rows: [R] of the source's distributions, at the boundary before.
        read: [R] bytes of the token that have been read.
    """

    positions: np.ndarray
    rows: np.ndarray
    read: np.ndarray

    def take(self, which: np.ndarray) -> "Within":
        """Some of the positions."""
        return Within(*(column[which] for column in self))


@compiled()
def _find(
    target_ends: np.ndarray,
    target_offsets: np.ndarray,
    source_ends: np.ndarray,
    source_offsets: np.ndarray,
    rows: np.ndarray,
    read: np.ndarray,
) -> None:
    # Two pointers, as in `align_shard`: j is the last of the source's boundaries not behind i's.
    position, row = 0, 0
    for b in range(len(target_offsets) - 1):
        first, last = source_offsets[b], source_offsets[b + 1] - 1
        j = first
        for i in range(target_offsets[b], target_offsets[b + 1] - 1):
            rows[position] = -1
            while j < last and source_ends[j + 1] <= target_ends[i]:
                j += 1
            if j < last and source_ends[j] < target_ends[i]:
                rows[position] = row + j - first
                read[position] = target_ends[i] - source_ends[j]
            position += 1
        row += max(last - first, 0)


def within(target: Tokens, source: Tokens) -> Within:
    """The target's positions whose boundary is within a token of the source."""
    rows = np.full(len(target.predicting), -1, dtype=np.int64)
    read = np.zeros(len(rows), dtype=np.int64)
    _find(target.ends, target.offsets, source.ends, source.offsets, rows, read)
    positions = np.flatnonzero((rows >= 0) & target.asked)
    return Within(positions, rows[positions], read[positions])


@compiled()
def _fitting(
    rows: np.ndarray,
    read: np.ndarray,
    next_ids: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    mass: np.ndarray,
    next_mass: np.ndarray,
    not_kept: np.ndarray,
    spelled: np.ndarray,
    spelled_offsets: np.ndarray,
    slots: np.ndarray,
    masses: np.ndarray,
    lengths: np.ndarray,
    tail: np.ndarray,
    kept: np.ndarray,
) -> int:
    # slots: of entries longer than what was read, where their rest begins; `kept` is the mass of
    # all that fit, as kept. Relies on: the same as `_longer` in `healing`.
    used = 0
    for r in range(len(rows)):
        true, begin = next_ids[r], used
        others, left = 0.0, not_kept[rows[r]]
        is_kept = False
        for entry in range(offsets[rows[r]], offsets[rows[r] + 1]):
            if ids[entry] == true:
                is_kept = True
            else:
                others += mass[entry]
        if not is_kept:
            left = max(left - next_mass[r], 0.0)
        others += left
        share = (1.0 - next_mass[r]) / others if others > 0.0 else 0.0
        slots[used], masses[used] = spelled_offsets[true] + read[r], next_mass[r]
        used += 1
        for entry in range(offsets[rows[r]], offsets[rows[r] + 1]):
            w = ids[entry]
            if w == true:
                kept[r] += mass[entry]
                continue
            first, width = spelled_offsets[w], spelled_offsets[w + 1] - spelled_offsets[w]
            if width < read[r] or not begins_so(spelled, first, spelled_offsets[true], read[r]):
                continue
            kept[r] += mass[entry]
            if width > read[r]:
                slots[used], masses[used] = first + read[r], mass[entry] * share
                used += 1
            else:
                tail[r] += mass[entry] * share
        lengths[r] = used - begin
    return used


def _reads_its_bytes(places: Within, tokens: Tokens, continuations: Continuations) -> np.ndarray:
    """Whether the token around each place reads as many bytes of the text as it has.

    One whose space mark stands for no space of the text does not (a dummy prefix).
    """
    around = tokens.predicting[places.rows] + 1
    ids, offsets = tokens.ids[around], continuations.offsets
    reads = tokens.ends[around] - tokens.ends[around - 1]
    return np.asarray(offsets[ids + 1] - offsets[ids] == reads)


def inside(
    places: Within, tokens: Tokens, kept: Kept, stored: Distributions, continuations: Continuations
) -> tuple[Within, Distributions]:
    """What a source says at positions within its tokens.

    Args:
        places: the positions.
        tokens: of the source, with what was kept of its distributions, also as `stored`.

    Returns:
        (those of the positions where at least `LEAST_DRAWS` draws fit what has been read and
        something follows, their distributions)
    """
    places = places.take(_reads_its_bytes(places, tokens, continuations))
    count = len(places.rows)
    room = int(np.diff(stored.offsets)[places.rows].sum()) + count
    slots, masses = np.zeros(room, dtype=np.int64), np.zeros(room)
    lengths = np.zeros(count, dtype=np.int64)
    tail, fits = np.zeros(count), np.zeros(count)
    used = _fitting(
        places.rows,
        places.read,
        tokens.ids[tokens.predicting[places.rows] + 1],
        stored.offsets,
        stored.ids.astype(np.int64, copy=False),
        stored.masses,
        np.exp(kept.true_log_prob[places.rows].astype(np.float64)).clip(max=1.0),
        stored.tail.astype(np.float64, copy=False),
        continuations.spelled,
        continuations.offsets,
        slots,
        masses,
        lengths,
        tail,
        fits,
    )
    of_row = np.repeat(np.arange(count), lengths)
    ids, masses = continuations[slots[:used]], masses[:used]
    cut = (ids != Continuations.NOTHING) & (masses > 0)
    ids, masses, of_row = ids[cut], masses[cut], of_row[cut]
    pairs, where = np.unique(of_row * (ids.max(initial=0) + 1) + ids, return_inverse=True)
    sums = np.bincount(where, weights=masses, minlength=len(pairs))
    of_row, ids = np.divmod(pairs, ids.max(initial=0) + 1)
    whole = np.bincount(of_row, weights=sums, minlength=count)
    told = whole > 0
    if kept.sampled:
        draws = kept.counts.sum() / max(len(kept.tail), 1)
        told &= fits * draws >= LEAST_DRAWS - 0.5
    scale = 1 / np.where(told, whole + tail, 1.0)
    chosen = told[of_row]
    offsets = offsets_of(np.bincount(of_row[chosen], minlength=count)[told])
    return places.take(told), Distributions(
        offsets, ids[chosen], (sums * scale[of_row])[chosen], (tail * scale)[told], stored.sampled
    )
