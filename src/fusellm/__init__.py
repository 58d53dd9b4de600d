"""Fuse the knowledge of several language models into one.

docs/python-api.md shows what each name is for. Names are imported when they are first asked for, so
that `import fusellm` costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_FROM = {
    "align": "fusellm.alignment.text_alignment",
    "Alignment": "fusellm.alignment.text_alignment",
    "bits_per_byte": "fusellm.evaluation.text.bits_per_byte",
    "Conversation": "fusellm.tokens.conversation",
    "compare_tokenizers": "fusellm.explain.tokenizers",
    "Distribution": "fusellm.arrays.read_block",
    "DistributionStore": "fusellm.store.opened",
    "Divergence": "fusellm.objective.divergence",
    "Ensemble": "fusellm.evaluation.text.ensemble",
    "evaluate": "fusellm.evaluation.models",
    "fuse": "fusellm.fusion.texts",
    "FusedDataset": "fusellm.training.dataset",
    "FusedDistributions": "fusellm.fusion.texts",
    "FusellmError": "fusellm.errors",
    "fusion_loss": "fusellm.training.loss",
    "FusionCollator": "fusellm.training.dataset",
    "FusionTrainer": "fusellm.training.trainer",
    "LambdaSchedule": "fusellm.objective.schedule",
    "last_hidden": "fusellm.training.loss",
    "load_pretrained": "fusellm.models.pretrained",
    "load_recipe": "fusellm.recipe_file",
    "open_store": "fusellm.store.opened",
    "read_distributions": "fusellm.reading.texts",
    "Recipe": "fusellm.config",
    "Run": "fusellm.run",
    "SourceDistributions": "fusellm.arrays.source_distributions",
    "StoredBlock": "fusellm.arrays.read_block",
    "StoreFacts": "fusellm.store.facts",
    "Tokenizer": "fusellm.models.tokenizer",
    "vocabulary_map": "fusellm.alignment.strategies",
    "VocabularyMap": "fusellm.alignment.translation",
}
__all__ = ["__version__", *_FROM]  # as in __init__.pyi, which type checkers read


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("fusellm")
        except PackageNotFoundError:  # a folder of sources that nobody has installed
            return "unknown"
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'fusellm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
