"""What each process of a training does in test_several_processes.py: trainings, one after another.

    torchrun --nproc-per-node=2 tests/several.py CASES.json

FSDP needs a GPU by accelerate's own count; here its processes are told to be of GPUs that compute
on the CPU. All the rest is as it is.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

from fusellm.models import processes
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths


class Killed(BaseException):
    """In place of a signal."""


@contextmanager
def sharded() -> Iterator[None]:
    """FSDP on CPUs."""
    own = PartialState._prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = own
        del os.environ["ACCELERATE_TORCH_DEVICE"]


@contextmanager
def killed_at(step: int | None) -> Iterator[None]:
    """Every process stops before this batch."""
    own, count = Trainer.training_step, [0]

    def dying(self: Trainer, *positional: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            raise Killed
        return own(self, *positional, **named)

    Trainer.training_step = dying
    try:
        yield
    except Killed:
        processes.wait()
    finally:
        Trainer.training_step = own


@contextmanager
def nothing() -> Iterator[None]:
    """As it is."""
    yield


def train(case: dict[str, Any]) -> None:
    """Train one model."""
    recipe_path = Path(case["recipe"])
    recipe = resolve_paths(load_recipe(recipe_path, case["changes"]), recipe_path.parent)
    with sharded() if case.get("fsdp") else nothing(), killed_at(case.get("dies_at")):
        Pipeline(recipe, Path(case["run"]), Silent()).execute(["train/fused"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(one)
    processes.leave()
