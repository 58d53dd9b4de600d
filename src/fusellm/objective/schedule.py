"""λ over the steps of a training: a function of the step alone, so that a resumed one goes on."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "authors"]


@dataclass(frozen=True)
class LambdaSchedule:
    """From λ at the first step towards another after the last.

    With s = steps done over steps in all:

        constant   λ
        linear     λ + (λ_end − λ) · s
        cosine     λ_end + (λ − λ_end) · (1 + cos πs) / 2
        authors    λ + (1 − λ) · s, the `hard_and_decay` of FuseLLM's own trainer

    Attributes:
        start: λ.
        shape: how it goes on.
        end: λ_end of linear and cosine.
    """

    start: float
    shape: Shape = "constant"
    end: float | None = None

    def at(self, step: int, steps: int) -> float:
        """λ of the step that `step` steps were done before, of `steps` in all.

        >>> schedule = LambdaSchedule(0.5, "linear", 0.9)
        >>> [round(schedule.at(step, 4), 3) for step in range(4)]
        [0.5, 0.6, 0.7, 0.8]
        """
        if self.shape == "constant":
            return self.start
        end = 1.0 if self.end is None else self.end
        done = step / steps
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (end - self.start) * done
