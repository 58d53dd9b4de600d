"""How much text a run will have: as it was cut, or by the recipe's budgets and its files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusellm.config import CorpusSettings, Recipe
from fusellm.corpus.look import EntryFacts
from fusellm.errors import RecipeError
from fusellm.store.manifest import MANIFEST, StageFolder

PARTS = ("train", "validation", "held_out")
BYTES_PER_TOKEN = 3.5
"""Of text, where no tokenizer was asked."""
_PLAIN = frozenset(("text",))  # files that are as large as their text
_FILLED = 0.9  # of a budget: what has less has read all the text there is


@dataclass(frozen=True)
class TextSizes:
    """Bytes of text by part, and whether they were counted."""

    bytes: Mapping[str, float]
    is_cut: bool


@dataclass(frozen=True)
class CutInMiniature:
    """What was cut of a corpus with a small budget.

    Attributes:
        bytes: by part and domain.
        budget: bytes to train on that were asked for.
        target_tokens: of the part train.
    """

    bytes: Mapping[str, Mapping[str, int]]
    budget: int
    target_tokens: int


def sizes_of(
    recipe: Recipe, run: Path, entries: Sequence[EntryFacts], cut: CutInMiniature | None
) -> TextSizes:
    """How much text a run will have.

    Args:
        run: its folder; a corpus in it that is cut is counted.
        entries: of `corpus.documents`.
        cut: what was cut in miniature; None where nothing was.

    Raises:
        RecipeError: nothing says how much text there is.
    """
    if (run / "corpus" / MANIFEST).exists() and (corpus := StageFolder(run / "corpus")).complete:
        return TextSizes(_sums(corpus.counts["bytes"]), True)
    settings = recipe.corpus
    budgets, files = _budgets(settings, _whole_budget(settings, cut)), _files(settings, entries)
    left = 1 - settings.validation_share - settings.held_out_share
    parts = dict.fromkeys(PARTS, 0.0)
    for domain, budget in budgets.items():
        whole = files.get(domain, math.inf)
        train = min(budget, whole * left)
        if cut is not None:
            tried = cut.bytes["train"].get(domain, 0)
            if tried < _FILLED * _budgets(settings, cut.budget)[domain]:
                train = min(train, tried)
        if train == math.inf:
            raise RecipeError(
                "corpus.train_bytes is not set, so that how much text there is is known once it is "
                f"cut: `fusellm corpus` first, and then plan again; or set it (domain {domain})"
            )
        parts["train"] += train
        whole = min(whole, math.inf if budget < math.inf else train / left)
        parts["validation"] += min(settings.validation_bytes, whole * settings.validation_share)
        parts["held_out"] += min(settings.held_out_bytes, whole * settings.held_out_share)
    return TextSizes(parts, False)


def _sums(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {part: float(sum(counts[part].values())) for part in PARTS}


def _whole_budget(settings: CorpusSettings, cut: CutInMiniature | None) -> float:
    """Bytes to train on; infinity where the recipe sets none."""
    if settings.train_tokens is None:
        return float(settings.train_bytes or math.inf)
    per_token = BYTES_PER_TOKEN
    if cut is not None:
        per_token = sum(cut.bytes["train"].values()) / max(cut.target_tokens, 1)
    return settings.train_tokens * per_token


def _budgets(settings: CorpusSettings, whole: float) -> dict[str, float]:
    """Bytes to train on of each domain, by the weights of its entries."""
    weights = sum(entry.weight for entry in settings.documents)
    budgets: dict[str, float] = {}
    for entry in settings.documents:
        own = whole * entry.weight / weights
        budgets[entry.domain] = budgets.get(entry.domain, 0.0) + own
    return budgets


def _files(settings: CorpusSettings, entries: Sequence[EntryFacts]) -> dict[str, float]:
    """Bytes of text of the domains that are plain files alone."""
    sizes: dict[str, float] = {}
    for documents, entry in zip(settings.documents, entries, strict=True):
        plain = bool(entry.kinds) and entry.kinds.keys() <= _PLAIN
        own = float(entry.bytes) if plain else math.inf
        sizes[documents.domain] = sizes.get(documents.domain, 0.0) + own
    return sizes
