"""The trainer of a run: crash-safe, stopped by what is no number, validated in bits per byte."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from fusellm.errors import NumericsError, StoreError
from fusellm.models.adapters import without_adapters
from fusellm.models.heads import is_sharded
from fusellm.models.swapped_forward import swapped_forward
from fusellm.objective.divergence import Divergence
from fusellm.objective.schedule import LambdaSchedule
from fusellm.store.files import saving_explained
from fusellm.training import processes
from fusellm.training.checkpoints import require_intact, seal
from fusellm.training.collator import BatchCounts
from fusellm.training.nan_report import Blame
from fusellm.training.rows import Rows
from fusellm.training.stop import Stop
from fusellm.training.trainer import FusionTrainer
from fusellm.training.validation import Validation


class ObjectiveTrainer(FusionTrainer):
    """A run's trainer: it stops at NaN, validates in bits per byte, and loses nothing.

    Whatever is measured on a device stays there until it is logged, but for one look at the loss
    of each batch, where transformers' own Trainer takes two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Rows,
        schedule: LambdaSchedule,
        divergence: Divergence,
        validation: Validation,
        blame: Blame,
        stop: Stop,
    ) -> None:
        super().__init__(
            model,
            arguments,
            rows,
            lambda_=schedule,
            divergence=divergence,
            eval_dataset=rows,  # Trainer wants one; `evaluate` measures the validation part
        )
        self._validation, self._blame = validation, blame
        self._stop = stop
        self._gradient: tuple[torch.Tensor | float, int, list[int]] | None = None
        self._step_blocks: list[int] = []
        self._fault: str | None = None
        self.remove_callback(PrinterCallback)

    def _tokenizer_of(self, *_: Any) -> None:
        """Model and rows are of one recipe, which may name a tokenizer of another place."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> Any:
        """One batch forward and backward.

        Raises:
            NumericsError: its loss, or the gradient of the step before, is NaN or infinite.
        """
        counts: BatchCounts = inputs["counts"]
        loss = super().training_step(model, inputs, *args)
        self.require_finite_gradient()
        if not bool(torch.isfinite(loss)):
            step = self.state.global_step + 1
            error = self._blame.error(f"the loss of step {step} is {loss.item()}", counts.blocks)
            if processes.count() == 1:
                raise error
            self._fault = self._fault or str(error)  # all are told before the next batch
        self._step_blocks += counts.blocks
        return loss

    # Trainer would count padding, and would gather with one wait more; ours has the counts of the
    # batch, and tells all processes of faults and of a stop in the same exchange.
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        tokens: int = inputs["counts"].tokens
        if processes.count() > 1:
            tokens = self._told(tokens)
        self.state.num_input_tokens_seen += tokens

    def _told(self, tokens: int) -> int:
        """Tokens of all processes together; and all know what one has been told or has met.

        Raises:
            NumericsError: in each of them, if one has met a loss that is no number.
        """
        told = [tokens, int(self._fault is not None), int(self._stop.asked)]
        own = torch.tensor([told], device=self.args.device)
        total, faults, stops = self.accelerator.gather(own).sum(0).tolist()
        self._stop.agreed = bool(stops)
        if faults:
            raise NumericsError(processes.gathered([self._fault] if self._fault else [])[0])
        return int(total)

    def require_finite(self) -> None:
        """Check the last batch, which no other one follows.

        Raises:
            NumericsError: its loss or its gradient is NaN or infinite.
        """
        if processes.count() > 1:
            self._told(0)
        self.require_finite_gradient()

    # The norm is looked at after the next step has been given to the device: reading it here, as
    # `logging_nan_inf_filter` would, makes the host wait in every step.
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        get: Any = super()._get_grad_norm
        norm = get(model, grad_norm)
        self._gradient = norm, self.state.global_step + 1, self._step_blocks
        self._step_blocks = []
        return norm

    def require_finite_gradient(self) -> None:
        """Check the norm of the last step's gradient, looked at once the device has gone on.

        A scaler (fp16) leaves out the steps whose gradient overflows, and goes on.

        Raises:
            NumericsError: it is NaN or infinite, and so are the weights by now.
        """
        if self._gradient is None or self.accelerator.scaler is not None:
            return
        norm, step, blocks = self._gradient
        self._gradient = None
        norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not bool(torch.isfinite(norm)):
            what = f"the gradient of step {step} has the norm {norm.item()}"
            raise self._blame.error(what, processes.gathered(blocks))  # the norm is that of all

    # Trainer removes the last checkpoint before the new one is known to be whole: a kill between
    # would leave none. So it removes nothing, and we do after the new one is sealed.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.require_finite_gradient()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        try:
            with saving_explained(output):
                super()._save_checkpoint(*args, **kwargs)
            processes.wait()  # each writes a part of it
            if processes.is_first():
                seal(folder)
        except StoreError:
            shutil.rmtree(folder, ignore_errors=True)  # half of it would only keep the disk full
            raise
        self.args.save_total_limit = limit
        if processes.is_first():  # now, and not before
            rotate_checkpoints(str(output), limit, self.state.best_model_checkpoint)

    # Trainer would load what a disk has damaged since, and go on with it in silence.
    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        processes.first(lambda: require_intact(best))
        super()._load_best_model()

    # Trainer saves by its own schedule only, so that the best one would be forgotten between two.
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not self.args.load_best_model_at_end:
            return False
        best: bool = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        resumed_at = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # its path is another one if the run has been moved
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            if not best.is_dir():  # it was damaged: the best of those that are left is kept
                self.state.best_global_step, self.state.best_metric = 0, None
        return resumed_at

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the loss its parts and the tokens so far."""
        if "loss" in logs and self._loss_log.any:
            logs = logs | {"tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Bits per byte of the validation part."""
        began = time.perf_counter()
        whole = self.accelerator.unwrap_model(self.model)
        training = whole.training
        whole.eval()
        with self.accelerator.autocast():  # in the precision that is trained in
            bits_per_byte = self._measured(whole)
        whole.train(training)
        metrics = {f"eval_{domain}": value for domain, value in bits_per_byte.items()}
        self.log(metrics | {"tokens": self.state.num_input_tokens_seen})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._loss_log.leave_out(time.perf_counter() - began)
        return metrics

    def _measured(self, whole: torch.nn.Module) -> dict[str, float]:
        """The validation of the model, which FSDP has whole only inside its forward."""
        model = without_adapters(whole)
        if not is_sharded(model):
            return self._validation.measure(model)
        with swapped_forward(whole, lambda: self._validation.measure(model)):
            bits_per_byte: dict[str, float] = whole()
        return bits_per_byte

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that are spread over the processes (FSDP), on the first one's host.

        All processes have to ask. None where each has them as they are.
        """
        if not self.is_fsdp_enabled:
            return None
        weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model)
        return weights

    def records(self) -> list[dict[str, Any]]:
        """The log as lines for people and the report."""
        lines: list[dict[str, Any]] = []
        for entry in self.state.log_history:
            if "clm_loss" in entry:
                lines.append({"steps": self.state.max_steps, **entry})
            elif any(key.startswith("eval_") for key in entry):
                domains = {k.removeprefix("eval_"): v for k, v in entry.items() if k[:5] == "eval_"}
                place = {"step": entry["step"], "tokens": entry["tokens"]}
                lines.append(place | {"validation": domains})
        return lines

    def counts(self) -> dict[str, Any]:
        """What the training counted, and which step's model it ends with."""
        state = self.state
        counts: dict[str, Any] = {"steps": state.global_step, "tokens": state.num_input_tokens_seen}
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            counts |= {"kept_step": self.state.best_global_step}
        return counts
