"""What goes on beside a training: the bar, the last log line, and what stops it early."""

from typing import Any

from transformers import TrainerCallback

from fusellm.progress import Bar
from fusellm.training.arguments import METRIC
from fusellm.training.stop import Stop
from fusellm.training.validation import stalled


class Watch(TrainerCallback):
    """Shows the bar; stops once validations get no better, or when it is told to."""

    def __init__(self, bar: Bar, patience: int | None, stop: Stop) -> None:
        """Watch a training.

        Args:
            patience: validations in a row without a better one that end it; None for any number.
        """
        self._bar, self._patience, self._stop = bar, patience, stop
        self._told: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show what a resumed training has done."""
        self._bar.resize(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Show a step; the last one is logged whatever its number."""
        self._bar.advance(1)
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._stop.now:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, once the checkpoint is there."""
        if self._stop.now:
            self._stop.obey()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the last loss, and the last validation."""
        if "loss" in logs:
            self._told["loss"] = f"loss {logs['loss']:.3f}"
        if METRIC in logs:
            self._told[METRIC] = f"validation {logs[METRIC]:.3f} bits/byte"
        self._bar.advance(0, ", ".join(self._told[key] for key in sorted(self._told)))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop where validations get no better.

        No checkpoint is saved then: a training that is resumed comes to this validation again.
        """
        values = [entry[METRIC] for entry in state.log_history if METRIC in entry]
        if self._patience is not None and stalled(values, self._patience):
            control.should_training_stop = True
            control.should_log = True
            control.should_save = False
        return control
