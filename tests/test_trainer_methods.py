"""What fusellm overrides of transformers' Trainer is there, as it was read.

Most of it is private to transformers, which may rename or reorder it in any version. A training
would then go wrong in silence: a method that is called no more, an argument taken for another.
"""

import inspect
import re
from typing import Any

import pytest
import transformers
from transformers import Trainer, TrainerCallback

from fusellm.training.callbacks import Watch
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.trainer import FusionTrainer

READ_IN = "5.17.0 and 5.24.0"
"""The versions of transformers whose source was read for the table below; they agree."""

EPOCH = (
    "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
    "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained "
    "steps_trained_in_current_epoch"
)
STATE = "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial"
OVERRIDDEN = {
    "create_accelerator_and_postprocess": "",
    "_get_train_sampler": "train_dataset",
    "_run_epoch": EPOCH,
    "training_step": "model inputs num_items_in_batch",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "_track_num_input_tokens": "inputs",
    "_get_grad_norm": "model grad_norm",
    "_save_checkpoint": "model trial",
    "_load_best_model": "",
    "_determine_best_metric": "metrics trial",
    "_init_training_state": STATE,
    "log": "logs start_time",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "get_eval_dataloader": "eval_dataset",
    "get_test_dataloader": "test_dataset",
    "_get_eval_sampler": "eval_dataset",
}
"""Each method of Trainer that our two trainers override, and its parameters after `self`."""

EVENTS = ("on_train_begin", "on_step_end", "on_save", "on_log", "on_evaluate")
"""The events that Watch hears."""

LOOK_AT = (
    f"fusellm was written against transformers {READ_IN}; this is {transformers.__version__}. Read "
    "transformers/trainer.py, mend src/fusellm/training/{file} so that it works with this "
    "version and the lowest of pyproject.toml, then this table (tests/test_trainer_methods.py)."
)


def parameters(function: Any) -> str:
    """The names of a method's parameters after `self`, in order."""
    return " ".join(list(inspect.signature(function).parameters)[1:])


def faults_of(trainer: type, own: type) -> list[str]:
    """What of `trainer` is not as it was read."""
    faults = []
    source = inspect.getsource(trainer)
    for name, read in OVERRIDDEN.items():
        if not hasattr(trainer, name):
            faults.append(f"{name} is gone: ours is never called")
            continue
        if (found := parameters(getattr(trainer, name))) != read:
            faults.append(f"{name}({found}) was {name}({read})")
        if not re.search(rf"self\.{name}\b", source):
            faults.append(f"{name} is used by Trainer no more")
    both = {name for name in vars(own) if callable(getattr(own, name)) and hasattr(trainer, name)}
    both -= {"__init__", "__doc__", *OVERRIDDEN}
    return faults + [f"Trainer has a {name} too, which is not in the table" for name in both]


def test_what_is_overridden_is_as_it_was_read() -> None:
    assert faults_of(Trainer, FusionTrainer) == [], LOOK_AT.format(file="trainer.py")
    assert faults_of(Trainer, ObjectiveTrainer) == [], LOOK_AT.format(file="run_trainer.py")


def test_what_is_given_to_trainer_is_taken() -> None:
    given = {"model", "args", "train_dataset", "eval_dataset", "data_collator"}
    missing = given - set(parameters(Trainer.__init__).split())
    assert missing == set(), LOOK_AT.format(file="run_trainer.py")


@pytest.mark.parametrize("event", EVENTS)
def test_events_are_as_they_were_read(event: str) -> None:
    look = LOOK_AT.format(file="callbacks.py").replace("trainer.py,", "trainer_callback.py,")
    assert hasattr(TrainerCallback, event), f"{event} is gone: {look}"
    assert parameters(getattr(TrainerCallback, event)) == "args state control kwargs", look


def test_all_events_are_in_the_list() -> None:
    heard = {name for name in vars(Watch) if name.startswith("on_")}
    assert heard == set(EVENTS)


def test_a_method_that_changed_is_told() -> None:
    class Changed(Trainer):
        """Its parameters are in another order, and it uses none of the methods."""

        def compute_loss(self, inputs: Any, model: Any) -> Any: ...
        def counts(self) -> Any: ...

    faults = faults_of(Changed, ObjectiveTrainer)
    assert f"compute_loss(inputs model) was compute_loss({OVERRIDDEN['compute_loss']})" in faults
    assert "_save_checkpoint is used by Trainer no more" in faults
    assert "Trainer has a counts too, which is not in the table" in faults
