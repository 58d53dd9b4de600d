"""Maps from token to token, of the strategies `em` and `mined` (docs/method.md, Translation).

    em        the target token of the same spelling (the paper's EM)
    mined     that, else the target token of least Levenshtein distance (the paper's MinED)

A spelling is how a tokenizer's file writes a token: byte-level ones spell a space Ġ and é as Ã©,
SentencePiece spells a space ▁ and a byte without a token <0xNN>.

Vs, Vt source and target vocabulary sizes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusellm.tokens.encode import Encoder
from fusellm.tokens.vocabulary import SPACE_MARK

_BYTE_LEVEL_SPACE = "Ġ"
# Source tokens compared at once: bounds the distances held to this many rows.
_TILE_ROWS = 256


def spellings(encoder: Encoder, space: str = SPACE_MARK) -> list[str]:
    """[V] the spelling of each token with its space mark, Ġ or ▁, written as `space`.

    Empty for ids without a token.
    """
    mark = SPACE_MARK if encoder.vocabulary.space_mark else _BYTE_LEVEL_SPACE
    written = encoder.tokenizer.convert_ids_to_tokens(list(range(len(encoder.vocabulary))))
    return [(spelling or "").replace(mark, space) for spelling in written]


def least_dtype(most: int) -> type[np.uint8] | type[np.uint16] | type[np.uint32]:
    """The narrowest type, of those that rapidfuzz writes, for distances up to `most`.

    >>> least_dtype(255).__name__, least_dtype(256).__name__
    ('uint8', 'uint16')
    """
    if most <= np.iinfo(np.uint8).max:
        return np.uint8
    return np.uint16 if most <= np.iinfo(np.uint16).max else np.uint32


def same_spellings(source: Sequence[str], target: Sequence[str]) -> np.ndarray:
    """[Vs] int64, the place in `target` of each of `source`; -1 where it has none, ties: the lower.

    >>> same_spellings(["b", "c"], ["a", "b", "b"]).tolist()
    [1, -1]
    """
    place = {spelling: n for n, spelling in reversed(list(enumerate(target)))}
    return np.array([place.get(spelling, -1) for spelling in source], dtype=np.int64)


def nearest_spellings(
    source: Sequence[str],
    target: Sequence[str],
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The nearest spelling of each, whatever the tokens stand for (the paper's MinED).

    Exact: target spellings are visited by how much their length differs, which is the least
    distance that they can have, until that exceeds the least distance found.

    Args:
        source, target: [Vs], [Vt] spellings.
        advance: called with the number of source spellings done since its last call; the numbers
            add up to Vs.

    Returns:
        [Vs] int64, the place in `target` of least Levenshtein distance, of several the lowest;
        -1 where `target` is empty.

    >>> nearest_spellings(["tokens", "xy"], ["abc", "token", "taken", "y", "x"]).tolist()
    [1, 3]
    """
    nearest = same_spellings(source, target)
    lengths = np.array([len(spelling) for spelling in source], dtype=np.int64)
    target_lengths = np.array([len(spelling) for spelling in target], dtype=np.int64)
    waiting = nearest < 0
    if advance is not None:
        advance(int((~waiting).sum()) if len(target) else len(source))
    if not len(target):
        return nearest
    for length in np.unique(lengths[waiting]).tolist():
        rows = np.nonzero(waiting & (lengths == length))[0]
        rings = _Rings(length, target, target_lengths)
        for start in range(0, len(rows), _TILE_ROWS):
            tile = rows[start : start + _TILE_ROWS]
            nearest[tile] = _nearest_of_tile([source[row] for row in tile], rings)
            if advance is not None:
                advance(len(tile))
    return nearest


class _Rings:
    """The target spellings whose length differs from a given one by 0, 1, 2 and so on."""

    def __init__(self, length: int, target: Sequence[str], lengths: np.ndarray) -> None:
        self._target = target
        gaps = np.abs(lengths - length)
        # A stable sort keeps the places of a ring in order, so that the first is the lowest.
        self._order = np.argsort(gaps, kind="stable")
        self._starts = np.searchsorted(gaps[self._order], np.arange(int(gaps.max()) + 2))
        self._known: dict[int, tuple[np.ndarray, list[str]]] = {}
        self.count = len(self._starts) - 1
        self.longest = max(int(lengths.max()), length)

    def __getitem__(self, gap: int) -> tuple[np.ndarray, list[str]]:
        """(places, spellings), by place."""
        if gap not in self._known:
            places = self._order[self._starts[gap] : self._starts[gap + 1]]
            self._known[gap] = places, [self._target[place] for place in places]
        return self._known[gap]


def _nearest_of_tile(source: list[str], rings: _Rings) -> np.ndarray:
    """[R] places for source spellings of one length."""
    dtype = least_dtype(rings.longest)
    distance = np.full(len(source), np.iinfo(np.int64).max)
    nearest = np.full(len(source), -1, dtype=np.int64)
    for gap in range(rings.count):
        # A spelling that differs by as much in length may be equally near and have a lower place.
        open_rows = np.nonzero(distance >= gap)[0]
        if len(open_rows) == 0:
            break
        places, spelled = rings[gap]
        if len(places) == 0:
            continue
        distances = cdist(
            [source[row] for row in open_rows], spelled, scorer=Levenshtein.distance, dtype=dtype
        )
        column = distances.argmin(axis=1)
        least, place = distances[np.arange(len(open_rows)), column].astype(np.int64), places[column]
        before = distance[open_rows]
        better = (least < before) | ((least == before) & (place < nearest[open_rows]))
        distance[open_rows[better]] = least[better]
        nearest[open_rows[better]] = place[better]
    return nearest


def string_map(source: Encoder, target: Encoder) -> np.ndarray:
    """The target token of the same spelling, Ġ written as ▁ (the paper's EM).

    Returns:
        [Vs] int64 target ids, -1 for none. EOS becomes EOS; no other special token has one, and
        none is one.
    """
    return _over_text(source, target, same_spellings)


def mined_map(
    source: Encoder, target: Encoder, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """The target token of the least Levenshtein distance over spellings (the paper's MinED).

    The same as `string_map` where that has a token; of equally near tokens the one of lower id.

    Args:
        source, target: the two tokenizers.
        advance: called with the number of source ids done since its last call; the numbers add
            up to Vs.

    Returns:
        [Vs] int64 target ids, -1 for none. EOS becomes EOS; no other special token has one, and
        none is one.
    """
    if advance is not None:
        advance(int((~source.vocabulary.is_text).sum()))
    return _over_text(source, target, lambda s, t: nearest_spellings(s, t, advance))


def _over_text(
    source: Encoder,
    target: Encoder,
    places: Callable[[Sequence[str], Sequence[str]], np.ndarray],
) -> np.ndarray:
    """Map the tokens that stand for text among themselves, and EOS to EOS."""
    source_ids = np.nonzero(source.vocabulary.is_text)[0]
    target_ids = np.nonzero(target.vocabulary.is_text)[0]
    source_spellings, target_spellings = spellings(source), spellings(target)
    matches = places(
        [source_spellings[id_] for id_ in source_ids], [target_spellings[id_] for id_ in target_ids]
    )
    ids = np.full(len(source.vocabulary), -1, dtype=np.int64)
    ids[source_ids[matches >= 0]] = target_ids[matches[matches >= 0]]
    return _with_eos(source, target, ids)


def _with_eos(source: Encoder, target: Encoder, ids: np.ndarray) -> np.ndarray:
    if source.vocabulary.eos_id is not None and target.vocabulary.eos_id is not None:
        ids[source.vocabulary.eos_id] = target.vocabulary.eos_id
    return ids
