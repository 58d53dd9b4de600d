"""A rehearsal: a toy is trained for two steps by the recipe's own settings.

What is not installed, what a scheduler or an optimizer wants, and what does not go together is said
by the libraries only once they build it. So they build it before anything is read.
"""

import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations import integration_utils
from transformers.utils import logging as transformers_logging

from fusellm.config import Recipe
from fusellm.errors import NumericsError, StoreError
from fusellm.objective.divergence import CROSS_ENTROPY
from fusellm.objective.schedule import LambdaSchedule
from fusellm.store.identity import digest
from fusellm.training.arguments import (
    cannot_be_used,
    culprit,
    settings_of,
    training_arguments,
)
from fusellm.training.nan_report import Blame
from fusellm.training.rows import Rows
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.stop import Stop
from fusellm.training.validation import Validation

_ROWS, _ROW_TOKENS, _VOCABULARY = 8, 4, 8
# A toy's training has these instead: small, quiet, alone, and without what a toy tells nothing of.
_TOY: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_steps": 2,
    "disable_tqdm": True,
    "full_determinism": False,  # which holds for all of the process
    "torch_compile": False,  # which takes half a minute
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
}


class _ToyBlocks:
    """Blocks of four tokens."""

    lengths = np.full(_ROWS, _ROW_TOKENS)
    predicted = lengths - 1
    windows = np.zeros(_ROWS, dtype=np.int64)

    def block(self, number: int) -> dict[str, Any]:
        return {"block": number, "ids": np.arange(_ROW_TOKENS)}


class _ToyValidation(Validation):
    """A validation that measures nothing."""

    def __init__(self) -> None:
        """No text is read."""

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        return {"mean": 1.0}


class _NoBlame(Blame):
    """What becomes of a toy's numbers is nobody's fault."""

    def __init__(self) -> None:
        pass

    def error(self, what: str, blocks: Sequence[int]) -> NumericsError:
        return NumericsError(what)


_REHEARSED: set[str] = set()
"""Settings that a toy was trained by in this process, which need it no second time."""


def rehearse(recipe: Recipe, which: str) -> None:
    """Train a toy as the recipe would train the fused model or the baseline.

    Raises:
        RecipeError: that fails. It names the setting without which it does not.
        StoreError: the system's folder for temporary files cannot be written.
    """
    key = digest([recipe.training.model_dump(mode="json"), recipe.seed, which])
    if key in _REHEARSED:
        return
    with _quietly():
        try:
            _train(recipe, which)
        except StoreError:  # a disk that is full, say
            raise
        except Exception as error:  # of any library
            given = settings_of(recipe, which)
            guilty = culprit(list(given), lambda keys: _train(_only(recipe, keys), which))
            raise cannot_be_used(given, guilty, error) from error
    _REHEARSED.add(key)


def _only(recipe: Recipe, keys: Sequence[str]) -> Recipe:
    """A recipe with some of its settings of training."""
    training = recipe.training
    settings = training.model_dump(exclude=training.arguments.keys() - set(keys))
    settings["clm"] = {key: value for key, value in training.clm.items() if key in keys}
    return recipe.model_copy(update={"training": type(training).model_validate(settings)})


def _train(recipe: Recipe, which: str) -> None:
    """Train a toy; what its numbers come to does not matter."""
    _require_compiler({key: value for key, (_, value) in settings_of(recipe, which).items()})
    model = _toy()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ObjectiveTrainer(
            model,
            arguments := training_arguments(recipe, Path(folder), which, _TOY),
            Rows(_ToyBlocks()),
            LambdaSchedule(1.0),
            CROSS_ENTROPY,
            _ToyValidation(),
            _NoBlame(),
            Stop(),
        )
        trainer.get_train_dataloader()
        # Its processes need not be started besides.
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
        arguments.dataloader_persistent_workers = False
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__module__ == integration_utils.__name__:  # would report to others
                trainer.remove_callback(callback)
        with suppress(NumericsError):
            trainer.train()


def _toy() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=_ROW_TOKENS,
    )
    return LlamaForCausalLM(config)


def _require_compiler(chosen: dict[str, Any]) -> None:
    """Check the names of what would compile the model.

    Raises:
        ValueError: one is unknown.
    """
    backend, mode = chosen.get("torch_compile_backend"), chosen.get("torch_compile_mode")
    if backend is not None and backend not in torch.compiler.list_backends(None):
        raise ValueError(f"backends of torch are {', '.join(torch.compiler.list_backends())}")
    if mode is not None and mode not in torch._inductor.list_mode_options():
        raise ValueError(f"modes of torch are {', '.join(torch._inductor.list_mode_options())}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a trace: chance goes on as if nothing had been drawn, and nothing is said."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()
            random.setstate(python)
            np.random.set_state(arrays)
