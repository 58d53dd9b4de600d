"""The stages of a run in order, and what is checked before the first one works.

[generate ──▶] corpus ──▶ externalize (once per source) ──▶ fuse ──▶ train ──▶ evaluate ──▶ report
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fusellm.config import EvaluationSettings, Recipe
from fusellm.corpus.look import look_at
from fusellm.errors import IdentityError, RecipeError
from fusellm.models.load import default_device
from fusellm.models.precision import slow_half_note
from fusellm.models.readers import Reader, plain_text_note, readers_of
from fusellm.preflight import (
    described,
    is_same,
    projected_store_bytes,
    require_fits,
    require_models,
    try_text,
)
from fusellm.progress import Progress
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.reading.ray_cluster import require_ray
from fusellm.stages import train
from fusellm.stages.corpus import CorpusStage
from fusellm.stages.evaluate import ContinuationsStage, EvaluateStage, SuitesStage
from fusellm.stages.externalize import SourceStage, TargetTokensStage
from fusellm.stages.fuse import FuseStage
from fusellm.stages.generate import GenerateStage
from fusellm.stages.report.write import ReportStage
from fusellm.stages.stage import Context, ManifestStage, Stage
from fusellm.stages.train import TrainStage
from fusellm.store.files import alone_in, make_folder, require_writable, write_text
from fusellm.store.manifest import check_identity
from fusellm.store.now import Published
from fusellm.store.run_folder import (
    CLM,
    FUSED,
    RECIPE,
    STAGES,
    SUITES,
    checkpoints_folder,
    recipe_text,
    records_of,
    require_no_rounds,
)
from fusellm.store.usage import measured
from fusellm.store.writer import set_aside
from fusellm.training import processes


class Pipeline:
    """A run: a recipe, its folder, its models, and its stages in order.

    Attributes:
        context: what the stages have in common.
        stages: each after those that it reads.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        progress: Progress,
        engine: EngineSettings = LOCAL,
        training_processes: int | None = None,
        evaluation: EvaluationSettings | None = None,
        trusted: bool = False,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        """Find every model and tokenizer of a recipe; no weight is loaded.

        Args:
            engine: where sources are read.
            training_processes: how many are to train a model; those that there are if None.
            evaluation: what is measured, where it is not what the recipe says.
            trusted: whether code may run that comes with models, where the recipe wants it.
            readers: its models, where they have been found already.

        Raises:
            FusellmError: something is missing or cannot be used; nothing has been written.
        """
        self.recipe, self.run = recipe, run
        self._progress = Published(progress, run)
        if recipe.rounds > 1:
            raise RecipeError(
                f"rounds: {recipe.rounds}: each round is a run of its own. `fusellm run` makes "
                f"them all; other commands take one of them, such as {run / 'round-1'}"
            )
        if engine.name == "ray":
            require_ray(engine)
        train.check(recipe, run)
        self.context = Context(
            recipe,
            run,
            readers_of(recipe, trusted) if readers is None else readers,
            self._progress,
            engine,
            training_processes or processes.count(),
            evaluation or recipe.evaluation,
            trusted,
        )
        self.stages = stages_of(self.context)

    @property
    def readers(self) -> dict[str, Reader]:
        """The models that read the corpus, the target first."""
        return dict(self.context.readers)

    @property
    def parts(self) -> list[str]:
        """Names of the folders that stages make, which can be asked for one by one."""
        return [stage.name for stage in self.stages]

    def execute(
        self, stages: Sequence[str] = STAGES, redo: bool = False, *, ensured: bool = False
    ) -> None:
        """Run stages, or go on with them; finished work is kept.

        Args:
            stages: their commands, or names of single folders such as "train/clm"; "evaluate" is
                bits per byte and suites, "evaluate-suites" only these.
            redo: move a stage of another identity, and what follows from it, aside.
            ensured: whether the stages that these read have been looked at already, on a machine
                that has all that they were made from.

        Raises:
            IdentityError: a folder was made from something else, and `redo` is not set. It is
                found before any work is done, as far as it can be known then.
        """
        asked = [one for one in self.stages if one.command in stages or one.name in stages]
        if not asked and "generate" in stages:
            raise RecipeError(
                f"{self.recipe.name} generates nothing: no entry of corpus.documents has a block "
                "generated (docs/generated.md)"
            )
        self._preflight([stage for stage in asked if not stage.complete])
        with self._progress.working():
            processes.first(partial(self._begin, redo, ensured))
            for stage in asked:
                processes.first(partial(self._ready, stage, redo))
                with self._measured(stage):
                    stage.execute(redo)

    def _measured(self, stage: Stage) -> AbstractContextManager[None]:
        """While a stage is made, if it is not finished; what it uses is kept beside it."""
        wanted = isinstance(stage, ManifestStage) and not stage.complete and processes.is_first()
        return measured(self.run, stage.name) if wanted else nullcontext()

    def _preflight(self, unfinished: Sequence[Stage]) -> None:
        """Check what can be known before any work of these stages."""
        context, commands = self.context, {stage.command for stage in unfinished}
        if "train" in commands:
            train.check_processes(self.recipe, self.run, context.training_processes)
        folders = [stage for stage in unfinished if isinstance(stage, ManifestStage)]
        if folders and any(s.command == "train" and not s.complete for s in self.stages):
            train.check_target(self.context.target.located, self.recipe.training.lora)
            train.rehearse(self.recipe)
        if any(isinstance(stage, SuitesStage) for stage in unfinished):
            self.prepare_suites()
        if commands & {"generate", "externalize"}:
            require_models(context.readers)
            self._say(plain_text_note(context.readers))
        if commands & {"externalize", "train"}:
            self._say(self._slow_half_note())

    def _say(self, note: str | None) -> None:
        if note is not None:
            self._progress.say(note)

    def _slow_half_note(self) -> str | None:
        settings = {name: reader.located.settings for name, reader in self.readers.items()}
        return slow_half_note(settings, self.recipe.training.arguments, default_device())

    def _begin(self, redo: bool, ensured: bool) -> None:
        if not self._complete("corpus"):
            look_at(self.recipe.corpus, self._progress)
        for stage in self.stages:
            if not ensured and all(self._complete(name) for name in stage.after):
                self._ensure(stage, redo)
        self._require_place()
        make_folder(self.run)
        self._write_recipe()

    def _require_place(self) -> None:
        """Check that the run can be written; a finished one may be read-only."""
        require_no_rounds(self.run)
        if not all(one.complete for one in self.stages if isinstance(one, ManifestStage)):
            require_writable(self.run)

    def _ready(self, stage: Stage, redo: bool) -> None:
        stage.require_readable()
        self._ensure(stage, redo)
        if not stage.complete:
            stage.prepare()

    def prepare_suites(self) -> None:
        """Find the data, packages and sandbox of the suites that are to be run, once.

        Raises:
            EvaluationError: something is missing.
        """
        for stage in self.stages:
            if isinstance(stage, SuitesStage):
                stage.find()

    def unfinished(self, command: str) -> bool:
        """Whether a stage of a command is, and can be made now.

        Raises:
            StoreError: what it reads is not finished; the message has the command that makes it.
        """
        stages = [one for one in self.stages if one.command == command and not one.complete]
        for stage in stages:
            stage.require_readable()
        return bool(stages)

    def _complete(self, name: str) -> bool:
        return next(stage for stage in self.stages if stage.name == name).complete

    def _ensure(self, stage: Stage, redo: bool) -> None:
        """Check that a folder was made from what it would be made from now, or set it aside."""
        if not stage.goes_on and not stage.complete:
            return  # it is begun anew: what there is of it stands in nobody's way
        try:
            identity = stage.identity()
            if identity is not None:
                check_identity(stage.folder, identity)
        except IdentityError:
            if not redo:
                raise
            stale = {stage.name}
            for later in self.stages:
                # Suites keep what the sources answered: `records_of` has what is of trained models.
                if stale.intersection(later.after) and isinstance(later, ManifestStage):
                    stale.add(later.name)
            self._set_aside(sorted(stale))

    def _set_aside(self, stale: Sequence[str]) -> None:
        trained = [name.removeprefix("train/") for name in stale]
        moved = [
            *(self.run / name for name in stale),
            *(checkpoints_folder(self.run, which) for which in (FUSED, CLM) if which in trained),
            *records_of(self.run, trained),
            self.run / "report",
        ]
        names = [str(path.relative_to(self.run)) for path in moved if path.exists()]
        place = set_aside(self.run, moved)
        self._progress.say(f"moved {', '.join(names)} to {place}")

    def _write_recipe(self) -> None:
        with alone_in(self.run):  # processes that read a source each have this file in common
            write_text(self.run / RECIPE, recipe_text(self.recipe, self.run))

    def check(self) -> dict[str, Any]:
        """What the preflight found: models, tokenizers, and the disk that the run will take.

        Raises:
            RecipeError: a training could not be as the recipe has it.
            ModelError: a package is missing, or a model's files are not what they should be.
            TokenizerError: one changes more of the text than the recipe allows.
            CorpusError: the corpus is cut already, and a block exceeds a model's context.
            EvaluationError: data, packages or the sandbox of the recipe's suites are missing.
        """
        recipe, readers = self.recipe, self.context.readers
        self._require_place()
        train.check_target(self.context.target.located, recipe.training.lora)
        train.rehearse(recipe)
        require_models(readers)
        self.prepare_suites()
        self._say(plain_text_note(readers))
        self._say(self._slow_half_note())
        corpus = next(stage for stage in self.stages if isinstance(stage, CorpusStage))
        cut = corpus.complete and is_same(corpus.folder, corpus.identity(), self._progress)
        entries = look_at(recipe.corpus, self._progress)
        tried = try_text(recipe, self.run, readers, cut)
        if cut:
            for name, reader in readers.items():
                require_fits(self.run, name, reader, recipe.corpus, self._progress)
        existing = next(path for path in [self.run, *self.run.absolute().parents] if path.exists())
        return {
            "run": str(self.run),
            "models": described(readers, tried, None if cut else recipe.corpus.block_bytes),
            "projected_store_bytes": projected_store_bytes(recipe, entries),
            "free_bytes": shutil.disk_usage(existing).free,
        }


def stages_of(context: Context) -> list[Stage]:
    """The stages of a run, each after those that it reads."""
    generated = [GenerateStage(context, entry) for entry in context.recipe.corpus.generated]
    corpus = CorpusStage(context)
    sources = [SourceStage(context, source.name) for source in context.recipe.sources]
    read = [TargetTokensStage(context), *sources]
    fuse = FuseStage(context, after=("corpus", *(stage.name for stage in read)))
    baseline = [TrainStage(context, CLM)] if context.recipe.training.clm_baseline else []
    trained = [TrainStage(context, FUSED), *baseline]
    names = tuple(stage.name for stage in trained)
    return [
        *generated,
        corpus,
        *read,
        fuse,
        *trained,
        EvaluateStage(context, after=("corpus", *names)),
        ContinuationsStage(context, "continuations", after=("evaluate",)),
        SuitesStage(context, SUITES, after=names),
        ReportStage(context),
    ]
