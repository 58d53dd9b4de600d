"""What the target is trained on: `objective:`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fusellm.config.base import SettingsBlock, Share


class ObjectiveSettings(SettingsBlock):
    """L = λ·L_CLM + (1−λ)·L_Fusion."""

    lambda_: Annotated[float, Field(ge=0, le=1, alias="lambda")] = 0.9
    """Weight of L_CLM in L = λ·L_CLM + (1−λ)·L_Fusion; with a schedule, that of the first step."""
    lambda_schedule: Literal["constant", "linear", "cosine", "authors"] = "constant"
    """How λ goes to `lambda_end` over the steps of the training; `authors`: linearly to 1."""
    lambda_end: Share | None = None
    """λ after the last step, with `lambda_schedule` linear or cosine."""
    divergence: Literal["cross_entropy", "kl", "reverse_kl"] = "cross_entropy"
    """L_Fusion: cross-entropy or KL from the fused distribution to the target's, whose gradients
    are one, or KL from the target's to the fused."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """By which both distributions of L_Fusion are flattened, and L_Fusion times its square."""
    rest: Literal["bucket", "renormalize"] = "bucket"
    """What was not kept: one more outcome (`bucket`), or scaled away (`renormalize`, the paper)."""

    @model_validator(mode="after")
    def _has_one_end(self) -> Self:
        """The schedule of λ has an end, and only one."""
        shape, end = self.lambda_schedule, self.lambda_end
        if shape in ("linear", "cosine") and end is None:
            raise ValueError(f"objective.lambda_schedule: {shape} needs objective.lambda_end")
        if shape == "constant" and end is not None:
            raise ValueError(
                f"objective.lambda_end: {end:g} has no meaning with lambda_schedule: constant; set "
                "lambda_schedule to linear or cosine"
            )
        if shape == "authors" and end is not None:
            raise ValueError(
                f"objective.lambda_end: {end:g} has no meaning with lambda_schedule: authors, "
                "which ends at 1; use linear"
            )
        return self
