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

    @property
    def needs(self) -> list[str]:
        """Arms that have to be there before it."""
        one = [] if self.compute_of is None else [self.compute_of]
        return one if self.merge is None else self.merge.of

    @model_validator(mode="after")
    def _plain_training_reads_no_source(self) -> Self:
        said = sorted(self.model_fields_set - {"merge"})
        if self.merge is not None and said:
            raise ValueError(
                f"{said[0]} has no meaning with merge, which trains nothing; leave it out, and say "
                "it of the arms that are merged"
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
        if self.arms[self.reference].merge is not None:
            raise ValueError(
                f"reference: {self.reference} is a merge, which has no curve that others could "
                "reach; name an arm that is trained"
            )
        for name, arm in self.arms.items():
            for other in arm.needs:
                self._require_trained(name, other, known)
        for key in ("seeds", "rates"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: one is named twice; name each once")
        return self

    def _require_trained(self, name: str, other: str, known: str) -> None:
        """Refuse an arm that needs another which is not there, or needs one itself."""
        merged = self.arms[name].merge is not None
        where = f"arms.{name}.{'merge.of' if merged else 'compute_of'}"
        if other not in self.arms:
            raise ValueError(f"{where}: there is no arm {other!r}; there are {known}")
        if other == name:
            raise ValueError(f"{where}: that is the arm itself")
        if self.arms[other].needs and not (merged and self.arms[other].merge is None):
            what = "is a merge itself" if self.arms[other].merge else "has a compute_of itself"
            raise ValueError(f"{where}: {other} {what}; name an arm that it names")
