"""Strategies: a token alignment and a vocabulary map that go together, by the names a user picks.

B blocks, one after another in flat arrays with offsets; N target positions that predict, in all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

from fusellm.alignment.authors import AuthorsAligner
from fusellm.alignment.dynamic import DynamicAligner
from fusellm.alignment.positions import Situation, align_shard
from fusellm.alignment.translation import (
    VocabularyMap,
    class_translation,
    first_translation,
    longest_translation,
    map_translation,
    same_tokenizer,
)
from fusellm.alignment.vocabulary_maps import mined_map, string_map
from fusellm.arrays.tokens import Tokens
from fusellm.errors import ArgumentError
from fusellm.progress import Progress, Silent
from fusellm.tokens.encode import Encoder, as_encoder


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

MakeAligner = Callable[[Encoder, Encoder, VocabularyMap], Aligner]
"""From source, target and the map between them."""


@dataclass(frozen=True)
class Strategy:
    """A token alignment and a vocabulary map; `as_authors` is the alignment of their own code."""

    translate: Callable[[Encoder, Encoder, Advance | None], VocabularyMap]
    aligner: MakeAligner
    as_authors: MakeAligner | None = None


def boundary_aligner(source: Encoder, target: Encoder, translation: VocabularyMap) -> Aligner:
    """Positions that have read the same bytes (docs/method.md)."""
    dummies = source.has_dummy_prefix or target.has_dummy_prefix
    from_start = same_tokenizer(source, target) or not dummies

    def align(target_read: Tokens, source_read: Tokens) -> Aligned:
        positions, situations = align_shard(
            target_read.ends, target_read.offsets, source_read.ends, source_read.offsets
        )
        first = np.zeros(len(positions), dtype=np.bool_)
        if not from_start:
            first = (target_read.ends[target_read.predicting] == 0) & (positions >= 0)
            positions[first], situations[first] = -1, Situation.UNALIGNED
        return Aligned(positions, situations, first)

    return align


def _dynamic(make: type[DynamicAligner]) -> MakeAligner:
    """Tokens that the paper's dynamic programme pairs, and that are one under the map."""

    def aligner(source: Encoder, target: Encoder, translation: VocabularyMap) -> Aligner:
        programme = make(source, target, translation.outcome_of_source)

        def align(target_read: Tokens, source_read: Tokens) -> Aligned:
            _, situations = align_shard(
                target_read.ends, target_read.offsets, source_read.ends, source_read.offsets
            )
            by_block = [np.zeros(0, dtype=np.int64)]
            for b in range(len(target_read.offsets) - 1):
                of_target = slice(target_read.offsets[b], target_read.offsets[b + 1])
                of_source = slice(source_read.offsets[b], source_read.offsets[b + 1])
                target_ids, source_ids = _read_by_both(
                    target_read.ids[of_target],
                    target_read.ends[of_target],
                    source_read.ids[of_source],
                    source_read.ends[of_source],
                )
                paired = np.full(of_target.stop - of_target.start, -1, dtype=np.int64)
                paired[: len(target_ids)] = programme.align(source_ids, target_ids)
                asked = of_source.stop - of_source.start - 1
                by_block.append(np.where(paired < asked, paired, -1)[:-1])
            whole = np.concatenate(by_block)
            return Aligned(whole, situations, np.zeros(len(whole), dtype=np.bool_))

        return align

    return aligner


def _read_by_both(
    target_ids: np.ndarray, target_ends: np.ndarray, source_ids: np.ndarray, source_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a block as far as both have read it: one may end with its model's context."""
    if not len(target_ids) or not len(source_ids) or target_ends[-1] == source_ends[-1]:
        return target_ids, source_ids
    end = min(target_ends[-1], source_ends[-1])
    return target_ids[target_ends <= end], source_ids[source_ends <= end]


def _classes(source: Encoder, target: Encoder, _: Advance | None) -> VocabularyMap:
    return class_translation(source, target)


def _first(source: Encoder, target: Encoder, _: Advance | None) -> VocabularyMap:
    return first_translation(source, target)


def _longest(source: Encoder, target: Encoder, _: Advance | None) -> VocabularyMap:
    return longest_translation(source, target)


def _string(source: Encoder, target: Encoder, _: Advance | None) -> VocabularyMap:
    return map_translation(string_map(source, target), target)


def _mined(source: Encoder, target: Encoder, advance: Advance | None) -> VocabularyMap:
    return map_translation(mined_map(source, target, advance), target)


STRATEGIES: dict[str, Strategy] = {
    "partition": Strategy(_classes, boundary_aligner),
    "bytes": Strategy(_first, boundary_aligner),
    "bpm": Strategy(_longest, boundary_aligner),
    # FuseLLM, token alignment: minimum edit distance and exact match
    "mined": Strategy(_mined, _dynamic(DynamicAligner), _dynamic(AuthorsAligner)),
    "em": Strategy(_string, _dynamic(DynamicAligner), _dynamic(AuthorsAligner)),
}


def require_strategy(name: str) -> Strategy:
    """A strategy by its name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in STRATEGIES:
        raise ArgumentError(f"there is no strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


_MAPS: WeakKeyDictionary[Encoder, WeakKeyDictionary[Encoder, dict[str, VocabularyMap]]] = (
    WeakKeyDictionary()
)


def vocabulary_map(
    source: Encoder | PreTrainedTokenizerBase,
    target: Encoder | PreTrainedTokenizerBase,
    strategy: str = "partition",
    *,
    progress: Progress | None = None,
) -> VocabularyMap:
    """What each of a source's tokens becomes in the target's vocabulary.

    It takes seconds, and by `mined` minutes for large vocabularies; a second call with the same two
    objects takes none.

    Args:
        source, target: tokenizers, of fusellm or of transformers.
        strategy: as a recipe's `fusion.strategy` (docs/method.md).
        progress: is shown how far it is.

    Raises:
        ArgumentError: something is no tokenizer, or there is no such strategy.
        TokenizerError: a tokenizer's tokens cannot be told as bytes.

    >>> from fusellm import Tokenizer
    >>> prose, python = (Tokenizer.from_pretrained(f"zoo/{n}") for n in ("prose", "python"))
    >>> map_ = vocabulary_map(python, prose)
    >>> imports = python.encode([" import"])[0].ids[0]
    >>> [prose.spelled(id_) for id_ in map_.target_ids(imports).tolist()]
    [' import', ' imported']
    """
    source, target = as_encoder(source), as_encoder(target)
    translate = require_strategy(strategy).translate
    known = _MAPS.setdefault(source, WeakKeyDictionary()).setdefault(target, {})
    if strategy not in known:
        total = len(source.vocabulary)
        with (progress or Silent()).start("mapping vocabularies", total, "tokens") as bar:
            known[strategy] = translate(source, target, bar.advance)
    return known[strategy]
