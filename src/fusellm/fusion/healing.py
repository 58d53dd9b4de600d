r"""Token healing: what a source says once some bytes are read, whatever tokens they are to it.

A source's distribution at a boundary is about texts that it would cut there. Where `;` and a line
end are one token to it, it has a boundary after `;` only where no line end follows, and so gives
line ends no mass there. The target, which has the two apart, would learn that no line ends after
`;` (the tokenization bias of Phan et al. 2024, arXiv:2410.09303).

The mass is not lost: the source gave it one token before, to the longer token. Let the source's
token w be the last it read, P its distribution after w, and Q the one before w. Among texts that
go on with the bytes of w,

    P'(a)  =  ( Q(w) P(a)  +  sum of Q(v) over v = w u, u not empty, with a first in u ) / Z
    Z      =  Q(w)  +  sum of Q(v) over the same v, whatever u

for every source token a. Only such v count whose u can follow a boundary of the target there
(`fusellm.alignment.continuations`). This goes one token back. Longer tokens that begin before w are
left out.

The target has its own long tokens. After `;` it never reads a line end where it has both as one
token. So of P' only what leaves the target a boundary is kept, and scaled to 1 (`where_cut`).

The source's distributions are of B blocks, one after another; N positions that predict, K entries.
"""

import numpy as np

from fusellm.alignment.continuations import Continuations, begins_so
from fusellm.alignment.target_cuts import TargetCuts
from fusellm.arrays.distributions import Distributions, Kept
from fusellm.arrays.tokens import Tokens
from fusellm.compiled import compiled

_LEAST_MASS = 1e-6  # of kept tokens: what is less is an error of rounding


@compiled()
def _longer(
    tokens: np.ndarray,
    token_offsets: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    mass: np.ndarray,
    spelled: np.ndarray,
    spelled_offsets: np.ndarray,
    slots: np.ndarray,
    stays: np.ndarray,
) -> int:
    # slots: of entries that go on past the token read next; stays: Q of that token.
    # Relies on: ids and tokens below the vocabulary's size, offsets that ascend to len(ids).
    row, count = 0, 0
    for b in range(len(token_offsets) - 1):
        for t in range(token_offsets[b], token_offsets[b + 1] - 1):
            read = tokens[t + 1]
            first = spelled_offsets[read]
            width = spelled_offsets[read + 1] - first
            for entry in range(offsets[row], offsets[row + 1]):
                begin = spelled_offsets[ids[entry]]
                if ids[entry] == read:
                    stays[row] += mass[entry]
                elif spelled_offsets[ids[entry] + 1] - begin > width > 0 and begins_so(
                    spelled, begin, first, width
                ):
                    slots[entry] = begin + width
                    count += 1
            row += 1
    return count


@compiled()
def _heal(
    token_offsets: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    mass: np.ndarray,
    tail: np.ndarray,
    stays: np.ndarray,
    moved: np.ndarray,
    new_offsets: np.ndarray,
    new_ids: np.ndarray,
    new_mass: np.ndarray,
    new_tail: np.ndarray,
) -> int:
    # Relies on: the same as `_longer`, and room in new_ids for all entries and all that move.
    row, used = 0, 0
    for b in range(len(token_offsets) - 1):
        for t in range(token_offsets[b], token_offsets[b + 1] - 1):
            begin, share, moves = used, 1.0, 0.0
            if t > token_offsets[b]:  # the block's first position has none before it
                for entry in range(offsets[row - 1], offsets[row]):
                    if moved[entry] >= 0:
                        moves += mass[entry]
                if moves > 0.0:
                    share = stays[row - 1] / (stays[row - 1] + moves)
            if share > 0.0:
                for entry in range(offsets[row], offsets[row + 1]):
                    new_ids[used], new_mass[used] = ids[entry], mass[entry] * share
                    used += 1
            new_tail[row] = tail[row] * share
            if moves > 0.0:
                whole = stays[row - 1] + moves
                for entry in range(offsets[row - 1], offsets[row]):
                    if moved[entry] >= 0:
                        place = begin
                        while place < used and new_ids[place] != moved[entry]:
                            place += 1
                        if place == used:
                            new_ids[used], new_mass[used] = moved[entry], 0.0
                            used += 1
                        new_mass[place] += mass[entry] / whole
            row += 1
            new_offsets[row] = used
    return used


def heal(tokens: Tokens, kept: Kept, continuations: Continuations) -> Distributions:
    """The distributions of a source once the bytes of its last token are read.

    Of draws, both Q(w) and Q(v) are shares of them. Where no draw fits the text, P stays. A share
    of few systematic draws is nearly right on average: longer tokens of probability 0.005 beside
    a last one of 0.03 get 0.09 in place of 0.14. Of the most probable tokens Q(w) is exact, and of
    Q(v) what was kept.

    Args:
        tokens: the blocks as the source reads them.
        kept: its distributions at all but each block's last position.

    Returns:
        [N] positions, with entries that moved among them.
    """
    given = kept.distributions()
    slots = np.full(len(given.ids), -1, dtype=np.int64)
    stays = np.zeros(len(given.tail))
    where = tokens.ids, tokens.offsets, given.offsets, given.ids, given.masses
    if _longer(*where, continuations.spelled, continuations.offsets, slots, stays) == 0:
        return given
    if not kept.sampled:
        stays = np.exp(kept.true_log_prob.astype(np.float64))
    moved = np.full(len(slots), Continuations.NOTHING, dtype=np.int64)
    moved[slots >= 0] = continuations[slots[slots >= 0]]
    room = len(given.ids) + int((moved >= 0).sum())
    ids, masses = np.zeros(room, dtype=np.int64), np.zeros(room)
    offsets, tail = np.zeros(len(given.offsets), dtype=np.int64), np.zeros(len(given.tail))
    used = _heal(
        tokens.offsets,
        given.offsets,
        given.ids,
        given.masses,
        given.tail,
        stays,
        moved,
        offsets,
        ids,
        masses,
        tail,
    )
    return Distributions(offsets, ids[:used], masses[:used], tail, given.sampled)


@compiled()
def _keep(
    starts: np.ndarray, stops: np.ndarray, masses: np.ndarray, spanned: np.ndarray, kept: np.ndarray
) -> int:
    # kept: the mass of each row that leaves the target its boundary. How many entries do not, of
    # rows where some do.
    count = 0
    for r in range(len(starts)):
        taken = 0
        for entry in range(starts[r], stops[r]):
            if spanned[entry]:
                taken += 1
            else:
                kept[r] += masses[entry]
        if kept[r] > _LEAST_MASS:
            count += taken
    return count


@compiled()
def _cut(
    offsets: np.ndarray,
    ids: np.ndarray,
    masses: np.ndarray,
    row_of: np.ndarray,
    spanned: np.ndarray,
    kept: np.ndarray,
    new_offsets: np.ndarray,
    new_ids: np.ndarray,
    new_masses: np.ndarray,
    new_tail: np.ndarray,
) -> int:
    # row_of: of each position, its place in `kept`; -1 where it stays as it is. new_tail: as given.
    used = 0
    for position in range(len(row_of)):
        r, whole = row_of[position], 1.0
        if r >= 0:
            whole = kept[r] + new_tail[position]
            new_tail[position] /= whole
        for entry in range(offsets[position], offsets[position + 1]):
            if r < 0 or not spanned[entry]:
                new_ids[used], new_masses[used] = ids[entry], masses[entry] / whole
                used += 1
        new_offsets[position + 1] = used
    return used


def where_cut(
    given: Distributions, rows: np.ndarray, read: np.ndarray, cuts: TargetCuts
) -> tuple[Distributions, np.ndarray]:
    """Distributions under the condition that the target has a boundary at these positions.

    Args:
        rows: [R] positions of `given`, each once.
        read: [R] the target's last token at each.

    Returns:
        (the distributions, [R] bool: whether anything that was kept is left of each). Where
        nothing is, it stays as it was. The tail is taken to leave the boundary.
    """
    starts, stops = given.offsets[rows], given.offsets[rows + 1]
    spanned = cuts.spanned_entries(read, starts, stops, given.ids)
    kept = np.zeros(len(rows))
    count = _keep(starts, stops, given.masses, spanned, kept)
    left = kept > _LEAST_MASS
    if count == 0:
        return given, left
    row_of = np.full(len(given.tail), -1, dtype=np.int64)
    row_of[rows[left]] = np.flatnonzero(left)
    ids, masses = np.empty_like(given.ids), np.empty(len(given.ids))
    offsets, tail = np.zeros(len(given.offsets), dtype=np.int64), given.tail.astype(np.float64)
    used = _cut(
        given.offsets,
        given.ids,
        given.masses,
        row_of,
        spanned,
        kept,
        offsets,
        ids,
        masses,
        tail,
    )
    return Distributions(offsets, ids[:used], masses[:used], tail, given.sampled), left
