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
from transformers import PreTrainedModel, Trainer

from fusellm.models import processes
from fusellm.models.heads import is_sharded
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.stages.train.validation import Validation


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
    else:
        assert step is None
    finally:
        Trainer.training_step = own


@contextmanager
def nothing() -> Iterator[None]:
    """As it is."""
    yield


@contextmanager
def validated_when(sharded: bool) -> Iterator[None]:
    """Every validation is of a model that is sharded, or of one that is not."""
    own, seen = Validation.measure, set()

    def measure(self: Validation, model: PreTrainedModel) -> dict[str, float]:
        seen.add(is_sharded(model))
        return own(self, model)

    Validation.measure = measure
    yield
    Validation.measure = own
    assert seen <= {sharded}


def train(case: dict[str, Any]) -> None:
    """Train one model."""
    recipe_path = Path(case["recipe"])
    recipe = resolve_paths(load_recipe(recipe_path, case["changes"]), recipe_path.parent)
    fsdp, dies_at, run = case["fsdp"], case["dies_at"], Path(case["run"])
    with sharded() if fsdp else nothing(), validated_when(fsdp), killed_at(dies_at):
        Pipeline(recipe, run, Silent()).execute(["train/fused"])
    checkpoints = run / "train" / "fused-checkpoints"
    assert (checkpoints / "checkpoint-4").is_dir() if dies_at else not checkpoints.exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(one)
    processes.leave()
