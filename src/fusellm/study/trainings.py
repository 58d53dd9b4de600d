"""A study's trainings: what they share is made once, and what is finished is never run again.

The study's folder:

    made/STAGE-DIGEST/    corpus, stores and fused distributions, by what they are made from
    arms/ARM/seed-S[-rate-R]/
                          a run, with hard links to what is in made/; `outcome.json` once it is
                          trained. The weights of rates that were not taken are deleted; of an
                          arm that is a merge, `merged/`
    measured/…            nats of held-out text of sources, target and trained models
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusellm.config import Recipe
from fusellm.config.study import ArmMerge
from fusellm.errors import StoreError
from fusellm.merging.merge import merge_models
from fusellm.pipeline import Pipeline
from fusellm.progress import Progress
from fusellm.reading.engine import LOCAL, EngineSettings
from fusellm.stages.stage import Stage
from fusellm.store.files import from_json, make_folder, write_text
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import trained_folder
from fusellm.store.writer import set_aside

OUTCOME, _MERGED_FROM = "outcome.json", "merged.json"


@dataclass(frozen=True)
class TrainingOutcome:
    """What is known of a training, once it is finished.

    Attributes:
        identity: digest of what the model is made from.
        tokens: that it was trained on, repeated ones counted again.
        steps: of the optimizer.
        curve: [(tokens, bits per byte of the validation part, mean over its domains)].
    """

    identity: str
    tokens: int
    steps: int
    curve: list[tuple[int, float]]

    @property
    def validation(self) -> float:
        """The last of the curve."""
        return self.curve[-1][1]


class Trainings:
    """The runs of a study's folder."""

    def __init__(
        self,
        out: Path,
        progress: Progress,
        trusted: bool = False,
        engine: EngineSettings = LOCAL,
    ) -> None:
        """`engine`: where sources are read."""
        self.out, self._progress, self._trusted, self._engine = out, progress, trusted, engine

    def pipeline(self, recipe: Recipe, folder: str) -> Pipeline:
        """A run in the study's folder."""
        run, trusted = self.out / folder, self._trusted
        return Pipeline(recipe, run, self._progress, self._engine, trusted=trusted)

    def share(self, pipeline: Pipeline, stages: Sequence[str], redo: bool = False) -> None:
        """Make stages, or link them where another run of the study has made the same.

        Args:
            stages: their names.
            redo: move what was made from other settings aside.
        """
        for stage in pipeline.stages:
            if stage.name not in stages:
                continue
            made = self._made(stage)
            if not stage.complete and (made / MANIFEST).exists():
                self._link(made, stage.folder)
            elif not stage.complete:
                self._progress.say(f"{pipeline.run.relative_to(self.out)}: {stage.name}")
            pipeline.execute([stage.name], redo)
            if not made.exists():
                self._link(stage.folder, made)

    def _made(self, stage: Stage) -> Path:
        identity = stage.identity()
        assert identity is not None, "only stages with one are shared"
        return self.out / "made" / f"{stage.name.replace('/', '-')}-{digest_of(identity)[:16]}"

    def _link(self, folder: Path, place: Path) -> None:
        """Have a finished folder at a second place as well; all of it, or nothing."""
        if place.exists():  # begun by an attempt that did not know of the other
            shutil.rmtree(place)
        make_folder(place.parent)
        half = self.out / "made" / ".half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(folder, half, copy_function=_linked)
        half.rename(place)

    def outcome(self, pipeline: Pipeline, which: str) -> TrainingOutcome | None:
        """Of a training that is finished, as the recipe has it now; None if it is not.

        Raises:
            StoreError: its file is damaged.
        """
        file = pipeline.run / OUTCOME
        if not file.exists():
            return None
        try:
            raw = from_json(file.read_text(encoding="utf-8"))
            outcome = TrainingOutcome(
                **raw | {"curve": [(int(n), float(v)) for n, v in raw["curve"]]}
            )
        except (TypeError, ValueError, KeyError) as error:
            raise StoreError(
                f"{file} is damaged ({error}); delete it, and the training is looked at anew"
            ) from None
        return outcome if outcome.identity == identity_of(pipeline, which) else None

    def train(
        self, pipeline: Pipeline, which: str, redo: bool = False, *, ensured: bool = False
    ) -> TrainingOutcome:
        """Train, or go on with it; what it reads has been shared.

        Args:
            redo: move what was made from other settings aside.
            ensured: whether what it reads has been looked at, on a machine that has all of it.
        """
        pipeline.execute([f"train/{which}"], redo, ensured=ensured)
        outcome = _outcome_of(pipeline, which)
        write_text(pipeline.run / OUTCOME, json.dumps(asdict(outcome), indent=1) + "\n")
        return outcome

    def merge(
        self, models: Sequence[Path], folder: Path, how: ArmMerge, outcome: TrainingOutcome
    ) -> Path:
        """Merge trained models, unless that has been done.

        Args:
            folder: gets `merged/`, and before it `merged.json`, which says what it is made from.
            outcome: of the merge.

        Returns:
            The folder of the merged model.
        """
        file, merged = folder / _MERGED_FROM, folder / "merged"
        told = json.dumps(asdict(outcome), indent=1) + "\n"
        if not file.exists() or file.read_text(encoding="utf-8") != told:
            set_aside(self.out, [merged])  # of other parts or numbers
            make_folder(folder)
            write_text(file, told)
        if not merged.exists():  # it is there whole, or not at all
            numbers = how.numbers
            merge_models(models, merged, method=how.method, progress=self._progress, **numbers)
        return merged


def discard(run: Path, which: str) -> None:
    """Delete a model that is no longer asked for; its outcome stays."""
    folder = trained_folder(run, which)
    (folder / MANIFEST).unlink(missing_ok=True)  # first: half a model must not be taken for one
    shutil.rmtree(folder, ignore_errors=True)


def digest_of(identity: Identity) -> str:
    """What a folder is made from, as one word."""
    return digest([identity.stage, dict(identity.settings), dict(identity.inputs)])


def identity_of(pipeline: Pipeline, which: str) -> str:
    """What a trained model is made from, once what it reads is there."""
    stage = next(one for one in pipeline.stages if one.name == f"train/{which}")
    identity = stage.identity()
    assert identity is not None, "a training has one"
    return digest_of(identity)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _outcome_of(pipeline: Pipeline, which: str) -> TrainingOutcome:
    folder = trained_folder(pipeline.run, which)
    counts: Mapping[str, Any] = StageFolder(folder).counts
    lines = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    curve = [(line["tokens"], line["validation"]["mean"]) for line in lines if "validation" in line]
    return TrainingOutcome(identity_of(pipeline, which), counts["tokens"], counts["steps"], curve)


def best_rate(outcomes: Sequence[tuple[float | None, TrainingOutcome]]) -> float | None:
    """The learning rate with the least bits per byte of validation text; of equals the first."""
    return min(outcomes, key=lambda one: one[1].validation)[0]
