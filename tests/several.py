"""What each process of a training does in test_several_processes.py: trainings, one after another.

    torchrun --nproc-per-node=2 tests/several.py CASES.json RUN

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

from fusellm.errors import NumericsError
from fusellm.models.heads import is_sharded
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.training import processes
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.validation import Validation


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
        for name in [n for n in os.environ if n == "ACCELERATE_TORCH_DEVICE" or "FSDP" in n]:
            del os.environ[name]  # accelerate has set some, which would hold for the next training


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
    assert (checkpoints / "checkpoint-8").is_dir() if dies_at else not checkpoints.exists()


def meet_nan(case: dict[str, Any], run: Path) -> None:
    """The second process alone meets a loss that is no number, in its third batch."""
    own, count = ObjectiveTrainer.compute_loss, [0]

    def faulty(self: ObjectiveTrainer, *positional: Any, **named: Any) -> Any:
        count[0] += 1
        loss = own(self, *positional, **named)
        return loss * float("nan") if count[0] == 3 and not processes.is_first() else loss

    ObjectiveTrainer.compute_loss = faulty
    try:
        train(case | {"run": str(run), "fsdp": False, "dies_at": None})
    except NumericsError as error:
        told = processes.gathered([str(error)])
        assert len(told) == 2
        assert len(set(told)) == 1
        if processes.is_first():
            (run.parent / "fault").write_text(told[0], encoding="utf-8")
    finally:
        ObjectiveTrainer.compute_loss = own


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for one in cases:
        train(one)
    plain = next(case for case in cases if "target.model=neox" not in case["changes"])
    meet_nan(plain, Path(sys.argv[2]))
    processes.leave()
