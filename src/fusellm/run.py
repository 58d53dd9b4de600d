"""A run, from a program: `fusellm.Run`."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fusellm.config import Recipe
from fusellm.errors import ArgumentError, StoreError
from fusellm.evaluation.results import EvaluationResults
from fusellm.explain.block import inspect_block
from fusellm.explain.views import BlockView
from fusellm.models.pretrained import load_pretrained
from fusellm.models.tokenizer import Tokenizer
from fusellm.pipeline import Pipeline
from fusellm.plan.plan import plan_run
from fusellm.preflight import require_disk
from fusellm.progress import Progress, Silent
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.recipe_file import folder_of_run, open_recipe, resolve_paths
from fusellm.rounds import rounds_of, write_recipe_of_rounds
from fusellm.stages.evaluate import read_results
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.planned import RunPlan, write_plan
from fusellm.store.run_folder import FUSED, STAGES, SUITES, trained_folder


class Run:
    """A recipe and the folder of what is made from it.

    Finished work is kept: a stage that is done is done, and one that was interrupted goes on. What
    is changed in the recipe and would give something else is an error, unless `redo` is said.
    Nothing is printed; give `progress` to be shown how far the work is.

    A run can stand where a path can: `fusellm.FusedDataset(run)`, `os.fspath(run)`.

    Attributes:
        recipe: with its local paths made absolute.
        folder: of the run.
        trusted: whether code that models bring along may run where the recipe asks for it.
    """

    recipe: Recipe
    folder: Path

    def __init__(
        self,
        recipe: Recipe | str | os.PathLike[str],
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        engine: EngineSettings = LOCAL,
        trust_remote_code: bool = False,
    ) -> None:
        """Open a run; nothing is written and no model loaded.

        Args:
            recipe: a `Recipe`, whose paths are then relative to the current folder; a recipe's
                file; or the folder of a run, which is gone on with.
            folder: where the run is; `runs/` and the recipe's name if not given.
            engine: where sources are read.
            trust_remote_code: whether code that models bring along may run where the recipe asks
                for it.

        Raises:
            RecipeError: the recipe cannot be used.
            StoreError: the folder is no run.
        """
        if isinstance(recipe, Recipe):
            self.recipe = resolve_paths(recipe, Path())
        else:
            self.recipe = open_recipe(Path(recipe))
            folder = folder or folder_of_run(Path(recipe), self.recipe)
        self.folder = Path(folder) if folder is not None else Path("runs") / self.recipe.name
        self._progress, self._engine = progress or Silent(), engine
        self.trusted = trust_remote_code
        self._opened: Pipeline | None = None

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Run({self.recipe.name!r}, {str(self.folder)!r})"

    @property
    def rounds(self) -> list["Run"]:
        """The runs of a recipe with `rounds`, in order; of one with a single round itself."""
        if self.recipe.rounds == 1:
            return [self]
        settings: dict[str, Any] = {"progress": self._progress, "engine": self._engine}
        settings["trust_remote_code"] = self.trusted
        return [
            Run(recipe, folder, **settings)
            for recipe, folder in rounds_of(self.recipe, self.folder)
        ]

    @property
    def _pipeline(self) -> Pipeline:
        if self._opened is None:
            self._opened = Pipeline(
                self.recipe, self.folder, self._progress, self._engine, trusted=self.trusted
            )
        return self._opened

    def check(self) -> dict[str, Any]:
        """Check everything that can be known before any expensive work.

        Returns:
            What was found: models, tokenizers, and the disk that the run will take.

        Raises:
            FusellmError: something cannot be as the recipe has it, or the disk is too small for it.
        """
        checked = self.rounds[0]._pipeline.check()
        require_disk(checked)
        return checked

    def plan(self, *, processes: int = 1, shapes_only: bool = False) -> RunPlan:
        """What the run will take, before any large work: time, disk, memory and operations.

        Each stage does a little of its work and is timed, in a folder that is removed; so it is
        seen too what the sources know of the text. The plan is kept in the run's folder, where
        the report finds it. Of a recipe with `rounds` it is of the first. Suites are not planned.

        Args:
            processes: that are to train.
            shapes_only: whether to try nothing, and load no weights: what is known by the models'
                configurations alone. Such a plan is not kept.

        Raises:
            RecipeError: how much text there is is not known before it is cut.
            FusellmError: as a run does.
        """
        first = self.rounds[0]
        made = plan_run(
            first.recipe,
            first.folder,
            self._progress,
            processes=processes,
            shapes_only=shapes_only,
            trusted=self.trusted,
        )
        if not shapes_only:
            write_plan(first.folder, made)
        return made

    def execute(self, *stages: str, redo: bool = False) -> "Run":
        """Run stages, or go on with them; all if none is named.

        A recipe with `rounds` runs all of them; single stages are of one of `rounds`.

        Args:
            stages: `generate`, `corpus`, `externalize`, `fuse`, `train`, `evaluate`, `report`, or
                parts of them such as `externalize/NAME` and `train/fused`.
            redo: move what was made from something else aside, with all that follows from it, in
                place of an error.

        Raises:
            FusellmError: something is missing, unfinished, damaged, or made from something else.
        """
        if self.recipe.rounds > 1 and not stages:
            write_recipe_of_rounds(self.recipe, self.folder)
            for one in self.rounds:
                one.execute(redo=redo)
            return self
        named = stages or STAGES
        known = [*STAGES, SUITES, *self._pipeline.parts]
        for stage in named:
            if stage not in known:
                raise ArgumentError(
                    f"there is no stage {stage!r}; known: {', '.join(dict.fromkeys(known))}"
                )
        self._pipeline.execute(named, redo)
        return self

    def corpus(self) -> "Run":
        """Cut the text into blocks."""
        return self.execute("corpus")

    def externalize(self, *names: str) -> "Run":
        """Read sources by their names, or all of them and the target's tokens."""
        return self.execute(*([f"externalize/{name}" for name in names] or ["externalize"]))

    def fuse(self) -> "Run":
        """Align, translate and fuse what the sources said."""
        return self.execute("fuse")

    def train(self, *which: str) -> "Run":
        """Train the target, and the CLM baseline beside it; or only `fused` or `clm`."""
        return self.execute(*([f"train/{one}" for one in which] or ["train"]))

    def evaluate(self) -> "Run":
        """Measure held-out bits per byte, and the recipe's suites."""
        return self.execute("evaluate")

    @property
    def results(self) -> EvaluationResults:
        """What the evaluation found; of several rounds that of the last.

        Raises:
            StoreError: it is not finished.
        """
        return read_results(self.rounds[-1].folder)

    def model(
        self, which: str = FUSED, *, device: str | torch.device | None = None
    ) -> tuple[PreTrainedModel, Tokenizer]:
        """A trained model with its tokenizer; of several rounds that of the last.

        Args:
            which: `fused` or `clm`.

        Raises:
            StoreError: it is not trained yet.
        """
        place = trained_folder(self.rounds[-1].folder, which)
        if not (place / MANIFEST).exists() or not StageFolder(place).complete:
            raise StoreError(f"{place} has no finished model yet; first: run.train()")
        return load_pretrained(str(place), device=device, trust_remote_code=self.trusted)

    def block(
        self, number: int, position: int | None = None, answer: int | None = None
    ) -> BlockView:
        """One block as all models read it, and what became of one position's distribution.

        Args:
            number: of the block, among those that sources read.
            position: of the target; an instructive one if None.
            answer: of a conversation, which of its answers, from 0; the first if None.

        Raises:
            StoreError: nothing is fused yet, or there is no such block, answer or position.
        """
        readers = self._pipeline.readers
        where = number, position, self._progress, answer
        return inspect_block(self.recipe, self.folder, readers, *where)
