"""A study's file: what is to be trained, and the recipe of each training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusellm.config import Recipe
from fusellm.config.study import ArmSettings, StudySettings
from fusellm.errors import ArgumentError, RecipeError
from fusellm.merging.settings import settings_of
from fusellm.recipe_file import check_recipe, checked_file, load_recipe, resolve_paths
from fusellm.store.externalized import TARGET
from fusellm.store.run_folder import CLM, FUSED


@dataclass(frozen=True)
class Unit:
    """One training of a study.

    Attributes:
        arm: its name.
        seed: of the training.
        rate: learning rate; None for the recipe's.
    """

    arm: str
    seed: int
    rate: float | None = None

    @property
    def folder(self) -> str:
        """Where its run is, in the study's folder.

        >>> Unit("bayes", 1, 2e-3).folder
        'arms/bayes/seed-1-rate-0.002'
        """
        rate = "" if self.rate is None else f"-rate-{self.rate:g}"
        return f"arms/{self.arm}/seed-{self.seed}{rate}"


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        settings: what its file says.
        file: where that is.
        base: the base recipe with what all arms have, local paths made absolute.
        chosen: names of the arms that are wanted, in the file's order.
    """

    settings: StudySettings
    file: Path
    base: Recipe
    chosen: tuple[str, ...]

    def arm(self, name: str) -> ArmSettings:
        """What an arm is."""
        return self.settings.arms[name]

    def rates(self, arm: str) -> Sequence[float | None]:
        """The learning rates that an arm tries; of one that is not trained, none but None."""
        if self.arm(arm).kind != "training":
            return [None]
        own = self.arm(arm).rates
        return (self.settings.rates if own is None else own) or [None]

    def which(self, arm: str) -> str:
        """What the arm's runs train: FUSED or CLM."""
        return CLM if self.arm(arm).train == "clm" else FUSED

    def of_kind(self, kind: str) -> list[str]:
        """The wanted arms of a kind, in the file's order."""
        return [name for name in self.chosen if self.arm(name).kind == kind]

    def made_of(self, arm: str) -> list[str]:
        """The arms whose models an arm's model is made of; of one that is trained, itself."""
        return [arm] if self.arm(arm).kind == "training" else self.arm(arm).needs

    def heard(self, arm: str) -> list[str]:
        """The sources of an arm; no referees, who only compare."""
        own = self.arm(arm).sources
        teaching = [source.name for source in self.base.sources if not source.referee]
        return teaching if own is None else own

    def recipe(self, unit: Unit, more: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe of one training.

        Args:
            more: further settings, by their dotted names.

        Raises:
            RecipeError: what the arm changes gives no recipe; its name is told.
        """
        arm, which = self.arm(unit.arm), self.which(unit.arm)
        of_baseline = "training.clm." if which == CLM else "training."
        settings = {**arm.set, "training.seed": unit.seed, "training.clm_baseline": which == CLM}
        if unit.rate is not None:
            settings[f"{of_baseline}learning_rate"] = unit.rate
        settings |= {f"{of_baseline}{key}": value for key, value in (more or {}).items()}
        where = f"{self.file}: arm {unit.arm}"
        try:
            recipe = _loaded(self.file, self.settings, settings)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        if arm.sources is None:
            return recipe
        _require_source(self, unit.arm, [source.name for source in recipe.sources])
        raw = recipe.model_dump(by_alias=True)
        raw["sources"] = [source for source in raw["sources"] if source["name"] in arm.sources]
        return check_recipe(raw, where)


def load_study(file: Path, arms: Sequence[str] = ()) -> Study:
    """Read and check a study, and the recipe of each of its arms.

    Args:
        arms: only these, the reference and whatever they need; all if empty.

    Raises:
        RecipeError: it is missing, no study, or an arm gives no recipe; every fault is named with
            its place.
    """
    settings = checked_file(file, StudySettings, "study")
    unknown = next((name for name in arms if name not in settings.arms), None)
    if unknown is not None:
        raise RecipeError(
            f"{file}: there is no arm {unknown!r}; there are {', '.join(settings.arms)}"
        )
    wanted = {*(arms or settings.arms), settings.reference}
    for _ in range(3):  # an ensemble may need a merge, that an arm, and that another's computing
        wanted |= {other for name in wanted for other in settings.arms[name].needs}
    base = _loaded(file, settings, {})
    if base.rounds > 1:
        raise RecipeError(
            f"{file}: the recipe has rounds: {base.rounds}, and an arm trains once; set rounds: 1"
        )
    names = [source.name for source in base.sources]
    clash = next((name for name in settings.arms if name in (*names, TARGET)), None)
    if clash is not None:
        raise RecipeError(f"{file}: arms.{clash}: a source has that name; give the arm another")
    study = Study(settings, file, base, tuple(name for name in settings.arms if name in wanted))
    for name in study.chosen:
        arm = study.arm(name)
        if arm.kind != "training":
            _require_source(study, name, [source.name for source in base.sources])
            if arm.merge is not None:
                _require_mergeable(study, name)
            continue
        for rate in study.rates(name):
            recipe = study.recipe(Unit(name, settings.seeds[0], rate))
            if recipe.training.validations == 0:
                raise RecipeError(
                    f"{file}: arm {name}: training.validations: 0 leaves nothing to compare rates "
                    "and curves by; set 1 or more"
                )
    return study


def _require_source(study: Study, name: str, known: Sequence[str]) -> None:
    """Check that the sources of an arm are some of the base's."""
    unknown = next((one for one in study.arm(name).sources or () if one not in known), None)
    if unknown is not None:
        raise RecipeError(
            f"{study.file}: arm {name}: the base recipe has no source {unknown!r}; it has "
            f"{', '.join(known)}"
        )


def _require_mergeable(study: Study, name: str) -> None:
    """Check what a merge is asked for, and that its models are of one target."""
    merge = study.arm(name).merge
    assert merge is not None
    where = f"{study.file}: arms.{name}.merge"
    try:
        settings_of(merge.method, len(merge.of), **merge.numbers)
    except ArgumentError as error:
        raise RecipeError(f"{where}: {error}") from None
    first, *others = (study.recipe(Unit(arm, study.settings.seeds[0])) for arm in merge.of)
    for arm, recipe in zip(merge.of, (first, *others), strict=True):
        lora = recipe.training.lora
        if lora is not None and not lora.merge:
            raise RecipeError(
                f"{where}: {arm} saves adapters alone (training.lora.merge: false), and a merge is "
                "of whole weights; set training.lora.merge: true"
            )
    for arm, recipe in zip(merge.of[1:], others, strict=True):
        if recipe.target != first.target:
            raise RecipeError(
                f"{where}: {merge.of[0]} and {arm} are of two targets, whose weights do not belong "
                "together; merge arms of one target"
            )


def _loaded(file: Path, settings: StudySettings, changes: Mapping[str, Any]) -> Recipe:
    """The base recipe with what all arms have, and then some more."""
    path = file.parent / settings.recipe
    spelled = [f"{key}={json.dumps(value)}" for key, value in {**settings.set, **changes}.items()]
    return resolve_paths(load_recipe(path, spelled), path.parent)
