"""A run in miniature: every stage does a little of its work, by its own code, and is timed.

The recipe is the user's but for sizes: some blocks of text in place of all, some steps of training.
So what was measured has in it all that the run will do, and what it does once is told apart from
what grows with the text. It is made in a folder of its own, which is removed.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.errors import ModelError
from fusellm.models.load import default_device
from fusellm.models.readers import Reader
from fusellm.pipeline import Pipeline
from fusellm.plan.memory import checkpoints_activations, row_tokens_of
from fusellm.plan.shapes import Shapes
from fusellm.plan.stopwatch import Loop, Stopwatch
from fusellm.preflight import BYTES_PER_TOKEN
from fusellm.progress import Progress
from fusellm.reading.batches import is_out_of_memory
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import CLM, FUSED
from fusellm.store.tables import folder_bytes
from fusellm.store.usage import usage_of

_SECONDS = 12.0  # that one model is read for, about, and as much again that one is trained for
_EFFICIENCY = 0.5  # of a product of large matrices: what models reach, roughly
_LEAST_BLOCKS, _MOST_BYTES = 8, 400_000
_STEPS = 3, 40
_PROMPTS = 32
_SHARD_BLOCKS = 64  # of a record batch on disk: what a smaller one has around it weighs more
_ONCE = ("mapping vocabularies", "reading installed text", "reading what files hold", "looking")
"""Loops that do not grow with the text."""
_TRAINED_ALONE = ("fsdp", "fsdp_config", "deepspeed")
_IN_MINIATURE: dict[str, Any] = {
    "validations": 0,
    "keep": "last",
    "early_stop_validations": None,
    "save_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "constant",  # others want validations, or more steps than there are
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "dataloader_drop_last": False,
}


@dataclass(frozen=True)
class Tried:
    """What a stage did in miniature.

    Attributes:
        seconds: that it took.
        steady: seconds of these that grow with the text, at the rate of a loop that runs.
        growing: bytes of its folder that grow with the text, and
        fixed: those that do not.
        memory: bytes that it held at most.
        counts: of its manifest.
        parts: `steady` by what was done.
    """

    seconds: float
    steady: float
    growing: int
    fixed: int
    memory: float
    counts: Mapping[str, Any]
    parts: Mapping[str, float]

    def seconds_for(self, ratio: float) -> float:
        """Seconds of so many times as much."""
        return max(self.seconds + (ratio - 1) * self.steady, 0.0)

    def bytes_for(self, ratio: float) -> float:
        """Bytes of so many times as much."""
        return self.fixed + ratio * self.growing


def miniature(recipe: Recipe, shapes: Mapping[str, Shapes], arguments: TrainingArguments) -> Recipe:
    """A recipe of a run that takes about a minute, or some where models are large.

    Args:
        shapes: of the models, by name, the target's as "target".
        arguments: of the training.
    """
    speed = _EFFICIENCY * operations_per_second()
    slowest = max(one.operations for one in shapes.values())
    corpus, training = recipe.corpus, recipe.training
    of_time = _SECONDS * speed / slowest * BYTES_PER_TOKEN
    least: float = _LEAST_BLOCKS * min(corpus.block_bytes, 4096)
    rows = arguments.per_device_train_batch_size * min(arguments.gradient_accumulation_steps, 2)
    row = row_tokens_of(recipe)
    least = max(least, rows * row * BYTES_PER_TOKEN)  # or memory is that of smaller batches
    sample = int(min(max(of_time, least), _MOST_BYTES, corpus.train_bytes or _MOST_BYTES))
    batch = row * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    target = next(iter(shapes.values()))
    steps = int(_SECONDS * speed / (3 * target.operations * batch))
    raw = recipe.model_dump(by_alias=True)
    raw["rounds"] = 1
    domains = len({entry.domain for entry in corpus.documents})
    raw["corpus"] |= {
        "train_bytes": sample,
        "train_tokens": None,
        "validation_bytes": 2 * corpus.block_bytes,
        "held_out_bytes": max(sample // (2 * domains), 2 * corpus.block_bytes),
        "shard_blocks": min(corpus.shard_blocks, _shard(sample // corpus.block_bytes)),
    }
    for number in corpus.generated:
        generated = raw["corpus"]["documents"][number]["generated"]
        generated["prompts"] = min(generated["prompts"] or _PROMPTS, _PROMPTS)
        raw["corpus"]["shard_blocks"] = 2
    raw["evaluation"] |= {"suites": [], "resamplings": 1000, "continuations": 0}
    raw["externalize"] |= {"not_finite_share": 1.0, "changed_share": 1.0}  # of few blocks
    ours = _IN_MINIATURE | {"max_steps": min(max(steps, _STEPS[0]), _STEPS[1])}
    raw["training"] |= ours
    for key in (*_TRAINED_ALONE, "warmup_ratio"):
        raw["training"].pop(key, None)
    if checkpoints_activations(arguments):
        raw["training"]["gradient_checkpointing"] = True
    left_out = {*ours, *_TRAINED_ALONE, "warmup_ratio"}
    raw["training"]["clm"] = {k: v for k, v in training.clm.items() if k not in left_out}
    return Recipe.model_validate(raw)


def _shard(blocks: int) -> int:
    """Blocks of a shard: there are to be several, or a rate cannot be told."""
    return _SHARD_BLOCKS if blocks >= 2 * _SHARD_BLOCKS else max(math.ceil(blocks / 2), 1)


def operations_per_second() -> float:
    """What this machine does of a product of large matrices, in floating-point operations."""
    device = default_device()
    on_gpu = device.type == "cuda"
    width, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    given = torch.ones((width, width), dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        product = given @ given
        if on_gpu:
            product[0, 0].item()  # waits for it
        best = max(best, 2 * width**3 / (time.perf_counter() - began))
    return best


def try_stages(
    recipe: Recipe,
    run: Path,
    readers: Mapping[str, Reader],
    trusted: bool,
    progress: Progress,
) -> Iterator[tuple[str, Tried | None]]:
    """Make a run in miniature, stage by stage.

    Args:
        recipe: as `miniature` gives it.
        run: a folder that is not there yet.
        readers: the recipe's models.

    Yields:
        (name of a stage, what it did); None of one for which the device has no room, the last.

    Raises:
        FusellmError: as a run does.
    """
    stopwatch = Stopwatch(progress)
    pipeline = Pipeline(recipe, run, stopwatch, trusted=trusted, readers=readers)
    for stage in pipeline.stages:
        if stage.command == "report":
            continue
        stopwatch.taken()
        try:
            pipeline.execute([stage.name])
        except (MemoryError, RuntimeError, ModelError) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, Exception) or not is_out_of_memory(cause):
                raise
            yield stage.name, None
            return
        if stage.complete:
            yield stage.name, _tried(run, stage.name, stopwatch.taken())


def _tried(run: Path, name: str, loops: Sequence[Loop]) -> Tried:
    folder, usage = run / name, usage_of(run)[name]
    growing = sum(path.stat().st_size for path in folder.glob("*.arrow"))
    fixed = folder_bytes(folder) - growing
    if name == "fuse":  # the sets of outcomes are of two vocabularies, whatever the text
        shards = sum(path.stat().st_size for path in folder.glob("train-*.arrow"))
        fixed, growing = fixed + growing - shards, shards
    parts: dict[str, float] = {}
    for loop in loops:
        if not loop.what.startswith(_ONCE):
            parts[loop.what] = parts.get(loop.what, 0.0) + loop.steady
    counts = StageFolder(folder).counts
    steady = sum(parts.values())
    return Tried(usage.seconds, steady, growing, fixed, usage.device_memory, counts, parts)


def trainings(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe trains."""
    return (FUSED, CLM) if recipe.training.clm_baseline else (FUSED,)
