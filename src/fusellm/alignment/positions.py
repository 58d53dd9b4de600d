"""Which source position has read exactly what a target position has read.

B blocks of a shard, whose positions stand one after another in flat arrays with offsets; P target
positions that predict, of all blocks: all but each block's last. A position's boundary is the bytes
read so far; its distribution is about the token after it.
"""

from enum import IntEnum

import numpy as np

from fusellm.compiled import compiled


class Situation(IntEnum):
    """How the source cuts the target's next piece at an aligned position."""

    UNALIGNED = 0
    SAME = 1
    SEVERAL = 2
    BEYOND = 3
    CROSSED = 4


MEANINGS = {
    "same": "both cut the target's next token alike",
    "several": "the source spells it in several tokens, and ends with it",
    "beyond": "the source's next token ends after it",
    "crossed": "the source's tokens end before and after it, not at its end",
    "unaligned": "the source has not read the same text, and is silent",
}
"""What each situation means, by its name in lower case and in the order that readers see."""


# numba reads these as constants.
_UNALIGNED = int(Situation.UNALIGNED)
_SAME = int(Situation.SAME)
_SEVERAL = int(Situation.SEVERAL)
_BEYOND = int(Situation.BEYOND)
_CROSSED = int(Situation.CROSSED)


@compiled()
def _align_shard(
    target_ends: np.ndarray,
    target_offsets: np.ndarray,
    source_ends: np.ndarray,
    source_offsets: np.ndarray,
    source_of_target: np.ndarray,
    situation: np.ndarray,
) -> None:
    # Two pointers, i over the target's boundaries and j over the source's; neither goes back, so a
    # block costs as many steps as both have tokens. Of "the cats sat" the target has boundaries
    # 3 4 8 ("the", " ", "cats"), the source 4 6 8 ("the ", "ca", "ts"):
    #   after 3: the source has no boundary there, unaligned;
    #   after 4: it has one; the next is 6, before the target's 8, and then 8: SEVERAL.
    # Were its next 9, it would reach past the target's: BEYOND. Were they 6 and 9, it would jump
    # over 8: CROSSED. Only the positions of several with one boundary that stand last count, as
    # what was read then is the same, and a prefix or dummy token is behind them.
    #
    # Relies on: offsets that ascend to the ends' number, as many for both.
    out = 0
    for b in range(len(target_offsets) - 1):
        last_target = target_offsets[b + 1] - 1
        first_source, last_source = source_offsets[b], source_offsets[b + 1] - 1
        j = first_source
        for i in range(target_offsets[b], last_target):
            source_of_target[out] = -1
            situation[out] = _UNALIGNED
            end, next_end = target_ends[i], target_ends[i + 1]
            # Of several predicting positions with one boundary, the last.
            if i + 1 == last_target or next_end != end:
                while j < last_source and source_ends[j] < end:
                    j += 1
                while j + 1 < last_source and source_ends[j + 1] == end:
                    j += 1
                if j < last_source and source_ends[j] == end:
                    source_of_target[out] = j - first_source
                    k = j + 1
                    if source_ends[last_source] < next_end:  # it breaks off within the next piece
                        source_of_target[out] = -1
                    elif source_ends[k] == next_end:
                        situation[out] = _SAME
                    elif source_ends[k] > next_end:
                        situation[out] = _BEYOND
                    else:
                        while k < last_source and source_ends[k] < next_end:
                            k += 1
                        comes_back = source_ends[k] == next_end
                        situation[out] = _SEVERAL if comes_back else _CROSSED
            out += 1


def align_shard(
    target_ends: np.ndarray,
    target_offsets: np.ndarray,
    source_ends: np.ndarray,
    source_offsets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Align the positions that predict, of all blocks of a shard, in one linear pass.

    Of several positions of a block that share a boundary only the last one that predicts is
    aligned. The situation says how the source cuts the target's next piece (docs/method.md).

    Args:
        target_ends: flat boundaries of all blocks, non-decreasing within each, prefix and
            EOS included.
        target_offsets: [B+1] where each block's begin.
        source_ends, source_offsets: likewise; a block that the source could not read has none.

    Returns:
        (source_of_target [P] int64, situation [P] int8): the place within its block of the
        source position that has read exactly the same, or -1; and the `Situation`. A block of T
        boundaries has T-1 entries, an empty block none.

    Raises:
        ValueError: the two do not have equally many blocks.

    >>> ends, offsets = np.array([0, 2, 6, 0, 3, 7]), np.array([0, 3, 6])
    >>> source_of_target, situation = align_shard(ends, offsets, np.array([0, 3, 5, 7]),
    ...                                           np.array([0, 0, 4]))
    >>> source_of_target.tolist(), situation.tolist()
    ([-1, -1, 0, 1], [0, 0, 1, 2])
    """
    if len(target_offsets) != len(source_offsets):
        raise ValueError(
            f"target has {len(target_offsets) - 1} blocks, source {len(source_offsets) - 1}"
        )
    positions = int(np.maximum(np.diff(target_offsets) - 1, 0).sum())
    source_of_target = np.empty(positions, dtype=np.int64)
    situation = np.empty(positions, dtype=np.int8)
    _align_shard(
        np.asarray(target_ends, dtype=np.int64),
        np.asarray(target_offsets, dtype=np.int64),
        np.asarray(source_ends, dtype=np.int64),
        np.asarray(source_offsets, dtype=np.int64),
        source_of_target,
        situation,
    )
    return source_of_target, situation
