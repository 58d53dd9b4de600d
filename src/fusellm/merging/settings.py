"""What a merge is asked for: a method and its numbers, checked before any model is looked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusellm.errors import ArgumentError


@dataclass(frozen=True)
class Method:
    """What is known of a method before torch is imported.

    Attributes:
        what: it does, in a line.
        source: the paper that it is from.
        over_base: whether it merges what models have learnt over a base, their task vectors.
        takes: which of `weights`, `density`, `scale`, `t` and `seed` it reads.
        density: the share of entries that is kept if none is given.
        any_sign: whether a weight may be negative.
    """

    what: str
    source: str
    over_base: bool = False
    takes: tuple[str, ...] = ()
    density: float | None = None
    any_sign: bool = False


METHODS = {
    "linear": Method(
        "the weighted mean",
        "Wortsman et al. 2022, arXiv 2203.05482",
        takes=("weights",),
        any_sign=True,
    ),
    "slerp": Method(
        "two models, along the arc between them",
        "Shoemake 1985, doi 10.1145/325334.325242",
        takes=("t",),
    ),
    "task_arithmetic": Method(
        "the base, and what each model has learnt over it",
        "Ilharco et al. 2023, arXiv 2212.04089",
        over_base=True,
        takes=("weights", "scale"),
        any_sign=True,
    ),
    "ties": Method(
        "the largest changes, where most agree on the sign",
        "Yadav et al. 2023, arXiv 2306.01708",
        over_base=True,
        takes=("weights", "density", "scale"),
        density=0.2,
    ),
    "dare_linear": Method(
        "changes that are drawn at random and rescaled, added up",
        "Yu et al. 2024, arXiv 2311.03099",
        over_base=True,
        takes=("weights", "density", "scale", "seed"),
        density=0.5,
        any_sign=True,
    ),
    "dare_ties": Method(
        "changes that are drawn at random and rescaled, where most agree on the sign",
        "Yu et al. 2024, arXiv 2311.03099",
        over_base=True,
        takes=("weights", "density", "scale", "seed"),
        density=0.5,
    ),
    "sce": Method(
        "the changes that differ most between models; the weights follow from their size",
        "FuseChat, Wan et al. 2024, arXiv 2408.07990",
        over_base=True,
        takes=("density",),
        density=1.0,
    ),
}
"""The methods by their names, the plain ones first."""

_DEFAULTS: dict[str, Any] = {"weights": None, "density": None, "scale": 1.0, "t": 0.5, "seed": 0}


@dataclass(frozen=True)
class MergeSettings:
    """A method and its numbers, all that it reads filled in and the rest None.

    Attributes:
        weights: one for each model.
        density: share of the entries that is kept, in (0, 1].
        scale: λ, which what is added to the base is multiplied by.
        t: 0 is the first model, 1 the second.
        seed: of what is drawn.
    """

    method: str
    weights: tuple[float, ...] | None = None
    density: float | None = None
    scale: float | None = None
    t: float | None = None
    seed: int | None = None

    @property
    def over_base(self) -> bool:
        """Whether the method needs a base."""
        return METHODS[self.method].over_base


def settings_of(
    method: str,
    models: int,
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float | None = None,
    t: float | None = None,
    seed: int | None = None,
) -> MergeSettings:
    """Check what a merge is asked for; None is a method's own value.

    Args:
        models: how many are merged, the base not counted.

    Raises:
        ArgumentError: there is no such method, it does not read a number that is given, or a
            number is out of its range.

    >>> settings_of("ties", 2)
    MergeSettings(method='ties', weights=(1.0, 1.0), density=0.2, scale=1.0, t=None, seed=None)
    >>> settings_of("linear", 2, weights=[1, -1])
    Traceback (most recent call last):
    fusellm.errors.ArgumentError: the weights 1, -1 sum to 0, and linear divides by their sum; ...
    """
    if method not in METHODS:
        raise ArgumentError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    known = METHODS[method]
    _require_count(method, models)
    given: dict[str, Any] = {
        "weights": weights,
        "density": density,
        "scale": scale,
        "t": t,
        "seed": seed,
    }
    for name, value in given.items():
        if value is not None and name not in known.takes:
            takers = ", ".join(m for m, one in METHODS.items() if name in one.takes)
            raise ArgumentError(
                f"{_CALLED.get(name, name)} has no meaning with {method}; it belongs to {takers}. "
                "Leave it out, or take one of these"
            )
    filled: dict[str, Any] = {
        n: _DEFAULTS[n] if given[n] is None else given[n] for n in known.takes
    }
    if "density" in filled and density is None:
        filled["density"] = known.density
    if "weights" in filled:
        filled["weights"] = _weights(method, models, weights)
    settings = MergeSettings(method, **filled)
    _require_ranges(settings)
    return settings


_CALLED = {"scale": "lambda", "weights": "a weight"}
"""How a user calls what is called otherwise in Python."""


def _require_count(method: str, models: int) -> None:
    if models < 2:
        named = "one model is" if models else "no model is"
        raise ArgumentError(f"{named} named, and a merge is of two or more; name the others too")
    if method == "slerp" and models != 2:
        raise ArgumentError(
            f"slerp goes from one model to another, and {models} are named; name two, or take "
            "linear"
        )


def _weights(method: str, models: int, given: Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return (1.0,) * models
    shown = ", ".join(f"{weight:g}" for weight in given)
    if len(given) != models:
        raise ArgumentError(
            f"{len(given)} weights are given ({shown}) for {models} models; give one for each, in "
            "their order (the base has none)"
        )
    if not all(math.isfinite(weight) for weight in given):
        raise ArgumentError(f"the weights {shown} are not all numbers; give plain ones, like 0.5")
    if not METHODS[method].any_sign and min(given) < 0:
        raise ArgumentError(
            f"the weights {shown} are not all 0 or more, and {method} takes a mean by them; take "
            "task_arithmetic to subtract a model"
        )
    if method in ("linear", "ties", "dare_ties") and math.fsum(given) == 0:
        raise ArgumentError(
            f"the weights {shown} sum to 0, and {method} divides by their sum; give others"
        )
    return tuple(float(weight) for weight in given)


def _require_ranges(settings: MergeSettings) -> None:
    density, scale, t, seed = settings.density, settings.scale, settings.t, settings.seed
    if density is not None and not 0 < density <= 1:
        raise ArgumentError(
            f"density {density:g} is not in (0, 1]; it is the share of the entries that is kept, "
            "such as 0.2"
        )
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"lambda {scale:g} is no number; give a plain one, like 1.0")
    if t is not None and not 0 <= t <= 1:
        raise ArgumentError(f"t {t:g} is not in [0, 1]; 0 is the first model, 1 the second")
    if seed is not None and seed < 0:
        raise ArgumentError(f"seed {seed} is below 0; give 0 or a larger whole number")
