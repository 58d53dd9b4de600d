"""The order of a study's work, and what of it can be done at a time."""

import gc
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusellm.errors import ClusterError, RecipeError
from fusellm.evaluation.text.ensemble import RULE
from fusellm.merging.opened import require_target
from fusellm.merging.settings import METHODS
from fusellm.models.readers import Reader
from fusellm.pipeline import Pipeline
from fusellm.progress import Progress
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.stages.evaluate import like_the_target
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.externalized import TARGET
from fusellm.store.identity import digest
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import FUSED, trained_folder
from fusellm.study.apart import ApartTraining, train_in_processes, train_on_ray
from fusellm.study.compute import Compute, compute_of, reading_of
from fusellm.study.measured import Measurements, digest_of_held_out
from fusellm.study.plan import Study, Unit
from fusellm.study.results import Answers, Trained
from fusellm.study.trainings import (
    TrainingOutcome,
    Trainings,
    best_rate,
    discard,
    identity_of,
)

_BASE = "base"


class Execution:
    """A study at work in its folder."""

    def __init__(
        self,
        study: Study,
        out: Path,
        progress: Progress,
        *,
        jobs: int = 1,
        redo: bool = False,
        trusted: bool = False,
        engine: EngineSettings = LOCAL,
    ) -> None:
        """Find what all arms need; nothing is written.

        Args:
            jobs: trainings at a time, each in a process of its own if there are several.
            redo: move what was made from other settings aside, in place of an error.
            trusted: whether code that models bring along may run.
            engine: where sources are read and models trained; its workers then say how many are
                trained at a time.

        Raises:
            FusellmError: an arm's models or settings cannot be used.
        """
        if engine.name == "ray" and jobs > 1:
            raise ClusterError("--jobs is for this machine; with --engine ray, set --workers")
        self._study, self._out, self._progress = study, out, progress
        self._jobs, self._redo, self._trusted, self._engine = jobs, redo, trusted, engine
        self._trainings = Trainings(out, progress, trusted, engine)
        self._base = self._trainings.pipeline(study.base, _BASE)
        for arm in study.of_kind("training"):
            unit = Unit(arm, study.settings.seeds[0], study.rates(arm)[0])
            self._trainings.pipeline(study.recipe(unit), unit.folder)
        ensembles = study.of_kind("ensemble")
        if ensembles and study.base.corpus.has_conversations:
            raise RecipeError(
                f"{study.file}: arm {ensembles[0]} is an ensemble, which reads plain text alone, "
                "and the corpus is of conversations; leave it out"
            )
        for arm in study.of_kind("merge"):
            merge = study.arm(arm).merge
            assert merge is not None
            target = study.recipe(Unit(merge.of[0], study.settings.seeds[0])).target
            require_target(target, METHODS[merge.method].over_base)
        self._pipelines: dict[Unit, Pipeline] = {}
        self._parameters: dict[str, int] = {}
        self._outcomes: dict[Unit, TrainingOutcome] = {}
        self._computes: dict[Unit, Compute] = {}

    def run(self) -> Answers:
        """Do what is not done yet, and gather what there is.

        Raises:
            FusellmError: something is missing, or an arm cannot be as the study has it.
        """
        self._trainings.share(self._base, _corpus_of(self._base), self._redo)
        blocks = read_part(open_corpus(self._base.run), "held_out")
        self._measurements = Measurements(self._out, self._study.base, blocks, self._progress)
        nats = {name: self._untrained(name, one) for name, one in self._base.readers.items()}
        rates: dict[str, float | None] = {}
        first = self._study.settings.seeds[0]
        for arms in self._rounds():
            units = [Unit(arm, first, rate) for arm in arms for rate in self._study.rates(arm)]
            self._train(units)
            for arm in arms:
                of_arm = [unit for unit in units if unit.arm == arm]
                rates[arm] = best_rate([(unit.rate, self._outcomes[unit]) for unit in of_arm])
                for unit in of_arm:
                    if unit.rate != rates[arm]:
                        discard(self._out / unit.folder, self._study.which(arm))
            seeds = self._study.settings.seeds[1:]
            self._train([Unit(arm, seed, rates[arm]) for arm in arms for seed in seeds])
        for kind, know in (("merge", self._know_merged), ("ensemble", self._know_ensemble)):
            for arm in self._study.of_kind(kind):
                rates[arm] = None
                for seed in self._study.settings.seeds:
                    know(Unit(arm, seed), rates)
        trained: dict[str, list[Trained]] = {}
        for arm in self._study.chosen:
            units = [Unit(arm, seed, rates[arm]) for seed in self._study.settings.seeds]
            trained[arm] = [self._measured(unit, rates) for unit in units]
        tried: dict[str, dict[float | None, float]] = {
            arm: {rate: self._outcomes[Unit(arm, first, rate)].validation for rate in all_rates}
            for arm in self._study.chosen
            if len(all_rates := self._study.rates(arm)) > 1
        }
        return Answers(self._study, blocks, nats, trained, rates, tried)

    def _rounds(self) -> list[list[str]]:
        """Arms that can be trained at a time; those that have another's computing come after it."""
        trained = self._study.of_kind("training")
        later = [name for name in trained if self._study.arm(name).compute_of]
        sooner = [name for name in trained if name not in later]
        return [arms for arms in (sooner, later) if arms]

    def _untrained(self, name: str, reader: Reader) -> list[np.ndarray]:
        """Nats of a source or of the target before; how many parameters it has is known then."""
        nats, size = self._measurements.of_model(f"as-it-is/{name}", _told(reader), lambda: reader)
        self._parameters[name] = size
        return nats

    def _prepare(self, unit: Unit) -> Pipeline:
        """A unit's run, with all that its training reads.

        Raises:
            RecipeError: its held-out text is not that of the others.
        """
        if unit in self._pipelines:
            return self._pipelines[unit]
        recipe = self._study.recipe(unit, self._budget(unit))
        pipeline = self._trainings.pipeline(recipe, unit.folder)
        self._trainings.share(pipeline, _corpus_of(pipeline), self._redo)
        held_out = read_part(open_corpus(pipeline.run), "held_out")
        if digest_of_held_out(held_out) != digest_of_held_out(self._measurements.blocks):
            raise RecipeError(
                f"{self._study.file}: arm {unit.arm} changes corpus: so that its held-out text is "
                "another one, which cannot be compared; change train_bytes or train_tokens alone"
            )
        reads = [f"externalize/{TARGET}"]
        if self._study.which(unit.arm) == FUSED:
            reads += [*(f"externalize/{source.name}" for source in recipe.sources), "fuse"]
        self._trainings.share(pipeline, reads, self._redo)
        self._pipelines[unit] = pipeline
        return pipeline

    def _budget(self, unit: Unit) -> dict[str, Any]:
        """How long an arm trains that has another one's computing; nothing for others."""
        other = self._study.arm(unit.arm).compute_of
        if other is None:
            return {}
        spent = next(c for u, c in self._computes.items() if u.arm == other)
        training = self._study.recipe(unit).training
        given = training.arguments | training.clm
        times = spent.total / spent.training
        if given.get("max_steps", -1) > 0:
            return {"max_steps": max(1, round(given["max_steps"] * times))}
        return {"num_train_epochs": round(float(given.get("num_train_epochs", 3.0)) * times, 4)}

    def _train(self, units: Sequence[Unit]) -> None:
        """Train those units that are not trained yet, and know what came of all."""
        pending: list[tuple[Unit, Pipeline]] = []
        for unit in units:
            pipeline = self._prepare(unit)
            outcome = self._trainings.outcome(pipeline, self._study.which(unit.arm))
            if outcome is None:
                pending.append((unit, pipeline))
            else:
                self._know(unit, pipeline, outcome)
        apart = (bool(pending) and self._engine.name == "ray") or self._jobs > 1 < len(pending)
        if apart:
            self._train_apart(pending)
        for number, (unit, pipeline) in enumerate(pending):
            if not apart:
                what = f"training {number + 1} of {len(pending)}: {unit.folder}"
                self._progress.say(what)
            outcome = self._trainings.train(pipeline, self._study.which(unit.arm), self._redo)
            self._know(unit, pipeline, outcome)

    def _train_apart(self, pending: Sequence[tuple[Unit, Pipeline]]) -> None:
        """Train several at a time; each goes on where it was interrupted."""
        which = {unit: self._study.which(unit.arm) for unit, _ in pending}
        tasks = [
            ApartTraining(
                pipeline.recipe,
                pipeline.run.absolute(),
                which[unit],
                identity_of(pipeline, which[unit]),
                self._trusted,
            )
            for unit, pipeline in pending
        ]
        if torch.cuda.is_available():  # of models that this process has measured
            gc.collect()
            torch.cuda.empty_cache()
        if self._engine.name == "ray":
            finished = train_on_ray(tasks, self._out.absolute(), self._engine)
        else:
            finished = train_in_processes(tasks, self._jobs)
        with closing(finished), self._progress.start("training", len(tasks), "models") as bar:
            for told in finished:
                if told is None:
                    bar.advance()
                else:
                    self._progress.say(told)

    def _know(self, unit: Unit, pipeline: Pipeline, outcome: TrainingOutcome) -> None:
        which = self._study.which(unit.arm)
        self._outcomes[unit] = outcome
        self._computes[unit] = compute_of(pipeline, which, outcome.tokens, self._parameters)

    def _know_merged(self, unit: Unit, rates: Mapping[str, float | None]) -> None:
        """What a merge is made from, and what its parts cost together; nothing is merged yet."""
        parts = self._parts(unit, rates)
        outcomes = [self._outcomes[part] for part in parts]
        merge = self._study.arm(unit.arm).merge
        assert merge is not None
        told = [merge.method, merge.numbers, [outcome.identity for outcome in outcomes]]
        tokens, steps = sum(o.tokens for o in outcomes), sum(o.steps for o in outcomes)
        self._outcomes[unit] = TrainingOutcome(digest(told), tokens, steps, [])
        reading: dict[str, int] = {}
        for part in parts:
            which = self._study.which(part.arm)
            reading |= reading_of(self._prepare(part), which, self._parameters)
        training = sum(self._computes[part].training for part in parts)
        self._computes[unit] = Compute(sum(reading.values()), training)

    def _know_ensemble(self, unit: Unit, rates: Mapping[str, float | None]) -> None:
        """What an ensemble is made from; what its target has cost, if that is an arm's model."""
        arm = self._study.arm(unit.arm)
        assert arm.ensemble is not None
        target = [self._outcomes[part] for part in self._parts(unit, rates)]
        told = [_told(self._base.readers[name]) for name in (TARGET, *self._study.heard(unit.arm))]
        made_from = digest([RULE, arm.ensemble.weights, told, [one.identity for one in target]])
        tokens, steps = sum(o.tokens for o in target), sum(o.steps for o in target)
        self._outcomes[unit] = TrainingOutcome(made_from, tokens, steps, [])
        costs = [self._computes[part] for part in self._parts(unit, rates)]
        self._computes[unit] = costs[0] if costs else Compute(0, 0)

    def _parts(self, unit: Unit, rates: Mapping[str, float | None]) -> list[Unit]:
        arms = self._study.made_of(unit.arm)
        return [Unit(arm, unit.seed, rates[arm]) for arm in arms]

    def _measured(self, unit: Unit, rates: Mapping[str, float | None]) -> Trained:
        """What held-out text costs an arm's model."""
        ensemble, outcome = self._study.arm(unit.arm).ensemble, self._outcomes[unit]
        parts, of = self._parts(unit, rates), unit
        if ensemble is not None and not parts:
            of = Unit(unit.arm, self._study.settings.seeds[0])  # one for all, as nothing is trained
        name = of.folder.removeprefix("arms/").replace("/", "-")
        if ensemble is None:
            nats, _ = self._measurements.of_model(
                name, outcome.identity, lambda: self._reader(unit, rates)
            )
        else:
            sources = {one: self._base.readers[one] for one in self._study.heard(unit.arm)}
            nats = self._measurements.of_ensemble(
                name,
                outcome.identity,
                ensemble,
                lambda: self._reader(parts[0], rates) if parts else self._base.readers[TARGET],
                sources,
            )
        return Trained(unit, nats, outcome, self._computes[unit])

    def _reader(self, unit: Unit, rates: Mapping[str, float | None]) -> Reader:
        """The model of an arm that is trained or merged."""
        parts, merge = self._parts(unit, rates), self._study.arm(unit.arm).merge
        models = [self._weights(part) for part in parts]
        context = self._prepare(parts[0]).context
        if merge is None:
            return like_the_target(context, models[0])
        place, outcome = self._out / unit.folder, self._outcomes[unit]
        return like_the_target(context, self._trainings.merge(models, place, merge, outcome))

    def _weights(self, unit: Unit) -> Path:
        """The folder of a trained model, which is made again if its rate was not taken before."""
        which, pipeline = self._study.which(unit.arm), self._prepare(unit)
        folder = trained_folder(pipeline.run, which)
        if not ((folder / MANIFEST).exists() and StageFolder(folder).complete):
            self._trainings.train(pipeline, which, self._redo)
        return folder


def _told(reader: Reader) -> str:
    """What a model is that nothing was trained of."""
    precision = reader.located.settings.precision
    return digest([reader.located.fingerprint, precision, reader.tokenizer_fingerprint])


def _corpus_of(pipeline: Pipeline) -> list[str]:
    """The stages that make the corpus: what is generated, and the corpus."""
    return [one.name for one in pipeline.stages if one.command in ("generate", "corpus")]
