"""A run's stages with what they will take: from what was tried, or from shapes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.plan.memory import checkpoints_activations, row_tokens_of
from fusellm.plan.probe import Tried
from fusellm.plan.shapes import Shapes
from fusellm.plan.text import PARTS, TextSizes
from fusellm.preflight import BYTES_PER_TOKEN
from fusellm.store.externalized import TARGET
from fusellm.store.planned import PlannedStage
from fusellm.tokens.encode import Encoder
from fusellm.training.dataset import FusedDataset


def steps_of(arguments: TrainingArguments, rows: int, processes: int) -> tuple[int, float]:
    """(steps, rows that they read) of a training, as transformers' Trainer counts them.

    Args:
        rows: of an epoch.
        processes: that train, each on rows of its own.
    """
    batches = rows / (arguments.per_device_train_batch_size * processes)
    # Several processes fill up their last batch.
    drops = arguments.dataloader_drop_last and processes == 1
    batches = math.floor(batches) if drops else math.ceil(batches)
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    steps = math.ceil(arguments.num_train_epochs * per_epoch)
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    return steps, rows * steps / per_epoch


def passes_of(arguments: TrainingArguments, trains_adapters: bool) -> int:
    """Forward passes that a step of training is worth.

    The backward one is two: gradients of what goes in, and of weights, which adapters alone do
    nearly without. Activation checkpointing adds one.
    """
    return (2 if trains_adapters else 3) + checkpoints_activations(arguments)


@dataclass(frozen=True)
class Sizes:
    """What both ways of planning know.

    Attributes:
        arguments: of each training.
        shapes: of each model that reads the corpus, by name, the target's as "target".
        processes: that train.
    """

    recipe: Recipe
    text: TextSizes
    arguments: Mapping[str, TrainingArguments]
    shapes: Mapping[str, Shapes]
    processes: int

    def training(self, which: str, rows: int, row_tokens: float) -> PlannedStage:
        """A training, without what was tried of it.

        Args:
            rows: of an epoch.
            row_tokens: of a row, on average.
        """
        one = self.arguments[which]
        steps, read = steps_of(one, rows, self.processes)
        tokens = read * row_tokens
        passes = passes_of(one, self.recipe.training.lora is not None)
        checked = self.validated_bytes(which) / BYTES_PER_TOKEN
        operations = (passes * tokens + checked) * self.shapes[TARGET].operations
        return PlannedStage(f"train/{which}", tokens, operations, steps=steps)

    def validated_bytes(self, which: str) -> float:
        """Bytes of all validations of a training."""
        times = float(self.recipe.training.validations)
        if times == 1 and self.arguments[which].max_steps <= 0:  # one in each epoch
            times = math.ceil(self.arguments[which].num_train_epochs)
        return times * self.text.bytes["validation"]


def by_shapes(sizes: Sizes, store_bytes: float | None) -> tuple[PlannedStage, ...]:
    """What can be said where nothing was tried: tokens, roughly, operations, and disk, roughly.

    Args:
        store_bytes: of all sources' and the fused distributions; None where that is not known.
    """
    recipe, text, shapes = sizes.recipe, sizes.text, sizes.shapes
    tokens = text.bytes["train"] / BYTES_PER_TOKEN
    each = None if store_bytes is None else store_bytes / (len(recipe.sources) + 1)
    stages = [PlannedStage("corpus", bytes=sum(text.bytes.values()))]
    stages.append(PlannedStage(f"externalize/{TARGET}", tokens, bytes=2 * tokens))
    for source in recipe.sources:
        of_source = tokens * shapes[source.name].operations
        stages.append(PlannedStage(f"externalize/{source.name}", tokens, of_source, each))
    stages.append(PlannedStage("fuse", bytes=each))
    row = row_tokens_of(recipe)
    for which in sizes.arguments:
        trained = sizes.training(which, math.ceil(tokens / row), row)
        size = 4.0 * shapes[TARGET].parameters
        if recipe.training.lora is not None and not recipe.training.lora.merge:
            size = 4.0 * recipe.training.lora.r * shapes[TARGET].linear
        stages.append(_with(trained, bytes=size))
    held_out = text.bytes["held_out"] / BYTES_PER_TOKEN
    models = [*(shapes[source.name] for source in recipe.sources)]
    models += [shapes[TARGET]] * (1 + len(sizes.arguments))
    asked = held_out * sum(one.operations for one in models)
    stages.append(PlannedStage("evaluate", held_out * len(models), asked))
    return tuple(stages)


def _with(stage: PlannedStage, **changes: float | None) -> PlannedStage:
    return PlannedStage(**(vars(stage) | changes))


@dataclass(frozen=True)
class Scaled(Sizes):
    """What was done in miniature, at the size of the run.

    Attributes:
        tried: folder of the run that was made, and
        small: its recipe.
        encoder: the target's.
        done: by the names of stages.
    """

    tried: Path
    small: Recipe
    encoder: Encoder
    done: Mapping[str, Tried]

    def stages(self, rough: Sequence[PlannedStage]) -> tuple[PlannedStage, ...]:
        """All of a run, in their order.

        Args:
            rough: by shapes, for those that were not tried.
        """
        return tuple(
            self._stage(one.name, self.done[one.name]) if one.name in self.done else one
            for one in rough
        )

    def _stage(self, name: str, tried: Tried) -> PlannedStage:
        kind, _, which = name.partition("/")
        if kind == "train":
            return self._training(which, tried)
        if kind == "evaluate":
            return self._evaluation(tried)
        ratio = self._ratio("train")
        tokens = tried.counts.get("tokens")
        tokens = None if tokens is None else tokens * ratio
        operations = None
        if tokens is not None and which in self.shapes and which != TARGET:
            operations = tokens * self.shapes[which].operations
        if kind == "corpus":
            ratio = sum(self.text.bytes.values()) / sum(map(self._tried_bytes, PARTS))
        size, seconds = tried.bytes_for(ratio), tried.seconds_for(ratio)
        return PlannedStage(name, tokens, operations, size, seconds, tried.memory)

    def _tried_bytes(self, part: str) -> float:
        return float(sum(self.done["corpus"].counts["bytes"][part].values()))

    def _ratio(self, part: str) -> float:
        return self.text.bytes[part] / max(self._tried_bytes(part), 1.0)

    def _training(self, which: str, tried: Tried) -> PlannedStage:
        rows = FusedDataset.of_run(self.small, self.tried, self.encoder, self.small.seed)
        row = float(np.mean([rows.lengths[list(one)].sum() for one in rows.rows]))
        planned = self.training(which, math.ceil(len(rows) * self._ratio("train")), row)
        ratio = (planned.tokens or 0.0) / self.processes / max(int(tried.counts["tokens"]), 1)
        validating = self.validated_bytes(which) * self._seconds_a_byte() / self.processes
        seconds = tried.seconds_for(ratio) + validating
        return _with(planned, bytes=tried.bytes_for(1.0), seconds=seconds, memory=tried.memory)

    def _seconds_a_byte(self) -> float:
        """What a byte of held-out text takes the target."""
        parts = self.done["evaluate"].parts if "evaluate" in self.done else {}
        named = (f"evaluating {name}" for name in ("fused", "clm", TARGET))
        part = next((parts[name] for name in named if name in parts), 0.0)
        return part / max(self._tried_bytes("held_out"), 1.0)

    def _evaluation(self, tried: Tried) -> PlannedStage:
        ratio = self._ratio("held_out")
        tokens = operations = 0.0
        for model in (loop.removeprefix("evaluating ") for loop in tried.parts):
            name = model if model in self.shapes else TARGET
            counts = self.done[f"externalize/{name}"].counts
            a_byte = float(counts["tokens"]) / max(self._tried_bytes("train"), 1.0)
            own = self.text.bytes["held_out"] * a_byte
            tokens, operations = tokens + own, operations + own * self.shapes[name].operations
        size, seconds = tried.bytes_for(ratio), tried.seconds_for(ratio)
        return PlannedStage("evaluate", tokens, operations, size, seconds, tried.memory)
