"""Strategies: a token alignment and a vocabulary map that go together, by the names a user picks.

B blocks, one after another in flat arrays with offsets; N target positions that predict, in all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fusellm.alignment.authors import AuthorsAligner
from fusellm.alignment.dynamic import DynamicAligner
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.translation import (
    Translation,
    class_translation,
    first_translation,
    map_translation,
    same_tokenizer,
)
from fusellm.alignment.vocabulary_maps import mined_map, string_map
from fusellm.arrays.tokens import Tokens as Tokens
from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Aligned:
    """Which source position belongs to each target position.

    Attributes:
        source: [N] its place within the block, -1 for none.
        situations: [N] int8 of `Situation`, by boundaries, whatever the alignment; unaligned too
            where token healing has left nothing of a distribution.
        first: [N] bool, positions left unaligned because only one of two tokenizers writes a
            dummy space before the block.
    """

    source: np.ndarray
    situations: np.ndarray
    first: np.ndarray


Advance = Callable[[int], None]
"""Called with the number of source ids done since its last call."""

Aligner = Callable[[Tokens, Tokens], Aligned]
"""From the target's and the source's reading of the same blocks."""

MakeAligner = Callable[[Encoder, Encoder, Translation], Aligner]
"""From source, target and the map between them."""


@dataclass(frozen=True)
class Strategy:
    """A token alignment and a vocabulary map; `as_authors` is the alignment of their own code."""

    translate: Callable[[Encoder, Encoder, Advance | None], Translation]
    aligner: MakeAligner
    as_authors: MakeAligner | None = None


def boundary_aligner(source: Encoder, target: Encoder, translation: Translation) -> Aligner:
    """Positions that have read the same bytes (docs/method.md)."""
    marks = source.vocabulary.space_mark or target.vocabulary.space_mark
    from_start = same_tokenizer(source, target) or not marks

    def align(theirs: Tokens, mine: Tokens) -> Aligned:
        found, situations = align_shard(theirs.ends, theirs.offsets, mine.ends, mine.offsets)
        first = np.zeros(len(found), dtype=np.bool_)
        if not from_start:
            first = (theirs.ends[theirs.predicting] == 0) & (found >= 0)
            found[first], situations[first] = -1, Situation.UNALIGNED
        return Aligned(found, situations, first)

    return align


def _dynamic(make: type[DynamicAligner]) -> MakeAligner:
    """Tokens that the paper's dynamic programme pairs, and that are one under the map."""

    def aligner(source: Encoder, target: Encoder, translation: Translation) -> Aligner:
        programme = make(source, target, translation.outcome_of_source)

        def align(theirs: Tokens, mine: Tokens) -> Aligned:
            _, situations = align_shard(theirs.ends, theirs.offsets, mine.ends, mine.offsets)
            found = [np.zeros(0, dtype=np.int64)]
            for b in range(len(theirs.offsets) - 1):
                target_ids = theirs.ids[theirs.offsets[b] : theirs.offsets[b + 1]]
                source_ids = mine.ids[mine.offsets[b] : mine.offsets[b + 1]]
                paired = programme.align(source_ids, target_ids)[:-1]
                found.append(np.where(paired < len(source_ids) - 1, paired, -1))
            whole = np.concatenate(found)
            return Aligned(whole, situations, np.zeros(len(whole), dtype=np.bool_))

        return align

    return aligner


def _classes(source: Encoder, target: Encoder, _: Advance | None) -> Translation:
    return class_translation(source, target)


def _first(source: Encoder, target: Encoder, _: Advance | None) -> Translation:
    return first_translation(source, target)


def _string(source: Encoder, target: Encoder, _: Advance | None) -> Translation:
    return map_translation(string_map(source, target), target)


def _mined(source: Encoder, target: Encoder, advance: Advance | None) -> Translation:
    return map_translation(mined_map(source, target, advance), target)


STRATEGIES: dict[str, Strategy] = {
    "partition": Strategy(_classes, boundary_aligner),
    "bytes": Strategy(_first, boundary_aligner),
    # FuseLLM, section 3.3: minimum edit distance and exact match
    "mined": Strategy(_mined, _dynamic(DynamicAligner), _dynamic(AuthorsAligner)),
    "em": Strategy(_string, _dynamic(DynamicAligner), _dynamic(AuthorsAligner)),
}
