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

from fusellm.config import LoraSettings, ObjectiveSettings, Recipe, TrainingSettings
from fusellm.errors import IdentityError, RecipeError
from fusellm.models.adapters import require_peft, without_warnings
from fusellm.models.cards import training_card
from fusellm.models.configurations import adds_router_loss
from fusellm.models.load import Located
from fusellm.objective.divergence import Divergence
from fusellm.objective.schedule import LambdaSchedule
from fusellm.stages.stage import Context, ManifestStage
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.externalized import TARGET
from fusellm.store.identity import Identity
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import CLM, FUSED, checkpoints_folder
from fusellm.store.writer import StageWriter
from fusellm.training import processes, rehearsal
from fusellm.training.arguments import (
    CHANGE_NO_WEIGHT,
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


class TrainStage(ManifestStage):
    """The folder of the fused model or of the CLM baseline.

    All processes of a training execute it; the first one writes. A checkpoint that was damaged
    since it was saved is said, renamed and not gone on from.

    Raised besides: NumericsError, a loss or a gradient became NaN or infinite, and the last
    checkpoint is kept.
    """

    command = "train"

    def __init__(self, context: Context, which: str) -> None:
        """`which`: FUSED or CLM."""
        reads = "fuse" if which == FUSED else f"externalize/{TARGET}"
        super().__init__(context, f"train/{which}", ("corpus", reads))
        self.which = which

    def prepare(self) -> None:
        """Check what the tokenizers make of the text."""
        self.context.try_text()

    def identity(self) -> Identity:
        """What a trained model is made from."""
        context = self.context
        recipe, located = context.recipe, context.target.located
        settings: dict[str, Any] = {
            "training": _training_settings(recipe.training)
            | (recipe.training.clm if self.which == CLM else {}),
            "seed": recipe.seed,
        }
        processes_ = processes_of(self.folder, context)
        if processes_ > 1:
            settings["processes"] = processes_
        if recipe.training.lora is not None:
            settings["dtype"] = located.settings.dtype
        if self.which == FUSED:
            settings["objective"] = recipe.objective.model_dump()
        reads = self.after[1]
        inputs = {"weights": located.fingerprint, reads: context.fingerprint(reads)}
        return Identity(self.name, settings, inputs)

    def execute(self, redo: bool) -> None:
        """Train, or go on with it."""
        with self._open() as (folder, complete):
            if not complete:
                self._train(folder)

    def _train(self, folder: StageWriter | None) -> None:
        context, which = self.context, self.which
        recipe, located, encoder = context.recipe, context.target.located, context.target.encoder
        wanted, training = recipe.objective, recipe.training
        checkpoints = checkpoints_folder(context.run, which)
        chosen = training_arguments(recipe, checkpoints, which)
        resume_from = last_checkpoint(checkpoints, context.progress)
        torch.manual_seed(chosen.seed)
        model = load_target(located, training.lora, chosen.device, is_sharded(chosen))
        corpus = open_corpus(context.run)
        stop = Stop()
        trainer = ObjectiveTrainer(
            model,
            chosen,
            self._rows(chosen.seed),
            lambda_schedule(wanted) if which == FUSED else LambdaSchedule(1.0),
            Divergence(wanted.divergence, wanted.temperature),
            Validation(encoder, read_part(corpus, "validation"), recipe),
            Blame(corpus, checkpoints),
            stop,
        )
        shown = context.progress.start(f"training {which}", 0, "steps")
        with without_warnings(), shown as bar, stop:
            trainer.add_callback(Watch(bar, training.early_stop_validations, stop))
            trainer.train(resume_from_checkpoint=resume_from)
            trainer.require_finite()
        weights = trainer.whole_weights()
        if folder is not None:
            if weights is not None:
                model = load_target(located, training.lora, chosen.device, sharded=True)
                model.load_state_dict(weights)
            sources = [(s.name, context.readers[s.name].located) for s in recipe.sources]
            card = training_card(recipe, which, located, sources)
            save_model(folder, model, training.lora, encoder.tokenizer, card, trainer.records())
            folder.finish(trainer.counts())

    def _rows(self, seed: int) -> Rows:
        """What the model is trained on, packed where the recipe says so."""
        context, encoder = self.context, self.context.target.encoder
        if self.which == FUSED:
            return FusedDataset.of_run(context.recipe, context.run, encoder, seed)
        where = seed, len(encoder.vocabulary), encoder.prefix_tokens
        rows = Rows(stored_blocks(context.run, open_corpus(context.run), False, *where), seed)
        training = context.recipe.training
        if training.rows != "packed":
            return rows
        return rows.pack(training.row_tokens, longer_alone=True)

    @contextmanager
    def _open(self) -> Iterator[tuple[StageWriter | None, bool]]:
        """(the folder for writing, in the first process alone; whether it was finished before).

        All processes come and go together.
        """
        with ExitStack() as stack:
            writers: list[StageWriter] = []

            def complete() -> bool:
                writer = StageWriter.open(self.folder, self.identity())
                writers.append(stack.enter_context(writer))
                return writers[0].complete

            was_complete = processes.first(complete)
            yield (writers[0] if writers else None), was_complete
            processes.wait()
            if writers and writers[0].complete:
                checkpoints = checkpoints_folder(self.context.run, self.which)
                shutil.rmtree(checkpoints, ignore_errors=True)
        processes.wait()


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


def check_target(target: Located, lora: LoraSettings | None = None) -> None:
    """Check that a target's own loss is L_CLM alone, and that what is saved of it is whole.

    Raises:
        RecipeError: it adds one of its router; or adapters are to be saved alone, of a target that
            has some already, which they would be loaded without.
    """
    if lora is not None and not lora.merge and target.adapters is not None:
        raise RecipeError(
            f"training.lora.merge: false saves new adapters for the model that those of "
            f"{target.adapters} are on, without these; leave it out, or merge them first"
        )
    if adds_router_loss(target.config):
        raise RecipeError(
            f"target.model: {target.settings.model} adds a loss of its router to its own, which "
            "λ·L_CLM + (1−λ)·L_Fusion leaves out; to train without it set output_router_logits: "
            "false in the config.json of a copy"
        )


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


def processes_of(folder: Path, context: Context) -> int:
    """How many processes a model is trained by: those that trained it, if it is finished.

    Each takes `per_device_train_batch_size` rows at a time.

    Raises:
        IdentityError: its training was begun by another number.
    """
    here = context.training_processes
    if not (folder / MANIFEST).exists():
        return here
    stage = StageFolder(folder)
    begun = int(stage.identity.settings.get("processes", 1))
    if begun != here and not stage.complete:
        raise IdentityError(
            f"{folder} was begun by {begun} process(es), each of which takes "
            f"training.per_device_train_batch_size rows at a time, and would go on with {here}: "
            f"give `fusellm train {context.run} --nproc {begun}`, or add --redo to begin anew"
        )
    return begun


def _training_settings(training: TrainingSettings) -> dict[str, Any]:
    """The settings that both trainings have in common, without those that change no weight."""
    left_out = {"clm_baseline", "clm"} | CHANGE_NO_WEIGHT
    if training.keep == "last" and training.early_stop_validations is None:
        left_out.add("validations")  # which then only say how it goes
    return training.model_dump(exclude=left_out)


def lambda_schedule(objective: ObjectiveSettings) -> LambdaSchedule:
    """λ over the steps, as a recipe has it."""
    return LambdaSchedule(objective.lambda_, objective.lambda_schedule, objective.lambda_end)
