"""Whether a model, its tokenizer, a dataset and the objective go together: asked before a training.

What does not would train on the wrong tokens in silence, or fail hours later.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from fusellm.errors import ArgumentError, ModelError, TokenizerError
from fusellm.models.adapters import without_adapters
from fusellm.models.configurations import context_tokens
from fusellm.models.heads import is_sharded, require_known_head
from fusellm.models.tokenizers import tokenizer_at
from fusellm.objective.divergence import Divergence
from fusellm.tokens.encode import Encoder, as_encoder
from fusellm.training.forward import require_packing
from fusellm.training.loss import require_no_router_loss, require_rows
from fusellm.training.rows import Rows

_NO_LOGITS = (
    "has no logits to look at, which are never there as a whole: take eval_clm_loss and "
    "eval_fusion_loss, which are logged (metric_for_best_model), or measure in a callback's "
    "on_evaluate, by fusellm.bits_per_byte(model, tokenizer, texts)"
)
_MEANINGLESS = {
    "model_init": "is not known here: give the model itself",
    "compute_loss_func": "is not known here: the loss is λ·L_CLM + (1−λ)·L_Fusion; give "
    "lambda_ and divergence",
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Fit:
    """What datasets have to go with: a model, its tokenizer, and the objective."""

    def __init__(
        self,
        target: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        divergence: Divergence,
    ) -> None:
        """Look at a model.

        Args:
            tokenizer: its own; None where it is not known.

        Raises:
            ArgumentError: it is none of transformers, or adds a loss of its router.
        """
        model = without_adapters(target)
        if not isinstance(model, PreTrainedModel):
            raise ArgumentError(f"model is a {type(target).__name__}; give one of transformers")
        require_no_router_loss(model)
        self._model, self._tokenizer, self._divergence = model, tokenizer, divergence
        self._keeps_apart = False  # packed texts, as far as it was looked at

    def require_all(self, name: str, datasets: Any) -> None:
        """Check one dataset, or each of a dictionary; None is none."""
        if isinstance(datasets, Mapping):
            for key, rows in datasets.items():
                self.require(f"{name}[{key!r}]", rows)
        elif datasets is not None:
            self.require(name, datasets)

    def require(self, name: str, rows: Any) -> None:
        """Check that texts fit into the model, and that distributions are of its tokens.

        Args:
            name: what the dataset is called.

        Raises:
            ArgumentError: they do not, or are not; or it is no dataset of ours.
            ModelError: the head is not known, or packed rows' texts are not kept apart.
        """
        if not isinstance(rows, Rows):
            raise ArgumentError(f"{name} is a {type(rows).__name__}; give a fusellm.FusedDataset")
        model = self._model
        if not is_sharded(model):  # which was looked at while it was whole
            require_known_head(model)
            if rows.packed and not self._keeps_apart:
                require_packing(model)
                self._keeps_apart = True
        room, longest = context_tokens(model.config), rows.longest_text
        if room is not None and longest > room:
            raise ArgumentError(
                f"the longest text of {name} has {longest} tokens, and the model's context is "
                f"{room}; cut it, or give for_chat(context_tokens={room}) where texts are "
                "conversations"
            )
        self._require_tokens(name, rows)
        self._require_distributions(name, rows)

    @cached_property
    def _own_encoder(self) -> Encoder:
        """The model's own tokenizer; datasets are measured many times in a training."""
        assert self._tokenizer is not None
        return as_encoder(self._tokenizer, self._model.config.get_text_config().vocab_size)

    def _require_tokens(self, name: str, rows: Rows) -> None:
        encoder: Encoder | None = getattr(rows, "encoder", None)
        if encoder is None or self._tokenizer is None or self._tokenizer is encoder.tokenizer:
            return
        own = self._own_encoder
        other = differing_id(encoder, own)
        if other is not None:
            raise ArgumentError(
                f"{name} is in the tokens of {encoder.tokenizer.name_or_path!r}, and the model's "
                f"tokenizer is {own.tokenizer.name_or_path!r}: id {other} is "
                f"{encoder.spelled(other)!r} in the one and {own.spelled(other)!r} in the other. "
                "Give fuse() the model's tokenizer; or give the trainer that of the dataset as "
                "processing_class=, if the model has been made to read its tokens"
            )

    def _require_distributions(self, name: str, rows: Rows) -> None:
        table = getattr(rows, "table", None)
        if table is None:
            return
        require_rows(table.largest_id, self._model.config.get_text_config().vocab_size)
        wanted = self._divergence.temperature
        if table.temperature != wanted:
            raise ArgumentError(
                f"the distributions of {name} are flattened by temperature {table.temperature:g}, "
                f"and the target's would be by {wanted:g}; give both the same"
            )


def differing_id(one: Encoder, other: Encoder) -> int | None:
    """The first id that is another token of text in another tokenizer; None if there is none.

    Rules need not be equal for ids to mean the same: a padding token may have been added since, or
    another token be put before a text.
    """
    pairs = zip_longest(one.vocabulary.token_bytes, other.vocabulary.token_bytes)
    return next((id_ for id_, (token, twin) in enumerate(pairs) if token != twin), None)


def tokenizer_beside(target: torch.nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the folder, or of the files from the hub, that a model was loaded from.

    None where there is none at hand, or it cannot be loaded without running code of its own.
    """
    name = str(getattr(without_adapters(target), "name_or_path", ""))
    folder = Path(name).expanduser() if name else None
    if folder is not None and not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, _TOKENIZER_FILES[0])
        except HFValidationError:  # no name of the hub either
            return None
        folder = Path(cached).parent if isinstance(cached, str) else None
    if folder is None or not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = tokenizer_at(str(folder))
        as_encoder(tokenizer)
    except (ModelError, TokenizerError):
        return None
    return tokenizer


def require_known(args: Any, others: Mapping[str, Any]) -> None:
    """Check that nothing is asked of a trainer that has no meaning with the objective.

    Args:
        args: its TrainingArguments.
        others: what it is given besides, by name.

    Raises:
        ArgumentError: something is.
    """
    if not isinstance(args, TrainingArguments):
        raise ArgumentError(
            f"args is a {type(args).__name__}; give transformers' TrainingArguments, as in "
            "FusionTrainer(model, args, dataset)"
        )
    if args.label_smoothing_factor:
        raise ArgumentError("label_smoothing_factor has no place in λ·L_CLM + (1−λ)·L_Fusion")
    for name, why in _MEANINGLESS.items():
        if others.get(name) is not None:
            raise ArgumentError(f"{name} {why}")
