"""How much text a run will have: as it was cut, or by the recipe's budgets and its files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusellm.config import CorpusSettings, Recipe
from fusellm.corpus.look import EntryFacts
from fusellm.errors import RecipeError
from fusellm.preflight import BYTES_PER_TOKEN
from fusellm.store.manifest import StageFolder

PARTS = ("train", "validation", "held_out")
_UNPACKED = frozenset(("text", "jsonl", "json", "csv", "tsv"))  # files at least as large as text


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
        asked: what of each part was asked for.
        target_tokens: of the part train, as a budget in tokens counts them.
    """

    bytes: Mapping[str, Mapping[str, int]]
    asked: CorpusSettings
    target_tokens: int


def sizes_of(
    recipe: Recipe,
    run: Path,
    entries: Sequence[EntryFacts],
    is_cut: bool,
    tried: CutInMiniature | None,
) -> TextSizes:
    """How much text a run will have.

    Args:
        run: its folder.
        entries: of `corpus.documents`.
        is_cut: whether its corpus has been cut, and is counted.
        tried: what was cut in miniature; None where nothing was.

    Raises:
        RecipeError: nothing says how much text there is.
    """
    if is_cut:
        return TextSizes(_sums(StageFolder(run / "corpus").counts["bytes"]), True)
    settings = recipe.corpus
    budgets, files = _budgets(settings, _whole_budget(settings, tried)), _files(settings, entries)
    records = {one.domain for one in entries if one.kinds.keys() - {"text"}}
    left = 1 - settings.validation_share - settings.held_out_share
    parts = dict.fromkeys(PARTS, 0.0)
    for domain, budget in budgets.items():
        seen = {} if tried is None else _all_there_is(tried, domain)
        whole = files.get(domain, math.inf)
        if budget == math.inf and domain in records:  # their text is less than their bytes
            whole = math.inf
        train = min(budget, whole * left, seen.get("train", math.inf))
        if train == math.inf:
            raise RecipeError(
                "corpus.train_bytes is not set, so that how much text there is is known once it is "
                f"cut: `fusellm corpus` first, and then plan again; or set it (domain {domain})"
            )
        whole = min(whole, math.inf if budget < math.inf else train / left)
        measured = {
            "validation": (settings.validation_bytes, settings.validation_share),
            "held_out": (settings.held_out_bytes, settings.held_out_share),
        }
        parts["train"] += train
        for part, (most, share) in measured.items():
            parts[part] += min(most, whole * share, seen.get(part, math.inf))
    return TextSizes(parts, False)


def _all_there_is(tried: CutInMiniature, domain: str) -> dict[str, float]:
    """Bytes of the parts for which less text was there than was asked for, little as it was."""
    settings = tried.asked
    weights = sum(entry.weight for entry in settings.documents)
    # An entry that has run out is not filled up from another one of its domain.
    smallest = min(one.weight for one in settings.documents if one.domain == domain) / weights
    asked = {
        "train": smallest * float(settings.train_bytes or math.inf),
        "validation": float(settings.validation_bytes),
        "held_out": float(settings.held_out_bytes),
    }
    own = {part: float(tried.bytes[part].get(domain, 0)) for part in PARTS}
    # Budgets are filled to a block.
    return {part: size for part, size in own.items() if size + settings.block_bytes < asked[part]}


def _sums(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {part: float(sum(counts[part].values())) for part in PARTS}


def _whole_budget(settings: CorpusSettings, tried: CutInMiniature | None) -> float:
    """Bytes to train on; infinity where the recipe sets none."""
    if settings.train_tokens is None:
        return float(settings.train_bytes or math.inf)
    per_token = BYTES_PER_TOKEN
    if tried is not None and tried.target_tokens > 1:
        per_token = sum(tried.bytes["train"].values()) / tried.target_tokens
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
    """Most bytes of text of the domains that are files alone, and not packed."""
    sizes: dict[str, float] = {}
    for documents, entry in zip(settings.documents, entries, strict=True):
        plain = bool(entry.kinds) and entry.kinds.keys() <= _UNPACKED
        own = float(entry.bytes) if plain else math.inf
        sizes[documents.domain] = sizes.get(documents.domain, 0.0) + own
    return sizes
