"""The stages in order, and the preflight before any model is loaded.

corpus ──▶ externalize (once per source) ──▶ fuse ──▶ train ──▶ evaluate ──▶ report
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from fusellm.config import EvaluationSettings, Recipe
from fusellm.errors import IdentityError, StoreError
from fusellm.evaluation.measure import Prepared, prepare
from fusellm.models.cards import training_card
from fusellm.models.load import Located, locate
from fusellm.models.readers import plain_text_note, readers_of
from fusellm.preflight import (
    described,
    is_same,
    projected_store_bytes,
    require_fits,
    require_models,
    try_text,
)
from fusellm.progress import Progress
from fusellm.stages import corpus, evaluate, externalize, fuse, train
from fusellm.stages.corpus.look import look_at
from fusellm.stages.externalize.task import LOCAL, EngineSettings
from fusellm.stages.report.write import write_report
from fusellm.store.externalized import TARGET
from fusellm.store.files import alone_in, make_folder, require_writable, write_text
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import MANIFEST, StageFolder, check_identity
from fusellm.store.run_folder import RECIPE, STAGES, SUITES, records_of
from fusellm.store.writer import set_aside
from fusellm.training import processes


@dataclass(frozen=True)
class _Part:
    """One stage folder. `after` names the folders whose content it reads."""

    stage: str
    name: str
    after: tuple[str, ...]
    identity: Callable[[], Identity]
    run: Callable[[Identity], None]


class Pipeline:
    """A run: a recipe, its folder, and its models."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        progress: Progress,
        engine: EngineSettings = LOCAL,
        training_processes: int | None = None,
        evaluation: EvaluationSettings | None = None,
        trusted: bool = False,
    ) -> None:
        """Find every model and tokenizer of a recipe; no weight is loaded.

        Args:
            engine: where sources are read.
            training_processes: how many are to train a model; those that there are if None.
            evaluation: what is measured, where it is not what the recipe says.
            trusted: whether code may run that comes with models, where the recipe wants it.

        Raises:
            FusellmError: something is missing or cannot be used; nothing has been written.
        """
        self.recipe, self.run, self._progress, self._engine = recipe, run, progress, engine
        externalize.require_engine(engine)
        train.check(recipe, run)
        self._training_processes = training_processes or processes.count()
        self._evaluation = evaluation or recipe.evaluation
        self._suites = [suite for suite in self._evaluation.suites if suite != "lm"]
        self._prepared: list[Prepared] | None = None
        self._tried = False
        self.readers, self._trusted = readers_of(recipe, trusted), trusted
        tokenizer = self.readers[TARGET].tokenizer_fingerprint
        # Once, as it reads whole files.
        self._corpus_identity = cache(partial(corpus.identity, recipe, tokenizer, progress))

    def execute(self, stages: Sequence[str] = STAGES, redo: bool = False) -> None:
        """Run stages, or go on with them; finished work is kept.

        Args:
            stages: names of stages, or of single folders such as "train/clm"; "evaluate" is bits
                per byte and suites, "evaluate-suites" only these.
            redo: move a stage of another identity, and what follows from it, aside.

        Raises:
            IdentityError: a folder was made from something else, and `redo` is not set. It is
                found before any work is done, as far as it can be known then.
        """
        parts = self._parts()
        suites = bool(self._suites and {"evaluate", SUITES}.intersection(stages))
        asked = [part for part in parts if part.stage in stages or part.name in stages]
        if any(part.stage == "train" and not self._complete(part.name) for part in asked):
            train.check_processes(self.recipe, self.run, self._training_processes)
        if any(not self._complete(part.name) for part in asked) and any(
            part.stage == "train" and not self._complete(part.name) for part in parts
        ):
            train.rehearse(self.recipe)
        if suites:
            self.prepare_suites()
        if any(part.stage == "externalize" and not self._complete(part.name) for part in asked):
            require_models(self.readers)
            self._say_note()
        processes.first(partial(self._begin, parts, redo))
        for part in asked:
            processes.first(partial(self._ready, part, parts, redo))
            part.run(part.identity())
        if suites:
            self._run_suites(parts, redo)
        if "report" in stages:
            write_report(self.run)

    @property
    def parts(self) -> list[str]:
        """Names of the folders that stages make, which can be asked for one by one."""
        return [part.name for part in self._parts()]

    def _say_note(self) -> None:
        note = plain_text_note(self.readers)
        if note is not None:
            self._progress.say(note)

    def _begin(self, parts: Sequence[_Part], redo: bool) -> None:
        if not self._complete("corpus"):
            look_at(self.recipe.corpus, self._progress)
        for part in parts:
            if all(self._complete(name) for name in part.after):
                self._ensure(part, parts, redo)
        self._require_place(parts)
        make_folder(self.run)
        self._write_recipe()

    def _require_place(self, parts: Sequence[_Part]) -> None:
        """Check that the run can be written; a finished one may be read-only."""
        if not all(self._complete(part.name) for part in parts):
            require_writable(self.run)

    def _ready(self, part: _Part, parts: Sequence[_Part], redo: bool) -> None:
        self._require(part.name, part.after)
        self._ensure(part, parts, redo)
        if self._complete(part.name):
            return
        if part.stage in ("externalize", "train"):
            self._try_text()
        if part.stage == "externalize":
            name = part.name.split("/")[1]
            require_fits(self.run, name, self.readers[name], self.recipe.corpus, self._progress)

    def _try_text(self) -> None:
        """Check, once, what the tokenizers make of the text, before any model is loaded for it."""
        if not self._tried:
            try_text(self.recipe, self.run, self.readers, cut=True)
            self._tried = True

    def prepare_suites(self) -> list[Prepared]:
        """Find the data, packages and sandbox of the suites that are to be run, once.

        Raises:
            EvaluationError: something is missing.
        """
        if self._prepared is None:
            self._prepared = prepare(self._suites, self._evaluation, self._progress)
        return self._prepared

    def _run_suites(self, parts: Sequence[_Part], redo: bool) -> None:
        self._require(SUITES, [part.name for part in parts if part.stage == "train"])
        evaluate.run_suites(
            self.run,
            self._evaluated(),
            self.prepare_suites(),
            self._evaluation,
            self.recipe.seed,
            self._progress,
            redo,
        )

    def unfinished(self, stage: str) -> bool:
        """Whether a part of a stage is, and can be made now.

        Raises:
            StoreError: what it reads is not finished; the message has the command that makes it.
        """
        parts = [p for p in self._parts() if p.stage == stage and not self._complete(p.name)]
        for part in parts:
            self._require(part.name, part.after)
        return bool(parts)

    def _require(self, reader: str, names: Sequence[str]) -> None:
        for name in names:
            if not self._complete(name):
                raise StoreError(
                    f"{reader} reads {self.run / name}, which is not finished; first: "
                    f"fusellm {name.split('/')[0]} {self.run}"
                )

    def _parts(self) -> list[_Part]:
        recipe = self.recipe
        parts = [_Part("corpus", "corpus", (), self._corpus_identity, self._run_corpus)]
        parts += [self._externalize_part(name) for name in self.readers]
        names = tuple(f"externalize/{name}" for name in self.readers)
        parts.append(
            _Part(
                "fuse",
                "fuse",
                ("corpus", *names),
                lambda: fuse.identity(recipe, {n: self._fingerprint(n) for n in names}),
                self._run_fuse,
            )
        )
        parts.append(self._train_part(train.FUSED, ("fuse",)))
        if recipe.training.clm_baseline:
            parts.append(self._train_part(train.CLM, (f"externalize/{TARGET}",)))
        trained = tuple(part.name for part in parts if part.stage == "train")
        measured = ("corpus", *trained)
        parts.append(
            _Part("evaluate", "evaluate", measured, self._evaluate_identity, self._evaluate)
        )
        return parts

    def _run_corpus(self, identity: Identity) -> None:
        encode = self.readers[TARGET].encoder.encode
        corpus.run_corpus(
            self.recipe,
            self.run,
            identity,
            lambda text: len(encode([text], [True])[0].ids),
            self._progress,
        )

    def _externalize_part(self, name: str) -> _Part:
        reader = self.readers[name]

        def identity() -> Identity:
            read = (reader.tokenizer_fingerprint, self._fingerprint("corpus"))
            if name == TARGET:
                return externalize.identity_of_target(*read)
            return externalize.identity_of_source(self.recipe, name, reader.located, *read)

        def run(identity: Identity) -> None:
            if name == TARGET:
                externalize.run_target(self.run, identity, reader.encoder, self._progress)
            else:
                externalize.run_source(
                    self.recipe,
                    self.run,
                    name,
                    reader.located,
                    identity,
                    reader.encoder,
                    self._progress,
                    self._engine,
                )

        return _Part("externalize", f"externalize/{name}", ("corpus",), identity, run)

    def _run_fuse(self, identity: Identity) -> None:
        readers = self.readers.items()
        fuse.run_fuse(
            self.recipe,
            self.run,
            identity,
            {name: reader.encoder for name, reader in readers},
            {name: reader.tokenizer_fingerprint for name, reader in readers},
            self._progress,
        )

    def _train_part(self, which: str, after: tuple[str, ...]) -> _Part:
        target = self.readers[TARGET]
        sources = [(s.name, self.readers[s.name].located) for s in self.recipe.sources]
        card = training_card(self.recipe, which, target.located, sources)

        def identity() -> Identity:
            inputs = {name: self._fingerprint(name) for name in after}
            count = train.processes_of(self.run, which, self._training_processes)
            return train.identity(self.recipe, which, target.located, inputs, count)

        def run(identity: Identity) -> None:
            train.run_train(
                self.recipe,
                self.run,
                which,
                target.located,
                identity,
                target.encoder,
                card,
                self._progress,
            )

        return _Part("train", f"train/{which}", ("corpus", *after), identity, run)

    def _evaluated(self) -> dict[str, Located]:
        """The models of the results table, in its order."""
        found = {source.name: self.readers[source.name].located for source in self.recipe.sources}
        found[TARGET] = self.readers[TARGET].located
        trained = [train.CLM, train.FUSED] if self.recipe.training.clm_baseline else [train.FUSED]
        for which in trained:
            # What was trained is a folder with everything in it, whatever it was trained from.
            at = dict.fromkeys(("revision", "gguf_file", "tokenizer"))
            at |= {"model": str(train.folder_of(self.run, which))}
            found[which] = locate(self.recipe.target.model_copy(update=at), self._trusted)
        return found

    def _evaluate_identity(self) -> Identity:
        models = {
            name: digest([located.fingerprint, located.settings.precision, *self._beside(name)])
            for name, located in self._evaluated().items()
        }
        return evaluate.identity(self.recipe, models, self._fingerprint("corpus"))

    def _beside(self, name: str) -> list[str]:
        """Fingerprint of the tokenizer, where a recipe says which or what it puts before a text."""
        reader = self.readers.get(name)
        if reader is None:
            return []
        settings = reader.located.settings
        given = settings.tokenizer is not None or settings.prefix is not None
        return [reader.tokenizer_fingerprint] if given else []

    def _evaluate(self, identity: Identity) -> None:
        encoders = {name: reader.encoder for name, reader in self.readers.items()}
        models = {
            name: (located, encoders.get(name, encoders[TARGET]))
            for name, located in self._evaluated().items()
        }
        evaluate.run_evaluate(self.recipe, self.run, identity, models, self._progress)

    def _complete(self, name: str) -> bool:
        folder = self.run / name
        return (folder / MANIFEST).exists() and StageFolder(folder).complete

    def _fingerprint(self, name: str) -> str:
        return StageFolder(self.run / name).fingerprint

    def _ensure(self, part: _Part, parts: Sequence[_Part], redo: bool) -> None:
        if part.name == "corpus" and not self._complete("corpus"):
            return  # it is begun anew: what there is of it stands in nobody's way
        try:
            check_identity(self.run / part.name, part.identity())
        except IdentityError:
            if not redo:
                raise
            stale = {part.name}
            for later in parts:
                if stale.intersection(later.after):
                    stale.add(later.name)
            folders = [self.run / name for name in sorted(stale)]
            checkpoints = [folder.with_name(folder.name + "-checkpoints") for folder in folders]
            answers = records_of(self.run, [name.removeprefix("train/") for name in stale])
            moved = [*folders, *checkpoints, *answers, self.run / "report"]
            names = [str(path.relative_to(self.run)) for path in moved if path.exists()]
            place = set_aside(self.run, moved)
            self._progress.say(f"moved {', '.join(names)} to {place}")

    def _write_recipe(self) -> None:
        settings = self.recipe.model_dump(mode="json", by_alias=True)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        with alone_in(self.run):  # processes that read a source each have this file in common
            write_text(self.run / RECIPE, text)

    def check(self) -> dict[str, Any]:
        """What the preflight found: models, tokenizers, and the disk that the run will take.

        Raises:
            RecipeError: a training could not be as the recipe has it.
            ModelError: a package is missing, or a model's files are not what they should be.
            TokenizerError: one changes more of the text than the recipe allows.
            CorpusError: the corpus is cut already, and a block exceeds a model's context.
            EvaluationError: data, packages or the sandbox of the recipe's suites are missing.
        """
        recipe = self.recipe
        self._require_place(self._parts())
        train.rehearse(recipe)
        require_models(self.readers)
        self.prepare_suites()
        self._say_note()
        cut = self._complete("corpus")
        cut = cut and is_same(self.run / "corpus", self._corpus_identity(), self._progress)
        look_at(recipe.corpus, self._progress)
        tried = try_text(recipe, self.run, self.readers, cut)
        if cut:
            for name, reader in self.readers.items():
                require_fits(self.run, name, reader, recipe.corpus, self._progress)
        existing = next(path for path in [self.run, *self.run.absolute().parents] if path.exists())
        return {
            "run": str(self.run),
            "models": described(self.readers, tried, None if cut else recipe.corpus.block_bytes),
            "projected_store_bytes": projected_store_bytes(recipe),
            "free_bytes": shutil.disk_usage(existing).free,
        }
