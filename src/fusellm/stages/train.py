"""train: continue the target on L = λ·L_CLM + (1−λ)·L_Fusion, and the CLM baseline on λ = 1.

On transformers' Trainer, so that everything users know of it works. Checkpoints live beside the
model's folder, which itself holds an ordinary model and no pickle.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fusellm.config import ObjectiveSettings, Recipe, TrainingSettings
from fusellm.errors import IdentityError
from fusellm.models.adapters import require_peft, without_warnings
from fusellm.models.load import Located
from fusellm.objective.divergence import Divergence
from fusellm.objective.schedule import LambdaSchedule
from fusellm.progress import Progress
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.identity import Identity
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoder
from fusellm.training import processes, rehearsal
from fusellm.training.arguments import (
    ASIDE,
    BASELINE,
    is_sharded,
    require_processes,
    training_arguments,
)
from fusellm.training.callbacks import Watch
from fusellm.training.checkpoints import last_checkpoint
from fusellm.training.dataset import FusedDataset
from fusellm.training.model import load_target, save_model
from fusellm.training.nan_report import Blame
from fusellm.training.rows import Rows, stored_blocks
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.stop import Stop
from fusellm.training.validation import Validation

FOLDER = "train"
FUSED, CLM = "fused", BASELINE


def folder_of(run: Path, which: str) -> Path:
    """Folder of the fused model or the CLM baseline."""
    return run / FOLDER / which


def checkpoints_of(run: Path, which: str) -> Path:
    """Folder of the checkpoints of an unfinished training."""
    return run / FOLDER / f"{which}-checkpoints"


def check(recipe: Recipe, run: Path) -> None:
    """Check the settings of both trainings before any work is done.

    Raises:
        RecipeError: a name or value that TrainingArguments does not take.
        ModelError: PEFT is needed and is not installed.
    """
    for which in (FUSED, CLM):
        training_arguments(recipe, run, which)
    if recipe.training.lora is not None:
        require_peft("training.lora")


def rehearse(recipe: Recipe) -> None:
    """Build what both trainings will build, and train a toy with it.

    One process alone does so; those of a training come after it.

    Raises:
        RecipeError: something does not work; it names the setting.
    """
    if processes.count() == 1:
        for which in (FUSED, CLM) if recipe.training.clm else (FUSED,):
            rehearsal.rehearse(recipe, which)


def check_processes(recipe: Recipe, run: Path, count: int) -> None:
    """Check that so many processes can train both models.

    Raises:
        RecipeError: they cannot.
    """
    for which in (FUSED, CLM):
        require_processes(training_arguments(recipe, run, which), count)


def processes_of(run: Path, which: str, here: int) -> int:
    """How many processes a model is trained by: those that trained it, if it is finished.

    Args:
        here: that would train it.

    Raises:
        IdentityError: its training was begun by another number.
    """
    folder = folder_of(run, which)
    if not (folder / MANIFEST).exists():
        return here
    stage = StageFolder(folder)
    begun = int(stage.identity.settings.get("processes", 1))
    if begun != here and not stage.complete:
        raise IdentityError(
            f"{folder} was begun by {begun} process(es), each of which takes "
            f"training.per_device_train_batch_size rows at a time, and would go on with {here}: "
            f"give `fusellm train {run} --nproc {begun}`, or add --redo to begin anew"
        )
    return begun


def identity(
    recipe: Recipe,
    which: str,
    located: Located,
    inputs: dict[str, str],
    process_count: int = 1,
) -> Identity:
    """What a trained model is made from.

    Args:
        inputs: fingerprints of the stages that it reads.
        process_count: each of which takes `per_device_train_batch_size` rows at a time.
    """
    settings: dict[str, Any] = {
        "training": _training_settings(recipe.training)
        | (recipe.training.clm if which == CLM else {}),
        "seed": recipe.seed,
    }
    if process_count > 1:
        settings["processes"] = process_count
    if recipe.training.lora is not None:
        settings["dtype"] = located.settings.dtype
    if which == FUSED:
        settings["objective"] = recipe.objective.model_dump()
    return Identity(f"train/{which}", settings, {"weights": located.fingerprint} | inputs)


def _training_settings(training: TrainingSettings) -> dict[str, Any]:
    """The settings that both trainings have in common, without those that change no weight."""
    left_out = {"clm_baseline", "clm"} | ASIDE
    if training.keep == "last" and training.early_stop_validations is None:
        left_out.add("validations")  # which then only say how it goes
    return training.model_dump(exclude=left_out)


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

    All processes of a training call it; the first one writes.

    A checkpoint that was damaged since it was saved is said, renamed and not gone on from.

    Raises:
        NumericsError: a loss or a gradient became NaN or infinite; the last checkpoint is kept.
        StoreError: something cannot be written, or what is read is damaged.
    """
    checkpoints = checkpoints_of(run, which)
    chosen = training_arguments(recipe, checkpoints, which)
    wanted, training = recipe.objective, recipe.training
    with _folder(run, which, identity_) as (folder, complete):
        if complete:
            return
        resume_from = last_checkpoint(checkpoints, progress)
        torch.manual_seed(chosen.seed)
        model = load_target(located, training.lora, chosen.device, is_sharded(chosen))
        corpus = open_corpus(run)
        rows = _rows(recipe, run, which, corpus, encoder, chosen.seed)
        stop = Stop()
        trainer = ObjectiveTrainer(
            model,
            chosen,
            rows,
            lambda_schedule(wanted) if which == FUSED else LambdaSchedule(1.0),
            Divergence(wanted.divergence, wanted.temperature),
            Validation(encoder, read_part(corpus, "validation"), recipe),
            Blame(corpus, checkpoints),
            stop,
        )
        shown = progress.start(f"training {which}", 0, "steps")
        with without_warnings(), shown as bar, stop:
            trainer.add_callback(Watch(bar, training.early_stop_validations, stop))
            trainer.train(resume_from_checkpoint=resume_from)
            trainer.require_finite()
        weights = trainer.whole_weights()
        if folder is not None:
            if weights is not None:
                model = load_target(located, training.lora, chosen.device, sharded=True)
                model.load_state_dict(weights)
            save_model(folder, model, training.lora, encoder.tokenizer, card, trainer.records())
            folder.finish(trainer.counts())


def _rows(
    recipe: Recipe, run: Path, which: str, corpus: StageFolder, encoder: Encoder, seed: int
) -> Rows:
    """What a model is trained on, packed where the recipe says so."""
    if which == FUSED:
        return FusedDataset.of_run(recipe, run, encoder, seed)
    where = seed, len(encoder.vocabulary), encoder.prefix_tokens
    rows = Rows(stored_blocks(run, corpus, False, *where), seed)
    training = recipe.training
    return rows.pack(training.row_tokens) if training.rows == "packed" else rows


@contextmanager
def _folder(
    run: Path, which: str, identity_: Identity
) -> Iterator[tuple[StageWriter | None, bool]]:
    """(a model's folder for writing, in the first process alone; whether it was finished before).

    All processes come and go together.
    """
    with ExitStack() as stack:
        writers: list[StageWriter] = []

        def complete() -> bool:
            writer = StageWriter.open(folder_of(run, which), identity_)
            writers.append(stack.enter_context(writer))
            return writers[0].complete

        found = processes.first(complete)
        yield (writers[0] if writers else None), found
        processes.wait()
        if writers and writers[0].complete:
            shutil.rmtree(checkpoints_of(run, which), ignore_errors=True)
    processes.wait()


def lambda_schedule(objective: ObjectiveSettings) -> LambdaSchedule:
    """λ over the steps, as a recipe has it."""
    return LambdaSchedule(objective.lambda_, objective.lambda_schedule, objective.lambda_end)
