"""One source beside the target: all that fusion has to know of their two tokenizers."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fusellm.alignment.continuations import Continuations
from fusellm.alignment.positions import Situation
from fusellm.alignment.strategies import STRATEGIES, Aligner
from fusellm.alignment.target_cuts import TargetCuts
from fusellm.alignment.translation import VocabularyMap, same_tokenizer
from fusellm.alignment.written_on import WrittenOn
from fusellm.arrays.distributions import Distributions, Kept
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.tokens import Tokens
from fusellm.config import FusionSettings
from fusellm.fusion.fuse import Reading
from fusellm.fusion.healing import heal, where_cut
from fusellm.fusion.inside import inside, within
from fusellm.tokens.encode import Encoder


@dataclass(frozen=True)
class Healing:
    """What token healing has to know of a source and the target."""

    continuations: Continuations
    cuts: TargetCuts


@lru_cache(maxsize=16)  # it remembers what it has asked the tokenizers
def healing_of(source: Encoder, target: Encoder) -> Healing | None:
    """That of a source and the target; None where the two cut every text alike.

    What a source says at a boundary that it has by the target's own rules is what the target has to
    learn there.
    """
    if same_tokenizer(source, target):
        return None
    return Healing(Continuations(source, target), TargetCuts(source, target))


@lru_cache(maxsize=16)  # it grows with what it is asked
def tree_of(
    source: Encoder, target: Encoder, map_: VocabularyMap, strategy: str
) -> WrittenOn | None:
    """By which classes are split along the text; None where the two cut every text alike."""
    if same_tokenizer(source, target):
        return None
    return WrittenOn(source, target, map_, longest=strategy == "bpm")


@dataclass(frozen=True)
class Pairing:
    """A source and the target.

    Attributes:
        translation: the source's vocabulary map.
        aligner: the token alignment.
        healing: None for none.
        tree: by which classes are split along the text; None where they are not.
        asks_inside: whether the source is asked within its tokens, with healing only.
    """

    translation: VocabularyMap
    aligner: Aligner
    healing: Healing | None
    tree: WrittenOn | None = None
    asks_inside: bool = False

    @property
    def sets(self) -> OutcomeSets:
        """The outcomes that the source's distributions are over, as sets of target ids."""
        return self.translation.sets if self.tree is None else self.tree.sets

    def reading(self, target: Tokens, tokens: Tokens, kept: Kept) -> Reading:
        """The source's reading of some blocks.

        Args:
            target, tokens: the blocks as the target and the source read them.
            kept: the source's distributions at all but each block's last position.
        """
        aligned, told = self.aligner(target, tokens), None
        given = stored = kept.distributions()
        if self.healing is not None:
            given = heal(tokens, kept, self.healing.continuations)
            there = np.nonzero(aligned.source >= 0)[0]
            read = target.predicting[there]
            block = np.searchsorted(target.offsets, read, side="right") - 1
            rows = tokens.position_offsets[block] + aligned.source[there]
            # Where the target is said to join what the text goes on with, though it has a boundary
            # there, it was not asked for enough: `·6` and `8` are joined, and yet `·6851` is `·6`,
            # `851`. Nothing is taken away then.
            last, cuts = target.ids[read], self.healing.cuts
            told_right = ~cuts.spanned(last, tokens.ids[tokens.predicting[rows] + 1])
            given, left_of = where_cut(given, rows[told_right], last[told_right], cuts)
            left = ~told_right
            left[told_right] = left_of
            source, situations = aligned.source.copy(), aligned.situations.copy()
            source[there[~left]], situations[there[~left]] = -1, Situation.UNALIGNED
            aligned = replace(aligned, source=source, situations=situations)
            if self.asks_inside:
                given, told = self._inside(self.healing, target, tokens, kept, stored, given)
        log_prob, healed = kept.true_log_prob, self.healing is not None
        map_, tree = self.translation, self.tree
        return Reading(tokens, given, log_prob, map_, aligned, healed, stored, tree, told)

    def _inside(
        self,
        healing: Healing,
        target: Tokens,
        tokens: Tokens,
        kept: Kept,
        stored: Distributions,
        given: Distributions,
    ) -> tuple[Distributions, np.ndarray]:
        """(distributions with those within tokens behind them, [N] their rows; -1 for none)."""
        asked, further = inside(within(target, tokens), tokens, kept, stored, healing.continuations)
        rows = np.arange(len(asked.rows))
        read = target.ids[target.predicting[asked.positions]]
        further, left = where_cut(further, rows, read, healing.cuts)
        told = np.full(len(target.predicting), -1, dtype=np.int64)
        told[asked.positions[left]] = len(given.tail) + rows[left]
        return given.and_then(further), told


def pair(
    source: Encoder, target: Encoder, map_: VocabularyMap, settings: FusionSettings
) -> Pairing:
    """A source beside the target, by a recipe's settings.

    Args:
        map_: the source's vocabulary map, of the settings' strategy.
    """
    strategy = STRATEGIES[settings.strategy]
    authors = strategy.as_authors if settings.compatibility == "paper" else None
    aligner = (authors or strategy.aligner)(source, target, map_)
    healing = healing_of(source, target) if settings.heals else None
    tree = tree_of(source, target, map_, settings.strategy) if settings.refines else None
    return Pairing(map_, aligner, healing, tree, settings.inside_tokens)
