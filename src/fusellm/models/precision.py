"""Whether half precision is any faster here: not every processor has instructions for it."""

import math
import time
from collections.abc import Mapping
from functools import cache

import torch

from fusellm.config import ModelSettings

_ROWS, _WIDTH = 128, 1024  # of the product that is timed: a few milliseconds
_LEAST_ROUNDS, _ROUNDS = 3, 20
SLOWER = 1.5
"""So many times the time of float32, from which on half precision is called slow."""
_TRAINS_IN = {"bfloat16": "bf16", "float16": "fp16"}  # by the names that training has for them


def slow_half_note(
    models: Mapping[str, ModelSettings], training: Mapping[str, object], device: torch.device
) -> str | None:
    """What a user should know whose recipe asks a processor for a precision that it is slow in.

    A product of matrices is timed, so that nothing has to be known of the processor.

    Args:
        models: by name, with the precision that each is read in.
        training: arguments of training.
        device: where models are to run.
    """
    if device.type != "cpu":
        return None
    for dtype, key in _TRAINS_IN.items():
        read = [name for name, settings in models.items() if settings.dtype == dtype]
        trains = bool(training.get(key))
        if (read or trains) and (slower := times_slower(dtype)) > SLOWER:
            cures = [
                *([f"`dtype: float32` for {', '.join(read)}"] if read else []),
                *([f"`training.{key}: false`"] if trains else []),
            ]
            return (
                f"note: this processor multiplies {dtype} matrices {slower:.1f} times slower than "
                f"float32 ones (just timed); {' and '.join(cures)} would be faster, at twice the "
                "memory of the weights"
            )
    return None


@cache
def times_slower(dtype: str) -> float:
    """How many times as long as in float32 a product of matrices takes on the CPU.

    >>> 0.1 < times_slower("float32") < 10
    True
    """
    kinds = torch.float32, getattr(torch, dtype)
    for kind in kinds:  # the first one prepares
        _seconds(kind)
    # The least of some rounds: others may be at work beside it. A pause of a few milliseconds would
    # be taken for slowness, so that this is not believed before many rounds say the same.
    least = [math.inf, math.inf]
    for round_ in range(_ROUNDS):
        least = [min(before, _seconds(kind)) for before, kind in zip(least, kinds, strict=True)]
        if round_ + 1 >= _LEAST_ROUNDS and least[1] <= SLOWER * least[0]:
            break
    return least[1] / least[0]


def _seconds(dtype: torch.dtype) -> float:
    given = torch.ones(_ROWS, _WIDTH, dtype=dtype)
    weights = torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    began = time.perf_counter()
    torch.nn.functional.linear(given, weights)
    return time.perf_counter() - began
