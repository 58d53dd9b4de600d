"""What a run will take, before any large work: `Run.plan`, `fusellm plan`.

By shapes: parameters, floating-point operations, memory. By a run in miniature (`probe`): tokens,
bytes on disk, time and memory on this machine, and what each source knows of the text. Everything
that grows with the text is taken to grow in proportion.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.corpus.look import EntryFacts, look_at
from fusellm.evaluation.text.intervals import estimates_of
from fusellm.explain.tokenizers import compare_tokenizers
from fusellm.models.load import default_device
from fusellm.models.readers import Reader
from fusellm.pipeline import Pipeline
from fusellm.plan.cautions import cautions
from fusellm.plan.memory import checkpoint_bytes, of_reading, of_training
from fusellm.plan.probe import Tried, miniature, trainings, try_stages
from fusellm.plan.shapes import Shapes, shapes_of
from fusellm.plan.text import BYTES_PER_TOKEN, PARTS, CutInMiniature, TextSizes, sizes_of
from fusellm.progress import Progress
from fusellm.reading.worker import device_name
from fusellm.stages.evaluate import over_common_bytes, read_nats
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.externalized import TARGET
from fusellm.store.files import make_folder, require_writable
from fusellm.store.manifest import StageFolder
from fusellm.store.planned import MemoryParts, PlannedPair, PlannedStage, RunPlan
from fusellm.store.run_folder import FUSED, PROBE
from fusellm.training.arguments import training_arguments
from fusellm.training.dataset import FusedDataset

_SHAPED_TOKENS = 512  # of the row that shapes are told of
_COMPARED_BYTES = 60_000  # of each domain, for what tokenizers make of each other
_RESAMPLINGS = 1000


def plan_run(
    recipe: Recipe,
    run: Path,
    progress: Progress,
    *,
    processes: int = 1,
    shapes_only: bool = False,
    trusted: bool = False,
) -> RunPlan:
    """What a run will take; what was tried in its folder is removed.

    Args:
        recipe: of one round, with absolute paths.
        run: its folder, whose corpus is counted if it has been cut.
        processes: that are to train.
        shapes_only: whether nothing is tried: models are known by their configurations alone.
        trusted: whether code that models bring along may run where the recipe asks for it.

    Raises:
        RecipeError: how much text there is is not known before it is cut.
        FusellmError: as a run does.
    """
    pipeline = Pipeline(recipe, run, progress, trusted=trusted)
    shapes = _shapes(pipeline.readers, progress)
    arguments = {which: training_arguments(recipe, run, which) for which in trainings(recipe)}
    memory = _memory(recipe, shapes, arguments, processes)
    if shapes_only:
        text = sizes_of(recipe, run, look_at(recipe.corpus, progress), None)
        stages, pairs = _by_shapes(recipe, shapes, arguments, text), {}
    else:
        entries = look_at(recipe.corpus, progress)
        with _folder_for_trying(run) as folder:
            small = miniature(recipe, shapes)
            done: dict[str, Tried] = {}
            for name, tried in try_stages(small, folder, trusted, progress):
                done[name] = tried
                text = _text(recipe, run, entries, small, done)  # an error, if it is not known
            scaled = _Scaled(recipe, folder, done, text, arguments, shapes, processes)
            stages = scaled.stages()
            pairs = _pairs(folder, pipeline.readers)
    full = recipe.training.lora is None
    rate = float(arguments[FUSED].learning_rate) if full else None
    return RunPlan(
        recipe.name,
        _hardware(),
        processes,
        dict(text.bytes),
        text.is_cut,
        stages,
        checkpoint_bytes(recipe, arguments, shapes[TARGET]),
        memory,
        pairs,
        tuple(cautions(pipeline.readers, shapes, pairs, rate)),
    )


@contextmanager
def _folder_for_trying(run: Path) -> Iterator[Path]:
    """An empty folder within a run's, on the disk that the run will write to; then it is removed.

    Raises:
        StoreError: the run's folder cannot be written.
    """
    make_folder(run)
    require_writable(run)
    folder = run / PROBE
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _text(
    recipe: Recipe,
    run: Path,
    entries: Sequence[EntryFacts],
    small: Recipe,
    done: Mapping[str, Tried],
) -> TextSizes:
    """How much text there is, by what is known once the corpus was cut in miniature."""
    cut = None
    if "corpus" in done:
        target = done.get(f"externalize/{TARGET}")
        tokens = 1 if target is None else int(target.counts["tokens"])
        counts = done["corpus"].counts["bytes"]
        cut = CutInMiniature(counts, small.corpus.train_bytes or 0, tokens)
    elif recipe.corpus.generated:
        return TextSizes(dict.fromkeys(PARTS, 0.0), False)  # answers come before the corpus
    return sizes_of(recipe, run, entries, cut)


def _hardware() -> str:
    device = default_device()
    if device.type == "cuda":
        return device_name(device)
    return f"{torch.get_num_threads()} threads of the processor"


def _shapes(readers: Mapping[str, Reader], progress: Progress) -> dict[str, Shapes]:
    shapes = {}
    with progress.start("looking at shapes", len(readers), "models") as bar:
        for name, reader in readers.items():
            context = reader.located.context_tokens or _SHAPED_TOKENS
            shapes[name] = shapes_of(reader.located, min(_SHAPED_TOKENS, context))
            bar.advance()
    return shapes


def _memory(
    recipe: Recipe,
    shapes: Mapping[str, Shapes],
    arguments: Mapping[str, TrainingArguments],
    processes: int,
) -> dict[str, MemoryParts]:
    row = recipe.training.row_tokens
    if recipe.training.rows == "block":
        row = math.ceil(recipe.corpus.block_bytes / BYTES_PER_TOKEN)
    of_sources = {
        source.name: of_reading(source, shapes[source.name], recipe) for source in recipe.sources
    }
    of_target = of_training(shapes[TARGET], recipe, arguments[FUSED], row, processes)
    return {"training": of_target, **of_sources}


def _by_shapes(
    recipe: Recipe,
    shapes: Mapping[str, Shapes],
    arguments: Mapping[str, TrainingArguments],
    text: TextSizes,
) -> tuple[PlannedStage, ...]:
    """What can be said where nothing was tried: tokens, roughly, and operations."""
    tokens = text.bytes["train"] / BYTES_PER_TOKEN
    stages = [PlannedStage("corpus", bytes=sum(text.bytes.values()))]
    stages.append(PlannedStage(f"externalize/{TARGET}", tokens))
    for source in recipe.sources:
        of_source = tokens * shapes[source.name].operations
        stages.append(PlannedStage(f"externalize/{source.name}", tokens, of_source))
    stages.append(PlannedStage("fuse"))
    for which, one in arguments.items():
        trained = tokens * max(one.num_train_epochs, 0)
        of_training = _passes(one) * trained * shapes[TARGET].operations
        size = 4.0 * shapes[TARGET].parameters
        stages.append(PlannedStage(f"train/{which}", trained, of_training, size))
    held_out = text.bytes["held_out"] / BYTES_PER_TOKEN
    models = [*(shapes[source.name] for source in recipe.sources)]
    models += [shapes[TARGET]] * (1 + len(arguments))
    asked = held_out * sum(one.operations for one in models)
    stages.append(PlannedStage("evaluate", held_out * len(models), asked))
    return tuple(stages)


def _passes(arguments: TrainingArguments) -> int:
    """Forward passes that a step is worth: the backward one is two, checkpointing adds one."""
    return 4 if arguments.gradient_checkpointing else 3


@dataclass(frozen=True)
class _Scaled:
    """What was done in miniature, at the size of the run.

    Attributes:
        tried: folder of the run that was made.
        done: by stages.
    """

    recipe: Recipe
    tried: Path
    done: Mapping[str, Tried]
    text: TextSizes
    arguments: Mapping[str, TrainingArguments]
    shapes: Mapping[str, Shapes]
    processes: int

    def stages(self) -> tuple[PlannedStage, ...]:
        """All that were tried, in their order."""
        return tuple(self._stage(name, one) for name, one in self.done.items())

    def _stage(self, name: str, tried: Tried) -> PlannedStage:
        kind, _, which = name.partition("/")
        if kind == "train":
            return self._training(which, tried)
        if kind == "evaluate":
            return self._evaluation(tried)
        ratio = self._ratio("train")
        if kind == "generate":
            ratio = self._prompts(int(which)) / max(tried.counts["prompts"], 1)
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

    def _prompts(self, entry: int) -> float:
        """How many prompts are answered, if the recipe says it; else as many as were tried."""
        return (
            self.recipe.corpus.generated[entry].prompts
            or (self.done[f"generate/{entry}"].counts["prompts"])
        )

    def _training(self, which: str, tried: Tried) -> PlannedStage:
        target, one = self.shapes[TARGET], self.arguments[which]
        rows = FusedDataset(self.tried)
        count = math.ceil(len(rows) * self._ratio("train"))
        each = one.per_device_train_batch_size * one.gradient_accumulation_steps * self.processes
        steps = one.max_steps if one.max_steps > 0 else 0
        steps = steps or math.ceil(math.ceil(count / each) * one.num_train_epochs)
        row = float(np.mean([rows.lengths[list(row)].sum() for row in rows.rows]))
        tokens = min(steps * each, count * max(one.num_train_epochs, 1.0)) * row
        if one.max_steps > 0:
            tokens = steps * each * row
        ratio = steps / max(int(tried.counts["steps"]), 1)
        validations = self.recipe.training.validations
        validating = validations * self.text.bytes["validation"] * self._seconds_a_byte(TARGET)
        checked = validations * self.text.bytes["validation"] / BYTES_PER_TOKEN
        operations = (_passes(one) * tokens + checked) * target.operations
        seconds = tried.seconds_for(ratio) + validating
        size = tried.bytes_for(1.0)
        return PlannedStage(f"train/{which}", tokens, operations, size, seconds, tried.memory)

    def _seconds_a_byte(self, name: str) -> float:
        """What a byte of held-out text takes a model."""
        part = self.done["evaluate"].parts.get(f"evaluating {name}")
        if part is None:  # it is another one's twin
            part = max(self.done["evaluate"].parts.values(), default=0.0)
        return part / max(self._tried_bytes("held_out"), 1.0)

    def _evaluation(self, tried: Tried) -> PlannedStage:
        ratio = self._ratio("held_out")
        tokens = operations = 0.0
        of_each = {name: self._tokens_a_byte(name) for name in self.shapes}
        models = [loop.removeprefix("evaluating ") for loop in tried.parts]
        for model in models:
            name = model if model in self.shapes else TARGET
            own = self.text.bytes["held_out"] * of_each[name]
            tokens, operations = tokens + own, operations + own * self.shapes[name].operations
        size, seconds = tried.bytes_for(ratio), tried.seconds_for(ratio)
        return PlannedStage("evaluate", tokens, operations, size, seconds, tried.memory)

    def _tokens_a_byte(self, name: str) -> float:
        counts = self.done[f"externalize/{name}"].counts
        return float(counts["tokens"]) / max(self._tried_bytes("train"), 1.0)


def _pairs(run: Path, readers: Mapping[str, Reader]) -> dict[str, PlannedPair]:
    """Each source beside the target, on what was tried."""
    blocks = read_part(open_corpus(run), "held_out")
    folder = StageFolder(run / "evaluate")
    names = [name for name in readers if name != TARGET]
    nats = {}
    for name in (TARGET, *names):
        shard = f"{name}.arrow"
        if shard in folder.shards:
            nats[name] = read_nats(folder, shard, blocks)
    differences = [(TARGET, name) for name in names if name in nats]
    better: dict[str, dict[str, float]] = {name: {} for name in names}
    intervals: dict[str, dict[str, tuple[float, float] | None]] = {name: {} for name in names}
    if differences and TARGET in nats:
        scores = over_common_bytes(blocks, nats)
        by_task, _ = estimates_of(scores, _RESAMPLINGS, 0, differences)
        for domain in dict.fromkeys(block.domain for block in blocks):
            for _, name in differences:
                estimate = by_task[domain][f"{TARGET}-{name}"]
                better[name][domain] = float(estimate.value)
                intervals[name][domain] = estimate.interval
    texts = _texts(read_part(open_corpus(run), "train"))
    pairs = {}
    for name in names:
        compared = compare_tokenizers(readers[name].encoder, readers[TARGET].encoder, texts)
        situations = {
            domain.name: {
                case: count / max(domain.positions, 1) for case, count in domain.situations.items()
            }
            for domain in compared.domains
        }
        verdict = compared.verdict(name, "the target")
        pairs[name] = PlannedPair(situations, better[name], intervals[name], verdict)
    return pairs


def _texts(blocks: Sequence[Block]) -> dict[str, list[str]]:
    """Some text of each domain."""
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for block in blocks:
        if sizes.get(block.domain, 0) < _COMPARED_BYTES:
            texts.setdefault(block.domain, []).append(block.text)
            sizes[block.domain] = sizes.get(block.domain, 0) + len(block.text.encode())
    return texts
