"""The processes that train one model together: how many there are, which this is, and waiting.

torchrun and accelerate start them, and accelerate joins them when the arguments of a training are
made; those that `--nproc` starts are joined before.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed
from accelerate.utils import gather_object

from fusellm.errors import FusellmError, RecipeError
from fusellm.training.launch import MEETING, launched

Result = TypeVar("Result")


def number() -> int:
    """Which process this is, from 0."""
    return torch.distributed.get_rank() if _joined() else 0


def count() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _joined() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return number() == 0


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        torch.distributed.barrier()


def first(do: Callable[[], Result]) -> Result:
    """What the first process makes, or its error, in all of them.

    Raises:
        FusellmError: it raised one.
    """
    if count() == 1:
        return do()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = do()
        except FusellmError as error:
            told[1] = error
    torch.distributed.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    result: Result = told[0]
    return result


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in their order; every process gets them."""
    of_all: list[Any] = gather_object(items) if count() > 1 else items
    return of_all


def join() -> None:
    """Find the other processes, where `--nproc` has started this one.

    They meet in a file, where a port would be open to others.
    """
    if MEETING in os.environ:
        torch.distributed.init_process_group(
            init_method=f"file://{os.environ[MEETING]}",
            rank=int(os.environ["RANK"]),
            world_size=launched(),
        )


def require_joined() -> None:
    """Check that the processes of a launcher have found each other, which accelerate sees to.

    Raises:
        RecipeError: each would train alone.
    """
    if launched() > 1 and count() == 1:
        raise RecipeError(
            f"WORLD_SIZE says {launched()} processes, and this one is alone: start them by "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )


def leave() -> None:
    """Part from the others, at the end of a command."""
    if _joined():
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
