"""What a study can say: a base recipe, and arms that each differ from it in a few settings."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fusellm.config.base import Name, SettingsBlock
from fusellm.config.merging import MergeMethod, MergeNumbers


class ArmMerge(MergeNumbers):
    """Arms whose weights are merged; what all are trained from is the base."""

    of: Annotated[list[Name], Field(min_length=2)]
    """Names of the arms, of each the model with the same seed."""
    method: MergeMethod
    """As `fusellm merge --method` has it."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise ValueError(f"of: {', '.join(self.of)} names one twice; name each once")
        return self


EnsembleWeights = Literal["uniform", "bayes"]


class ArmEnsemble(SettingsBlock):
    """The target and the sources as one model, at inference; nothing is trained."""

    weights: EnsembleWeights = "uniform"
    """`uniform`: all count alike; `bayes`: by how likely each found the text that was read so far
    (docs/study.md)."""
    model: Name | None = None
    """An arm whose model takes the target's place; the target as it is if not said."""


class ArmSettings(SettingsBlock):
    """One arm: the base recipe with some settings changed."""

    train: Literal["fused", "clm"] = "fused"
    """`fused`: on λ·L_CLM + (1−λ)·L_Fusion; `clm`: plain continued training on the same text."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of the recipe that this arm has, by their dotted names: {fusion.function: bayes}."""
    sources: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the base's sources that are heard; all of them if not said."""
    compute_of: Name | None = None
    """Of a `clm` arm: another arm, as much computing as which it may spend, the reading of the
    sources included. It trains for more epochs then."""
    rates: list[Annotated[float, Field(gt=0)]] | None = None
    """Learning rates to search, where they are not the study's."""
    merge: ArmMerge | None = None
    """Nothing is trained: the weights of other arms are merged. `{of: [a, b], method: sce}`."""
    ensemble: ArmEnsemble | None = None
    """Nothing is trained: the sources join the target when text is predicted. {} is all of them,
    equally weighted."""

    @property
    def needs(self) -> list[str]:
        """Arms that have to be there before it."""
        if self.merge is not None:
            return self.merge.of
        named = self.compute_of if self.ensemble is None else self.ensemble.model
        return [] if named is None else [named]

    @property
    def kind(self) -> Literal["training", "merge", "ensemble"]:
        """What its model is."""
        if self.merge is not None:
            return "merge"
        return "training" if self.ensemble is None else "ensemble"

    @model_validator(mode="after")
    def _says_what_belongs_to_its_kind(self) -> Self:
        may_say = {"merge": {"merge"}, "ensemble": {"ensemble", "sources"}}
        said = sorted(self.model_fields_set - may_say.get(self.kind, self.model_fields_set))
        if said:
            raise ValueError(
                f"{said[0]} has no meaning with {self.kind}, which trains nothing; leave it out, "
                "and say it of an arm that is trained"
            )
        if self.train == "clm" and self.sources is not None:
            raise ValueError("sources have no meaning with train: clm, which reads none; leave out")
        if self.train == "fused" and self.compute_of is not None:
            raise ValueError(f"compute_of: {self.compute_of} belongs to an arm with train: clm")
        return self


class StudySettings(SettingsBlock):
    """A study of fusellm."""

    name: Name
    """Name of the study; its folder is runs/NAME unless --out says another."""
    recipe: str
    """The base recipe, relative to the study's folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of the recipe that all arms have, by their dotted names."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    """Seeds of the trainings."""
    rates: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """Learning rates that every arm tries with the first seed; the best by bits per byte of the
    validation part is kept. Without any, the recipe's."""
    arms: Annotated[dict[Name, ArmSettings], Field(min_length=1)]
    """The arms by name."""
    reference: Name = "clm"
    """The arm that all others are compared with."""
    compare: list[tuple[Name, Name]] = Field(default_factory=list)
    """Pairs of arms that are compared besides."""

    @model_validator(mode="after")
    def _names_arms_that_there_are(self) -> Self:
        known = ", ".join(self.arms)
        for one in [self.reference, *(arm for pair in self.compare for arm in pair)]:
            if one not in self.arms:
                key = "reference" if one == self.reference else "compare"
                raise ValueError(f"{key}: there is no arm {one!r}; there are {known}")
        if self.arms[self.reference].kind != "training":
            raise ValueError(
                f"reference: {self.reference} is not trained, and has no curve that others could "
                "reach; name an arm that is"
            )
        for name, arm in self.arms.items():
            for other in arm.needs:
                self._require_other(name, other, known)
        for key in ("seeds", "rates"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: one is named twice; name each once")
        return self

    def _require_other(self, name: str, other: str, known: str) -> None:
        """Refuse an arm that needs another which is not there, or which comes after it."""
        key = {"merge": "merge.of", "ensemble": "ensemble.model"}
        kind = self.arms[name].kind
        where = f"arms.{name}.{key.get(kind, 'compute_of')}"
        if other not in self.arms:
            raise ValueError(f"{where}: there is no arm {other!r}; there are {known}")
        if other == name:
            raise ValueError(f"{where}: that is the arm itself")
        needed = self.arms[other]
        order = ("training", "merge", "ensemble")
        if needed.kind != "training" and order.index(needed.kind) >= order.index(kind):
            raise ValueError(f"{where}: {other} is no training; name an arm that is trained")
        if kind == "training" and needed.needs:
            raise ValueError(
                f"{where}: {other} has a compute_of itself; name the arm that it names"
            )
