"""The processes that train one model together: how many there are, which this is, and waiting.

torchrun and accelerate start them; accelerate joins them when the arguments of a training are made.
"""

import os
from typing import Any

import torch.distributed
from accelerate.utils import gather_object


def launched() -> int:
    """How many processes a launcher started this command as; 1 without one."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        return 1


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


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in their order; every process gets them."""
    found: list[Any] = gather_object(items) if count() > 1 else items
    return found


def leave() -> None:
    """Part from the others, at the end of a command."""
    if _joined():
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
