"""What a run will take, before any large work: `Run.plan`, `fusellm plan`.

By shapes: parameters, floating-point operations, memory. By a run in miniature (`probe`): tokens,
bytes on disk, time and memory on this machine, and what each source knows of the text. Everything
that grows with the text is taken to grow in proportion.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from fusellm.config import Recipe
from fusellm.corpus.look import look_at
from fusellm.errors import ModelError, RecipeError, StoreError
from fusellm.models.load import default_device
from fusellm.models.readers import Reader
from fusellm.models.remote_code import require_trusted
from fusellm.pipeline import Pipeline
from fusellm.plan.amounts import Scaled, Sizes, by_shapes
from fusellm.plan.cautions import cautions
from fusellm.plan.memory import checkpoint_bytes, of_reading, of_training
from fusellm.plan.pairs import pairs_of
from fusellm.plan.probe import Tried, miniature, trainings, try_stages
from fusellm.plan.shapes import Shapes, shapes_of
from fusellm.plan.text import CutInMiniature, sizes_of
from fusellm.preflight import is_same, projected_store_bytes
from fusellm.progress import Progress
from fusellm.reading.worker import device_name
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.externalized import TARGET
from fusellm.store.files import alone_in, make_folder, require_writable
from fusellm.store.identity import digest
from fusellm.store.planned import MemoryParts, PlannedPair, PlannedStage, RunPlan
from fusellm.store.run_folder import FUSED, PROBE, recipe_text
from fusellm.store.writer import take_lock
from fusellm.tokens.encode import Encoder
from fusellm.training.arguments import training_arguments

_SHAPED_TOKENS = 512  # of the row that shapes are told of


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
        run: its folder, whose corpus is counted if it has been cut from this recipe.
        processes: that are to train.
        shapes_only: whether nothing is tried: models are known by their configurations alone.
        trusted: whether code that models bring along may run where the recipe asks for it.

    Raises:
        RecipeError: how much text there is is not known before it is cut.
        FusellmError: as a run does.
    """
    for model in (recipe.target, *recipe.sources):
        require_trusted(model, trusted, progress)
    pipeline = Pipeline(recipe, run, progress, trusted=trusted)
    cut = _is_cut(pipeline, progress)
    if recipe.corpus.generated and not cut:
        raise RecipeError(
            "what models will have written is not known before they have: `fusellm generate` and "
            "`fusellm corpus` first, and then plan what is left"
        )
    readers, shapes = pipeline.readers, _shapes(pipeline.readers, progress)
    arguments = {which: training_arguments(recipe, run, which) for which in trainings(recipe)}
    entries = [] if cut else look_at(recipe.corpus, progress)

    def sizes(tried: CutInMiniature | None = None) -> Sizes:
        text = sizes_of(recipe, run, entries, cut, tried)
        return Sizes(recipe, text, arguments, shapes, processes)

    if shapes_only:
        made = _Made(sizes(), by_shapes(sizes(), _store_bytes(sizes())))
    else:
        with _folder_for_trying(run) as folder:
            small = miniature(recipe, shapes, arguments[FUSED])
            run_tried = try_stages(small, folder / "run", readers, trusted, progress)
            made = _made(small, folder / "run", run_tried, readers, sizes)
    own = [source.name for source in recipe.sources if source.referee]
    return RunPlan(
        recipe.name,
        digest(recipe_text(recipe, run)),
        _hardware(),
        processes,
        dict(made.sizes.text.bytes),
        made.sizes.text.is_cut,
        made.stages,
        checkpoint_bytes(recipe, arguments, shapes[TARGET]),
        _memory(recipe, shapes, arguments, processes),
        made.pairs,
        (*made.told, *cautions(readers, shapes, made.pairs, _rate(recipe, arguments[FUSED]), own)),
    )


@dataclass(frozen=True)
class _Made:
    """What is known of a run.

    Attributes:
        told: what a user should know of how it was tried.
    """

    sizes: Sizes
    stages: tuple[PlannedStage, ...]
    pairs: Mapping[str, PlannedPair] = field(default_factory=dict)
    told: tuple[str, ...] = ()


def _made(
    small: Recipe,
    folder: Path,
    tried: Iterator[tuple[str, Tried | None]],
    readers: Mapping[str, Reader],
    sizes_by: Callable[[CutInMiniature | None], Sizes],
) -> _Made:
    """What is known once a run was made in miniature.

    Args:
        small: its recipe.
        folder: of it.
        tried: makes it, stage by stage.
        sizes_by: gives the run's sizes; a RecipeError, where they are not known by then.
    """
    done: dict[str, Tried] = {}
    sizes: Sizes | None = None
    told: list[str] = []
    encoder = readers[TARGET].encoder
    for name, one in tried:
        if one is None:
            told.append(
                f"this device has no room for {name}: it and what follows was not tried, and its "
                "time is not known"
            )
            break
        done[name] = one
        if "corpus" in done:
            sizes = sizes_by(_cut_in_miniature(small, folder, encoder, done))
    if sizes is None:
        raise ModelError(f"{told[0]}; plan with --shapes")
    tried_in = folder, small, encoder, done
    own = sizes.recipe, sizes.text, sizes.arguments, sizes.shapes, sizes.processes
    stages = Scaled(*own, *tried_in).stages(by_shapes(sizes, _store_bytes(sizes)))
    referees = [source.name for source in sizes.recipe.sources if source.referee]
    told += [*_unread(sizes.recipe, done), *_cut_conversations(done)]
    return _Made(sizes, stages, pairs_of(folder, readers, referees), tuple(told))


def _is_cut(pipeline: Pipeline, progress: Progress) -> bool:
    """Whether a run's corpus is there, and was cut from its recipe."""
    corpus = next(stage for stage in pipeline.stages if stage.command == "corpus")
    identity = corpus.identity() if corpus.complete else None
    return identity is not None and is_same(corpus.folder, identity, progress)


def _rate(recipe: Recipe, arguments: TrainingArguments) -> float | None:
    """The learning rate, where others are known that it can be held against."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if recipe.training.lora is not None or not name.startswith("adamw"):
        return None
    return float(arguments.learning_rate)


def _store_bytes(sizes: Sizes) -> float | None:
    """Of all distributions, roughly, by how much text there is."""
    own = sizes.recipe.corpus.model_copy(
        update={"train_bytes": int(sizes.text.bytes["train"]), "train_tokens": None}
    )
    return projected_store_bytes(sizes.recipe.model_copy(update={"corpus": own}), [])


def _unread(recipe: Recipe, done: Mapping[str, Tried]) -> Iterator[str]:
    """Models that could not read more of what was tried than the recipe lets pass."""
    shares = {
        "walk_failed": recipe.externalize.changed_share,
        "not_finite": recipe.externalize.not_finite_share,
    }
    for name, tried in done.items():
        for what, share in shares.items():
            count, blocks = tried.counts.get(what, 0), max(tried.counts.get("blocks", 0), 1)
            if name.startswith("externalize/") and count / blocks > share:
                yield (
                    f"{name.removeprefix('externalize/')} cannot read {count:,} of {blocks:,} "
                    f"blocks that were tried, and the run stops at a share of {share:g}"
                )


def _cut_conversations(done: Mapping[str, Tried]) -> Iterator[str]:
    """Models whose context conversations are longer than."""
    for name, tried in done.items():
        if name.startswith("externalize/") and tried.counts.get("cut"):
            share = tried.counts["cut"] / max(tried.counts["blocks"], 1)
            yield (
                f"{name.removeprefix('externalize/')}: {share:.0%} of the conversations that were "
                "tried are longer than its context, and are read as far as it goes"
            )


@contextmanager
def _folder_for_trying(run: Path) -> Iterator[Path]:
    """An empty folder within a run's, on the disk that the run will write to; then it is removed.

    Raises:
        StoreError: the run's folder cannot be written.
    """
    was_there = run.exists()
    make_folder(run)
    try:
        require_writable(run)
        for left in run.glob(f"{PROBE}*"):
            _remove_what_is_left(left)
        folder = Path(tempfile.mkdtemp(prefix=PROBE, dir=run))
        try:
            with alone_in(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not was_there:
            with suppress(OSError):  # something is in it
                run.rmdir()


def _remove_what_is_left(folder: Path) -> None:
    """Of a plan that was killed; one that is being made holds its folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:  # it is no folder, and so none of ours
        return
    try:
        take_lock(descriptor, folder)
        shutil.rmtree(folder, ignore_errors=True)
    except StoreError:
        return
    finally:
        os.close(descriptor)


def _cut_in_miniature(
    small: Recipe, folder: Path, encoder: Encoder, done: Mapping[str, Tried]
) -> CutInMiniature:
    """What was cut, with its tokens where they are the unit of the budget."""
    target, tokens = done.get(f"externalize/{TARGET}"), 1
    if small.corpus.has_conversations:  # where it counts what is learnt
        texts = [block.text for block in read_part(open_corpus(folder), "train")]
        tokens = sum(len(one.ids) for one in encoder.encode(texts))
    elif target is not None:
        tokens = int(target.counts["tokens"])
    return CutInMiniature(done["corpus"].counts["bytes"], small.corpus, tokens)


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
    of_sources = {
        source.name: of_reading(source, shapes[source.name], recipe) for source in recipe.sources
    }
    of_target = of_training(shapes[TARGET], recipe, arguments[FUSED], processes)
    return {"training": of_target, **of_sources}
