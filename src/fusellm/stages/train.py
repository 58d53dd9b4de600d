"""train: continue the target on L = λ·L_CLM + (1−λ)·L_Fusion, and the CLM baseline on λ = 1.

On transformers' Trainer, so that everything users know of it works. Checkpoints live beside the
model's folder, which itself holds an ordinary model and no pickle.
"""

import difflib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from fusellm.config import Recipe
from fusellm.errors import NumericsError, RecipeError
from fusellm.evaluation.bits_per_byte import blocks_nats, by_domain
from fusellm.models.load import Located, load_model
from fusellm.models.objective_forward import objective_forward, require_packing
from fusellm.models.training_batches import (
    Collator,
    OutcomeTable,
    Rows,
    RowsOfLikeLength,
    clm_rows,
    fused_rows,
)
from fusellm.progress import Bar, Progress
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.files import sync_files, write_text
from fusellm.store.fused import open_fused
from fusellm.store.identity import Identity
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoded, Encoder

FOLDER = "train"
FUSED, CLM = "fused", "clm"
LOG = "log.jsonl"
_WHOLE = "saved-whole"  # in a checkpoint's folder, once all of it is on disk

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
}
# What a run itself decides. Setting one in a recipe would be silently without effect, or wrong.
_OURS = {
    "output_dir": "the run's folder is set with --out",
    "data_seed": "training.seed is used",
    "remove_unused_columns": "fused distributions are columns of their own",
    "resume_from_checkpoint": "an interrupted run goes on by itself",
    "eval_strategy": "training.validations says how often",
    "eval_steps": "training.validations says how often",
    "label_smoothing_factor": "the objective is λ·L_CLM + (1−λ)·L_Fusion",
    "push_to_hub": "upload the finished folder instead",
}

# Names that change what is logged and kept, and no weight.
_ASIDE = {
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


def folder_of(run: Path, which: str) -> Path:
    """Folder of the fused model or the CLM baseline."""
    return run / FOLDER / which


def checkpoints_of(run: Path, which: str) -> Path:
    """Folder of the checkpoints of an unfinished training."""
    return run / FOLDER / f"{which}-checkpoints"


def training_arguments(recipe: Recipe, output: Path, which: str) -> TrainingArguments:
    """The recipe's `training:` block as TrainingArguments, for the fused model or the baseline.

    Raises:
        RecipeError: an unknown name, one that the run decides itself, or a bad value.
    """
    own = set(type(recipe.training).model_fields)
    _check_names(recipe.training.arguments, "training", own)
    _check_names(recipe.training.clm, "training.clm", set())
    chosen = recipe.training.arguments | (recipe.training.clm if which == CLM else {})
    validations = recipe.training.validations
    ours = {
        "output_dir": str(output),
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "steps" if validations else "no",
        "eval_steps": 1 / validations if validations > 1 else None,
    }
    if validations == 1:
        ours["eval_strategy"] = "epoch"
    try:
        machine: dict[str, Any] = {
            "seed": recipe.seed,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        if recipe.training.rows == "block":  # packed rows are of like length as they are
            machine["train_sampling_strategy"] = "group_by_length"
        arguments = TrainingArguments(**(_DEFAULTS | machine | chosen | ours))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {' '.join(str(error).split())}") from None
    if arguments.world_size > 1:
        raise RecipeError("training on several processes does not work yet; start one process")
    _ = arguments.device  # counts the GPUs; with several, Trainer would wrap the model by itself
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_names(arguments: dict[str, Any], place: str, own: set[str]) -> None:
    known = {field.name for field in fields(TrainingArguments)}
    for key in arguments:
        if key in _OURS:
            raise RecipeError(f"{place}.{key} cannot be set: {_OURS[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known | own, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"unknown key {place}.{key}{hint}")


def identity(recipe: Recipe, which: str, located: Located, inputs: dict[str, str]) -> Identity:
    """What a trained model is made from.

    Args:
        inputs: fingerprints of the stages that it reads.
    """
    training = recipe.training.model_dump(exclude={"clm_baseline", "validations", "clm"} | _ASIDE)
    settings: dict[str, Any] = {
        "training": training | (recipe.training.clm if which == CLM else {}),
        "seed": recipe.seed,
    }
    if which == FUSED:
        settings["fusion"] = {"lambda": recipe.fusion.lambda_, "rest": recipe.fusion.rest}
    return Identity(f"train/{which}", settings, {"weights": located.fingerprint} | inputs)


def run_train(
    recipe: Recipe,
    run: Path,
    which: str,
    located: Located,
    identity_: Identity,
    encoder: Encoder,
    card: str,
    progress: Progress,
) -> None:
    """Train the fused model or the CLM baseline, or go on training it.

    Raises:
        NumericsError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    checkpoints = checkpoints_of(run, which)
    arguments = training_arguments(recipe, checkpoints, which)
    with StageWriter.open(folder_of(run, which), identity_) as folder:
        if folder.complete:
            shutil.rmtree(checkpoints, ignore_errors=True)
            return
        torch.manual_seed(arguments.seed)
        spread = located.settings.model_copy(update={"device_map": None})  # accelerate places it
        model = load_model(replace(located, settings=spread), arguments.device, torch.float32)
        corpus = open_corpus(run)
        rows = fused_rows(run, corpus) if which == FUSED else clm_rows(run, corpus)
        packed = recipe.training.rows == "packed"
        if packed:
            require_packing(model)
            rows = rows.pack(recipe.training.row_tokens, arguments.seed)
        table = _table(recipe, run) if which == FUSED else None
        validation = _Validation(encoder, read_part(corpus, "validation"), recipe)
        trainer = _ObjectiveTrainer(
            model,
            arguments,
            rows,
            Collator(table, recipe.fusion.lambda_, packed),
            validation,
        )
        with objective_forward(model), progress.start(f"training {which}", 0, "steps") as bar:
            trainer.add_callback(_Watch(bar))
            trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
        _save(folder, model, encoder.tokenizer, card, trainer.records())
        folder.finish(trainer.counts())
    shutil.rmtree(checkpoints, ignore_errors=True)


def _last_checkpoint(checkpoints: Path) -> str | None:
    """The last checkpoint that was saved whole; what a kill left of others is removed."""
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / _WHOLE).exists():
            shutil.rmtree(folder)
    found = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    return None if found is None else str(found)


def _table(recipe: Recipe, run: Path) -> OutcomeTable:
    names = [source.name for source in recipe.sources]
    return OutcomeTable(open_fused(run), names, recipe.fusion.rest == "renormalize")


def _save(
    folder: StageWriter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    records: Sequence[dict[str, Any]],
) -> None:
    model.save_pretrained(folder.path)
    tokenizer.save_pretrained(folder.path)
    folder.adopt_all()
    folder.write_text("README.md", card)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder.write_text(LOG, "".join(lines))


class _Validation:
    """Bits per byte of the validation part, during training."""

    def __init__(self, encoder: Encoder, blocks: Sequence[Block], recipe: Recipe) -> None:
        self._domains = [block.domain for block in blocks]
        self._lengths = [len(block.text.encode()) for block in blocks]
        self._encoded: list[Encoded] = encoder.encode(
            [block.text for block in blocks], [block.last for block in blocks]
        )
        self._batch_tokens = recipe.evaluation.batch_tokens

    def __len__(self) -> int:
        return len(self._encoded)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        nats = blocks_nats(model, self._encoded, self._lengths, self._batch_tokens)
        return by_domain(self._domains, nats)


class _ObjectiveTrainer(Trainer):
    """Trainer whose model's forward is the objective; logs the parts of the loss."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Rows,
        collator: Collator,
        validation: _Validation,
    ) -> None:
        # The signature of forward decides whether Trainer counts the predicted tokens of a batch.
        with objective_forward(model):
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=rows,
                eval_dataset=[None] * len(validation),
                data_collator=collator,
            )
        self._validation = validation
        self._row_tokens = rows.row_tokens()
        self._clm_weight = collator.clm_weight
        self._parts: dict[str, float] = {}
        self._since = (time.perf_counter(), 0)
        self.remove_callback(PrinterCallback)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        sync_files(folder)
        write_text(folder / _WHOLE, "")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return RowsOfLikeLength(self._row_tokens, rows, self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        found = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = found["loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        predicted = (inputs["labels"][:, 1:] >= 0).sum()
        outcomes = inputs.get("outcomes")
        sums = {"clm": found["clm"], "predicted": predicted}
        if outcomes is not None:
            sums |= {"fusion": found["fusion"], "fused": outcomes["present"].sum()}
        for name, value in sums.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().double().item()
        return (loss, found) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            logs = logs | self._logged_parts()
            self._parts = {}
        super().log(logs, start_time)

    def _logged_parts(self) -> dict[str, Any]:
        parts = self._parts
        now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
        began, before = self._since
        self._since = (now, tokens)
        fused = parts.get("fused", 0.0)
        return {
            "clm_loss": parts["clm"] / parts["predicted"],
            "fusion_loss": parts["fusion"] / fused if fused else None,
            "fused_share": fused / parts["predicted"],
            "lambda": self._clm_weight,
            "tokens": tokens,
            "tokens_per_second": round((tokens - before) / (now - began), 1),
        }

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        found = self._validation.measure(model.eval())
        model.train(training)
        metrics = {f"eval_{domain}": value for domain, value in found.items()}
        self.log(metrics | {"tokens": self.state.num_input_tokens_seen})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def records(self) -> list[dict[str, Any]]:
        """The log as lines for people and the report."""
        lines: list[dict[str, Any]] = []
        for entry in self.state.log_history:
            if "clm_loss" in entry:
                lines.append({"steps": self.state.max_steps, **entry})
            elif any(key.startswith("eval_") for key in entry):
                domains = {k.removeprefix("eval_"): v for k, v in entry.items() if k[:5] == "eval_"}
                place = {"step": entry["step"], "tokens": entry["tokens"]}
                lines.append(place | {"validation": domains})
        return lines

    def counts(self) -> dict[str, Any]:
        """What the training counted."""
        return {"steps": self.state.global_step, "tokens": self.state.num_input_tokens_seen}


class _Watch(TrainerCallback):
    """Shows the bar and stops at a loss that is no number."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._validated = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.resize(state.max_steps)
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "eval_mean" in logs:
            self._validated = f"validation {logs['eval_mean']:.3f} bits/byte"
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NumericsError(
                f"the loss is {loss} by step {state.global_step}; lower training.learning_rate, or "
                "use dtype float32. The last checkpoint is kept"
            )
        self._bar.advance(0, self._validated)
