"""What a stage is: one folder of a run, what it is made from, and how it is made."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fusellm.config import EvaluationSettings, Recipe
from fusellm.errors import StoreError
from fusellm.models.readers import Reader
from fusellm.preflight import try_text
from fusellm.progress import Progress
from fusellm.reading.engine import EngineSettings
from fusellm.store.externalized import TARGET
from fusellm.store.identity import Identity
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.writer import StageWriter


@dataclass
class Context:
    """What all stages of a run work with.

    Attributes:
        run: its folder.
        readers: the models that read the corpus, by name, the target first.
        engine: where sources are read.
        training_processes: how many are to train a model.
        evaluation: what is measured; the recipe's, where the command line has no other.
        trusted: whether code may run that comes with models, where the recipe wants it.
    """

    recipe: Recipe
    run: Path
    readers: Mapping[str, Reader]
    progress: Progress
    engine: EngineSettings
    training_processes: int
    evaluation: EvaluationSettings
    trusted: bool
    _tried: bool = field(default=False, init=False)

    def try_text(self) -> None:
        """Check, once, what the tokenizers make of the text, before a model is loaded for it.

        Raises:
            TokenizerError, CorpusError: as `preflight.try_text` does.
        """
        if not self._tried:
            try_text(self.recipe, self.run, self.readers, cut=True)
            self._tried = True

    @property
    def target(self) -> Reader:
        """The target, before it is trained."""
        return self.readers[TARGET]

    def fingerprint(self, name: str) -> str:
        """Of a finished folder of the run."""
        return StageFolder(self.run / name).fingerprint


class Stage(ABC):
    """A folder of a run.

    `Pipeline` asks one after another to `prepare`, if it is not complete, and to `execute`.

    Attributes:
        command: the command that makes it, `fusellm COMMAND RUN`; several stages may have one.
        name: of its folder in the run.
        after: names of the stages whose folders it reads.
    """

    command: ClassVar[str]
    goes_on: ClassVar[bool] = True
    """Whether what there is of an unfinished folder is kept."""

    def __init__(self, context: Context, name: str = "", after: tuple[str, ...] = ()) -> None:
        """`name`: that of the command by default."""
        self.context, self.name, self.after = context, name or self.command, after

    @property
    def folder(self) -> Path:
        """Where what it makes is."""
        return self.context.run / self.name

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / MANIFEST).exists() and StageFolder(self.folder).complete

    def identity(self) -> Identity | None:
        """What its folder is made from, once what it reads is complete; None of one without."""
        return None

    def prepare(self) -> None:
        """Raise what can be known before its own expensive work, once what it reads is there."""
        return  # most know nothing before

    @abstractmethod
    def execute(self, redo: bool) -> None:
        """Make it, or go on with it; nothing is done that is done.

        Args:
            redo: whether records of its own that were made from something else are moved aside;
                for folders with a manifest `Pipeline` has done so before.
        """

    def require_readable(self) -> None:
        """Check that what it reads is finished.

        Raises:
            StoreError: it is not; the message has the command that makes it.
        """
        run = self.context.run
        for name in self.after:
            folder = run / name
            if not (folder / MANIFEST).exists() or not StageFolder(folder).complete:
                raise StoreError(
                    f"{self.name} reads {folder}, which is not finished; first: "
                    f"fusellm {name.split('/')[0]} {run}"
                )


class ManifestStage(Stage):
    """A stage whose folder has a manifest: what another identity made is never mixed in."""

    @abstractmethod
    def identity(self) -> Identity:
        """What its folder is made from, once what it reads is complete."""


class FilledStage(ManifestStage):
    """A stage whose folder one process fills."""

    def execute(self, redo: bool) -> None:
        """Fill the folder, unless it is complete."""
        with StageWriter.open(self.folder, self.identity(), resume=self.goes_on) as folder:
            if not folder.complete:
                self.fill(folder)

    @abstractmethod
    def fill(self, folder: StageWriter) -> None:
        """Write what is missing, and finish the folder."""
