"""One block's fused distributions from the distributions of all sources.

S sources, N target positions that predict, M outcomes in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusellm.align.positions import Situation, align, situations
from fusellm.align.ragged import take_rows
from fusellm.align.translation import Translation
from fusellm.fusion.cross_entropy import nats_by_byte
from fusellm.fusion.functions import Compared
from fusellm.fusion.kept import Kept


@dataclass(frozen=True)
class Reading:
    """One source's reading of a block.

    Attributes:
        ends: boundaries in bytes, BOS and EOS included.
        kept: its distributions at all but the last position.
        translation: its vocabulary map.
        from_start: whether its first token may be compared with the target's: not where one of
            two tokenizers writes a dummy space there.
    """

    ends: np.ndarray
    kept: Kept
    translation: Translation
    from_start: bool


@dataclass(frozen=True)
class FusedBlock:
    """A block's fused distributions.

    Attributes:
        winner: [N] int8, place of the source whose outcomes these are; -1 where there is none.
        lengths: [N] outcomes at each position.
        outcomes: [M] int64, numbers of the winner's translation.
        masses: [M] float32.
        rest: [N] float32, mass in none of them.
    """

    winner: np.ndarray
    lengths: np.ndarray
    outcomes: np.ndarray
    masses: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class BlockCounts:
    """What was met while fusing a block, for one source.

    Attributes:
        situations: [5] positions per `Situation`.
        mass_kept, mass_carried: sums over aligned positions of the mass kept by the source, and
            of what of it has an outcome in the target.
        nats, scored_bytes: cross-entropy against the text and the bytes it is over.
        first_positions: aligned positions left out because of a dummy space.
    """

    situations: np.ndarray
    mass_kept: float
    mass_carried: float
    nats: float
    scored_bytes: int
    first_positions: int


def fuse_block(
    target_ends: np.ndarray,
    length_bytes: int,
    sources: Sequence[Reading | None],
    function: Callable[[Compared], np.ndarray],
    window_bytes: int | None,
) -> tuple[FusedBlock, list[BlockCounts | None]]:
    """Align, translate and fuse one block.

    Args:
        target_ends: [N + 1] boundaries, BOS and EOS included.
        length_bytes: of the block's text.
        sources: in the recipe's order; None where a source could not read the block.
    """
    positions = max(len(target_ends) - 1, 0)
    source_of_target = np.full((len(sources), positions), -1, dtype=np.int64)
    by_byte = np.full((len(sources), length_bytes), np.nan)
    counts: list[BlockCounts | None] = []
    for s, source in enumerate(sources):
        if source is None or len(source.ends) == 0:
            counts.append(None)
            continue
        found = align(target_ends[:-1], source.ends[:-1])
        dropped = 0
        if not source.from_start:
            at_start = (found >= 0) & (target_ends[:-1] == 0)
            dropped = int(at_start.sum())
            found[at_start] = -1
        source_of_target[s] = found
        by_byte[s] = nats_by_byte(source.ends, source.kept.true_log_prob, length_bytes)
        counts.append(_count(target_ends, source, found, by_byte[s], dropped))
    present = [s for s, source in enumerate(sources) if source is not None]
    winner = np.full(positions, -1, dtype=np.int8)
    if present and positions:
        compared = Compared(
            source_of_target[present] >= 0, by_byte[present], target_ends, window_bytes
        )
        chosen = function(compared)
        winner = np.where(chosen < 0, -1, np.array(present, dtype=np.int8)[chosen]).astype(np.int8)
    return _gather(sources, source_of_target, winner), counts


def _gather(
    sources: Sequence[Reading | None], source_of_target: np.ndarray, winner: np.ndarray
) -> FusedBlock:
    positions = len(winner)
    rest = np.zeros(positions)
    where: list[np.ndarray] = []
    outcomes: list[np.ndarray] = []
    masses: list[np.ndarray] = []
    for s, source in enumerate(sources):
        won = np.nonzero(winner == s)[0]
        if source is None or len(won) == 0:
            continue
        entries, row = take_rows(source.kept.offsets, source_of_target[s][won])
        mass = source.kept.masses()[entries]
        outcome = source.translation.outcome_of_source[source.kept.ids[entries]]
        sampled = len(source.kept.counts) > 0
        if source.translation.complete and source.translation.has_leftover and sampled:
            outcome = np.where(outcome < 0, source.translation.outcomes, outcome)
        lost = outcome < 0
        rest[won] += source.kept.tail[source_of_target[s][won]]
        rest[won] += np.bincount(row[lost], weights=mass[lost], minlength=len(won))
        span = source.translation.outcomes + 1
        keys, place = np.unique(row[~lost] * span + outcome[~lost], return_inverse=True)
        where.append(won[keys // span])
        outcomes.append(keys % span)
        masses.append(np.bincount(place, weights=mass[~lost], minlength=len(keys)))
    if not where:
        nothing = np.zeros(0, dtype=np.int64)
        where, outcomes, masses = [nothing], [nothing], [np.zeros(0)]
    at = np.concatenate(where)
    order = np.argsort(at, kind="stable")
    return FusedBlock(
        winner,
        np.bincount(at, minlength=positions).astype(np.int64),
        np.concatenate(outcomes)[order],
        np.concatenate(masses)[order].astype(np.float32),
        rest.astype(np.float32),
    )


def _count(
    target_ends: np.ndarray,
    source: Reading,
    found: np.ndarray,
    by_byte: np.ndarray,
    dropped: int,
) -> BlockCounts:
    kept_rows = found[found >= 0]
    entries, _ = take_rows(source.kept.offsets, kept_rows)
    mass = source.kept.masses()[entries]
    carried = source.translation.outcome_of_source[source.kept.ids[entries]] >= 0
    scored = np.isfinite(by_byte)
    return BlockCounts(
        np.bincount(situations(target_ends, source.ends, found), minlength=len(Situation)),
        float(mass.sum()),
        float(mass[carried].sum()),
        float(by_byte[scored].sum()),
        int(scored.sum()),
        dropped,
    )
