"""The paper's token alignment: a dynamic programme over spellings (FuseLLM, token alignment).

Dynamic time warping: a path from the first tokens of both tokenizers to the last that moves on in
one or in both, of least sum of the Levenshtein distances between the spellings it meets, their
space marks removed. The strategies `em` and `mined` use it where it pairs one token with one.

T target tokens, S source tokens of one block, without prefix and EOS; M meetings of the path;
Vs, Vt vocabulary sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusellm.alignment.vocabulary_maps import least_dtype, same_spellings, spellings
from fusellm.arrays.ragged import offsets_of
from fusellm.compiled import compiled
from fusellm.tokens.encode import Encoder

_BOTH, _SOURCE, _TARGET = 0, 1, 2  # who has moved; of equal costs the first, as the authors do


@dataclass(frozen=True)
class Path:
    """Which tokens the programme lets meet.

    A path only goes forward, so its two sides are also the flat arrays of both ragged ones.

    Attributes:
        cost: sum of the distances met.
        sources: [M] int64 source positions along the path; those of target position i are
            `sources[source_offsets[i] : source_offsets[i + 1]]`.
        source_offsets: [T+1] int64.
        targets: [M] int64 target positions along the path; those of source position j are
            `targets[target_offsets[j] : target_offsets[j + 1]]`.
        target_offsets: [S+1] int64.
    """

    cost: int
    sources: np.ndarray
    source_offsets: np.ndarray
    targets: np.ndarray
    target_offsets: np.ndarray


@compiled()
def _fill(distances: np.ndarray, rows: np.ndarray, columns: np.ndarray, moves: np.ndarray) -> int:
    """Write who has moved last on the best path to each cell; return the cost of the last cell."""
    costs = np.empty(len(columns), dtype=np.int64)  # of the row before, then of this one
    for i in range(len(rows)):
        distance = distances[rows[i]]
        diagonal = left = 0
        for j in range(len(columns)):
            up = costs[j]
            if i == 0 and j == 0:
                best, move = 0, _BOTH
            elif i == 0:
                best, move = left, _TARGET
            elif j == 0:
                best, move = up, _SOURCE
            else:
                best, move = diagonal, _BOTH
                if up < best:
                    best, move = up, _SOURCE
                if left < best:
                    best, move = left, _TARGET
            left = best + distance[columns[j]]
            costs[j] = left
            moves[i, j] = move
            diagonal = up
    return int(costs[-1])


@compiled()
def _trace(moves: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> int:
    """Write the path, its end first; return its length."""
    i, j = moves.shape[0] - 1, moves.shape[1] - 1
    length = 0
    while True:
        sources[length], targets[length] = i, j
        length += 1
        if i == 0 and j == 0:
            return length
        move = moves[i, j]
        if move != _TARGET:
            i -= 1
        if move != _SOURCE:
            j -= 1


def least_path(
    source_ids: np.ndarray,
    target_ids: np.ndarray,
    source_spellings: Sequence[str],
    target_spellings: Sequence[str],
) -> Path:
    """The path of least cost through two readings of one text, with the authors' tie order.

    Ties, seen from the end of the path: both moved, else the source moved, else the target.

    Args:
        source_ids, target_ids: [S], [T] token ids.
        source_spellings, target_spellings: [Vs], [Vt] spelling of each id, space marks removed.

    Returns:
        The path; without meetings and of cost 0 where one side has no tokens.

    >>> path = least_path(np.array([0, 1]), np.array([0, 1, 2]), ["un", "ited"], ["un", "ite", "d"])
    >>> path.cost, path.sources.tolist(), path.targets.tolist(), path.source_offsets.tolist()
    (4, [0, 1, 1], [0, 1, 2], [0, 1, 2, 3])
    """
    counts = len(source_ids), len(target_ids)
    sources = np.zeros(sum(counts), dtype=np.int64)
    targets = np.zeros(sum(counts), dtype=np.int64)
    cost = length = 0
    if min(counts) > 0:
        distances, rows, columns = _distances(
            source_ids, target_ids, source_spellings, target_spellings
        )
        moves = np.empty(counts, dtype=np.uint8)
        cost = int(_fill(distances, rows, columns, moves))
        length = _trace(moves, sources, targets)
    sources, targets = sources[:length][::-1].copy(), targets[:length][::-1].copy()
    return Path(
        cost,
        sources,
        offsets_of(np.bincount(targets, minlength=counts[1])),
        targets,
        offsets_of(np.bincount(sources, minlength=counts[0])),
    )


def _distances(
    source_ids: np.ndarray,
    target_ids: np.ndarray,
    source_spellings: Sequence[str],
    target_spellings: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distances of the distinct tokens, [S] row of each source token, [T] column)."""
    distinct_source, rows = np.unique(source_ids, return_inverse=True)
    distinct_target, columns = np.unique(target_ids, return_inverse=True)
    source = [source_spellings[id_] for id_ in distinct_source.tolist()]
    target = [target_spellings[id_] for id_ in distinct_target.tolist()]
    longest = max(len(spelling) for spelling in (*source, *target))
    distances = cdist(source, target, scorer=Levenshtein.distance, dtype=least_dtype(longest))
    return distances, rows, columns


def one_to_one(
    path: Path,
    source_ids: np.ndarray,
    target_ids: np.ndarray,
    same_token: np.ndarray,
    vocabulary_map: np.ndarray | None = None,
) -> np.ndarray:
    """The source position of each target position that the path pairs with one token, the same.

    Args:
        path: through the two readings.
        source_ids, target_ids: [S], [T] token ids.
        same_token: [Vs] the target id of the same spelling, -1 for none.
        vocabulary_map: [Vs] `mined`: a pair is also one where this sends the source token to the
            target token. None for `em`.

    Returns:
        [T] int64, -1 for none. Both models have just read that token: the source's distribution
        there is used at this target position.

    >>> ids, spelled = np.array([0, 1]), ["un", "ited"]
    >>> path = least_path(ids, np.array([0, 1, 2]), spelled, ["un", "ite", "d"])
    >>> one_to_one(path, ids, np.array([0, 1, 2]), np.array([0, -1])).tolist()
    [0, -1, -1]
    """
    alone = np.nonzero(np.diff(path.source_offsets) == 1)[0]
    source = path.sources[path.source_offsets[alone]]
    mutual = np.diff(path.target_offsets)[source] == 1
    alone, source = alone[mutual], source[mutual]
    accepted = same_token[source_ids[source]] == target_ids[alone]
    if vocabulary_map is not None:
        accepted |= vocabulary_map[source_ids[source]] == target_ids[alone]
    positions = np.full(len(target_ids), -1, dtype=np.int64)
    positions[alone[accepted]] = source[accepted]
    return positions


class DynamicAligner:
    """Aligns blocks of one source with the target as the strategies `em` and `mined` do."""

    def __init__(
        self, source: Encoder, target: Encoder, vocabulary_map: np.ndarray | None = None
    ) -> None:
        """`vocabulary_map`: [Vs] target ids of the strategy; None maps equal spellings only."""
        self._source, self._target = source, target
        self._bare = spellings(source, space=""), spellings(target, space="")
        self._same_token = same_spellings(spellings(source), spellings(target))
        self._map = vocabulary_map

    def align(self, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """The source position of each target position of a block, as `Encoder` reads it.

        Prefix and EOS take no part in the programme. The last tokens of two prefixes are aligned,
        for both models have read nothing; EOS predicts nothing and is not.

        Args:
            source_ids, target_ids: [S], [T] token ids, prefix and EOS included.

        Returns:
            [T] int64, -1 for none. A last position may be aligned though it predicts nothing.
        """
        source_from, source_to = _text_span(self._source, source_ids)
        target_from, target_to = _text_span(self._target, target_ids)
        source_inner = source_ids[source_from:source_to]
        target_inner = target_ids[target_from:target_to]
        inner = self.pair(
            least_path(source_inner, target_inner, *self._bare), source_inner, target_inner
        )
        positions = np.full(len(target_ids), -1, dtype=np.int64)
        positions[target_from:target_to] = np.where(inner < 0, -1, inner + source_from)
        if source_from and target_from:
            positions[target_from - 1] = source_from - 1
        return positions

    def pair(self, path: Path, source_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
        """[T] the source position of each target position, of tokens without prefix and EOS."""
        return one_to_one(path, source_ids, target_ids, self._same_token, self._map)


def _text_span(encoder: Encoder, ids: np.ndarray) -> tuple[int, int]:
    """Where the tokens between prefix and EOS begin and end."""
    vocabulary = encoder.vocabulary
    prefix = vocabulary.prefix_ids
    begin = len(prefix) if tuple(ids[: len(prefix)].tolist()) == prefix else 0
    if encoder.said_around:  # an answer, with the token of the template before it
        begin = min(encoder.prefix_tokens, len(ids))
    with_eos = len(ids) > begin and vocabulary.eos_id is not None and ids[-1] == vocabulary.eos_id
    return begin, len(ids) - int(with_eos)
