"""Another forward for a module, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def swapped_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling the module runs `forward` in place of its own.

    Why swap, and not wrap the model in a module of one's own, or compute outside of it?

    - What wraps a model averages gradients (DDP) or gathers weights (FSDP) around the *call* of the
      module that it wraps. What is computed outside of that call is not averaged, and sees a shard
      of the weights. Within a forward all is whole.
    - A wrapper of ours would be one more layer in every name: saving, tied weights, adapters and
      checkpoints would have to know of it. A module with another `forward` is the same module.

    A `forward` that was set on the module itself before, as accelerate's hooks do, is set again.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
