"""How the weights of models are merged: a method and its numbers, for a command or a study."""

from typing import Annotated, Any, Literal

from pydantic import Field

from fusellm.config.base import SettingsBlock

MergeMethod = Literal[
    "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce"
]


class MergeNumbers(SettingsBlock):
    """The numbers of a merge; which of them a method reads is in `fusellm.merging.settings`."""

    weights: list[float] | None = None
    """How much a model counts: one for each, in their order; if not given, each has 1. Not for
    slerp and sce."""
    density: float | None = None
    """How much of what a model has learnt is kept, in (0, 1]; if not given, 0.2 for ties, 0.5 for
    dare_linear and dare_ties, all for sce."""
    lambda_: Annotated[float | None, Field(alias="lambda")] = None
    """What is added to the base is multiplied by it; if not given, 1. For task_arithmetic, ties,
    dare_linear and dare_ties."""
    t: float | None = None
    """Of slerp: 0 is the first model, 1 the second; if not given, 0.5."""
    seed: int | None = None
    """Of what dare_… draws; if not given, 0."""

    @property
    def numbers(self) -> dict[str, Any]:
        """Those that are given, as `fusellm.merging.merge.merge_models` takes them."""
        called = {name: name for name in MergeNumbers.model_fields} | {"lambda_": "scale"}
        given = {called[name]: getattr(self, name) for name in called}
        return {name: value for name, value in given.items() if value is not None}
