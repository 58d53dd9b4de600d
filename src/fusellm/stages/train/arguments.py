"""The recipe's `training:` block as transformers' TrainingArguments."""

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.errors import RecipeError

BASELINE = "clm"
_ORDERS = ("random", "sequential", "group_by_length")
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
ASIDE = frozenset(
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


def training_arguments(recipe: Recipe, output: Path, which: str) -> TrainingArguments:
    """The recipe's `training:` block as TrainingArguments, for the fused model or the baseline.

    Raises:
        RecipeError: an unknown name, one that the run decides itself, or a bad value.
    """
    training = recipe.training
    _check_names(training.arguments, "training", set(type(training).model_fields))
    _check_names(training.clm, "training.clm", set())
    chosen = training.arguments | (training.clm if which == BASELINE else {})
    for key in chosen.keys() & {"save_strategy", "logging_strategy"}:
        chosen[key] = "no" if chosen[key] is False else chosen[key]  # which YAML makes of no
    ours: dict[str, Any] = {
        "output_dir": str(output),
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,
        **_validation(training.validations),
    }
    machine: dict[str, Any] = {
        "seed": recipe.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": 2 if torch.accelerator.is_available() else 0,  # reading ahead
    }
    if not torch.accelerator.is_available():
        machine["use_cpu"] = True  # transformers wants to be told, for bf16
    if training.rows == "block":  # packed rows are of like length as they are
        machine["train_sampling_strategy"] = "group_by_length"
    chosen = {_NEW_NAMES.get(key, key): value for key, value in chosen.items()}
    if chosen.get("fsdp") and training.lora is None and "fsdp_config" not in chosen:
        chosen["fsdp_config"] = {"cpu_ram_efficient_loading": True}  # one process alone reads it
    if chosen.get("train_sampling_strategy") not in (None, *_ORDERS):
        raise RecipeError(
            f"training.train_sampling_strategy: {chosen['train_sampling_strategy']} is not one of "
            f"{', '.join(_ORDERS)}"
        )
    try:
        arguments = TrainingArguments(**(_DEFAULTS | machine | chosen | ours))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from None
    if training.keep == "best":
        _keep_best(arguments)
    _ = arguments.device  # counts the GPUs; with several, Trainer would wrap the model by itself
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


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
