"""λ over the steps of a training: a function of the step alone, so that a resumed one goes on."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from fusellm.errors import ArgumentError

Shape = Literal["constant", "linear", "cosine", "authors"]


def checked_lambda(value: Any) -> float:
    """A weight of L_CLM.

    Raises:
        ArgumentError: it is no number from 0 to 1.
    """
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ArgumentError(f"lambda is {value!r}; it must be a number from 0 to 1")
    return float(value)


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

    def __post_init__(self) -> None:
        """Check that all of it has a meaning.

        Raises:
            ArgumentError: it has not.
        """
        if self.shape not in get_args(Shape):
            raise ArgumentError(f"{self.shape!r} is no shape; known: {', '.join(get_args(Shape))}")
        for value in (self.start, self.end):
            if value is not None:
                checked_lambda(value)

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
