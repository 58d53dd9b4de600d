"""The recipe's `training:` block as transformers' TrainingArguments."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.errors import RecipeError
from fusellm.store.run_folder import CLM
from fusellm.training.values import as_written, checked

_ORDERS = ("random", "sequential", "group_by_length")
_REASON_CHARACTERS = 300
METRIC = "eval_mean"  # bits per byte of the validation part, mean over the domains

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
}
_BY_KEEP = "training.keep: best keeps the model of the best validation, by bits per byte"
# What a run itself decides. Setting one in a recipe would be silently without effect, or wrong.
_OURS = {
    "output_dir": "the run's folder is set with --out",
    "data_seed": "training.seed is used",
    "remove_unused_columns": "fused distributions are columns of their own",
    "resume_from_checkpoint": "an interrupted run goes on by itself",
    "eval_strategy": "training.validations says how often",
    "eval_steps": "training.validations says how often",
    "label_smoothing_factor": "the objective is λ·L_CLM + (1−λ)·L_Fusion",
    "load_best_model_at_end": _BY_KEEP,
    "metric_for_best_model": _BY_KEEP,
    "greater_is_better": _BY_KEEP,
    "logging_nan_inf_filter": "a loss that is no number stops the training",
    "enable_jit_checkpoint": "a training that is stopped saves a checkpoint by itself",
    "accelerator_config": "rows are divided among processes so that none is read twice",
    "save_on_each_node": "all processes share the run's folder",
    "auto_find_batch_size": "rows are in an order for the batch size that the recipe has",
    "save_only_model": "an interrupted run goes on with its optimizer",
    "ignore_data_skip": "an interrupted run goes on at the row where it was",
    "include_num_input_tokens_seen": "tokens are always counted",
    "parallelism_config": "it is an object of Python; training.fsdp spreads a model",
    "local_rank": "give --nproc N, or start by accelerate launch",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "Trainer itself reads it nowhere"),
    **dict.fromkeys(
        (
            "bf16_full_eval",
            "fp16_full_eval",
            "batch_eval_metrics",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
            "label_names",
            "length_column_name",
            "per_device_eval_batch_size",
            "prediction_loss_only",
        ),
        "validation is bits per byte, in batches of evaluation.batch_tokens",
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "give --push-to-hub to fusellm train or fusellm run",
    ),
}

_FIELDS = frozenset(field.name for field in fields(TrainingArguments))
# Names that transformers still takes, with a warning, by those that it has come to prefer.
_NEW_NAMES = {
    old: new
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs")
    if (new := old.replace("gradient", "activation")) in _FIELDS
}

# Names that change what is logged and kept, and no weight.
CHANGE_NO_WEIGHT = frozenset(
    {
        "logging_steps",
        "logging_first_step",
        "logging_dir",
        "report_to",
        "run_name",
        "disable_tqdm",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
    }
)


def training_arguments(
    recipe: Recipe, output: Path, which: str, instead: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """The recipe's `training:` block as TrainingArguments, for the fused model or the baseline.

    Args:
        instead: what a rehearsal has in place of the recipe's own.

    Raises:
        RecipeError: an unknown name, one that the run decides itself, or a bad value.
    """
    training = recipe.training
    given = settings_of(recipe, which)
    ours: dict[str, Any] = {
        "output_dir": str(output),
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,
        **_validation(training.validations),
        **(instead or {}),
    }
    fixed = _DEFAULTS | _by_machine(recipe)

    def build(chosen: Mapping[str, Any]) -> TrainingArguments:
        return TrainingArguments(**(fixed | _adjusted(recipe, chosen) | ours))

    chosen = {key: value for key, (_, value) in given.items()}
    try:
        arguments = build(chosen)
    except Exception as error:  # ImportError of a package that is not there, and others
        guilty = culprit(list(chosen), lambda keys: build({k: chosen[k] for k in keys}))
        raise cannot_be_used(given, guilty, error) from error
    if training.keep == "best":
        _keep_best(arguments)
    _ = arguments.device  # counts the GPUs; with several, Trainer would wrap the model by itself
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def settings_of(recipe: Recipe, which: str) -> dict[str, tuple[str, Any]]:
    """(place in the recipe, value) of each TrainingArgument that a recipe sets.

    Raises:
        RecipeError: an unknown name, one that the run decides itself, or a bad value.
    """
    training = recipe.training
    _check_names(training.arguments, "training", set(type(training).model_fields))
    _check_names(training.clm, "training.clm", set())
    settings = {}
    blocks = {"training": training.arguments}
    if which == CLM:
        blocks["training.clm"] = training.clm
    for place, block in blocks.items():
        for key, value in block.items():
            if key in ("save_strategy", "logging_strategy") and value is False:
                value = "no"  # which YAML makes false of
            settings[key] = place, checked(place, key, value)
    place, order = settings.get("train_sampling_strategy", ("", _ORDERS[0]))
    if order not in _ORDERS:
        raise RecipeError(
            f"{place}.train_sampling_strategy: {order} is not one of {', '.join(_ORDERS)}"
        )
    return settings


def _by_machine(recipe: Recipe) -> dict[str, Any]:
    """What is otherwise than transformers has it, by the machine and the recipe's other fields."""
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": 2 if torch.accelerator.is_available() else 0,  # reading ahead
    }
    if not torch.accelerator.is_available():
        settings["use_cpu"] = True  # transformers wants to be told, for bf16
    if recipe.training.rows == "block":  # packed rows are of like length as they are
        settings["train_sampling_strategy"] = "group_by_length"
    return settings


def _adjusted(recipe: Recipe, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that transformers has come to prefer, with what they want besides."""
    settings = {_NEW_NAMES.get(key, key): value for key, value in chosen.items()}
    if settings.get("fsdp") and recipe.training.lora is None and "fsdp_config" not in settings:
        settings["fsdp_config"] = {"cpu_ram_efficient_loading": True}  # one process alone reads it
    return settings


def culprit(keys: list[str], attempt: Callable[[list[str]], object]) -> str | None:
    """The first of some settings without which an attempt does not fail.

    >>> culprit(["a", "b"], lambda keys: 1 / ("b" not in keys))
    'b'
    """
    for key in keys:
        try:
            attempt([other for other in keys if other != key])
        except Exception:  # of any library
            continue
        return key
    return None


def cannot_be_used(
    given: Mapping[str, tuple[str, Any]], key: str | None, error: Exception
) -> RecipeError:
    """What a library says of a setting, in one line.

    Args:
        given: as `settings_of` gives it.
        key: of the setting; None if it is none alone.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > _REASON_CHARACTERS:
        reason = f"{reason[:_REASON_CHARACTERS]}…"
    if key is None:
        return RecipeError(f"training cannot be as the recipe has it: {reason}")
    place, value = given[key]
    return RecipeError(f"{place}.{key}: {as_written(value)} cannot be used: {reason}")


def require_processes(arguments: TrainingArguments, count: int) -> None:
    """Check that so many processes can train by these arguments.

    Raises:
        RecipeError: they cannot.
    """
    if count > 1 and not arguments.average_tokens_across_devices:
        raise RecipeError(
            "training.average_tokens_across_devices: false has no meaning with several processes, "
            "whose loss is divided by the tokens of all of them; leave it out"
        )
    if not is_sharded(arguments):
        return
    if count == 1:
        raise RecipeError(
            "training.fsdp spreads a model over several processes, and there is one: give "
            "--nproc N, or leave it out"
        )
    state = arguments.distributed_state
    if state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        raise RecipeError("training.fsdp needs GPUs: accelerate has no FSDP on CPUs; leave it out")
    plugin = arguments.fsdp_plugin_args or {"fsdp_version": os.environ.get("FSDP_VERSION", "1")}
    if int(plugin["fsdp_version"]) != 2:
        raise RecipeError(
            "training is sharded by FSDP2 only, and version 1 is asked for: set fsdp_version: 2 in "
            "accelerate's configuration, or training.fsdp: true and no version"
        )


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether FSDP spreads the model: by the recipe, or by what `accelerate launch` was told."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return bool(arguments.fsdp) or launched


def _validation(validations: int) -> dict[str, Any]:
    """Arguments by which there are so many validations."""
    if validations == 0:
        return {"eval_strategy": "no", "eval_steps": None}
    own = {"metric_for_best_model": METRIC, "greater_is_better": False}
    if validations == 1:
        return own | {"eval_strategy": "epoch", "eval_steps": None}
    return own | {"eval_strategy": "steps", "eval_steps": 1 / validations}


def _keep_best(arguments: TrainingArguments) -> None:
    """Load the best checkpoint in the end.

    Set here because TrainingArguments would have checkpoints and validations at the same steps; a
    checkpoint is saved at each best validation besides.
    """
    if arguments.save_strategy == "no":
        raise RecipeError(
            "training.keep: best is loaded from its checkpoint, and training.save_strategy: no "
            "saves none; leave save_strategy out"
        )
    arguments.load_best_model_at_end = True


def _check_names(arguments: dict[str, Any], place: str, own: set[str]) -> None:
    for key in arguments:
        if key in _OURS:
            raise RecipeError(f"{place}.{key} cannot be set: {_OURS[key]}")
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS | own, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"unknown key {place}.{key}{hint}")
