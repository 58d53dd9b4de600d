"""transformers' Trainer with a model whose forward is the objective."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from fusellm.errors import ArgumentError
from fusellm.models.adapters import without_adapters
from fusellm.models.pretrained import load_pretrained
from fusellm.objective.divergence import CROSS_ENTROPY, Divergence
from fusellm.objective.schedule import LambdaSchedule, checked_lambda
from fusellm.tokens.encode import Encoder
from fusellm.training import processes
from fusellm.training.collator import BatchCounts, Collator
from fusellm.training.dataset import FusionCollator
from fusellm.training.fit import Fit, require_known, tokenizer_beside
from fusellm.training.forward import objective_inputs, teach_objective
from fusellm.training.loss_log import LossLog
from fusellm.training.rows import RowOrder, Rows, RowsInOrder, RowsOfLikeLength


class FusionTrainer(Trainer):
    """transformers' Trainer on L = λ·L_CLM + (1−λ)·L_Fusion.

    What users know of Trainer works: its arguments, callbacks, checkpoints, PEFT, and several
    processes by torchrun or accelerate (DDP, FSDP2). What is left out is refused: logits are never
    there as a whole, so that `compute_metrics` has none, and the loss is the objective. Rows are
    read in an order that depends on seed and epoch alone, so that a training that goes on reads
    what it would have read. Beside the loss, `clm_loss` and `fusion_loss` (nats per predicted
    token, and per one with a fused distribution), `fused_share` and `lambda` are logged, and in an
    evaluation `eval_clm_loss` and `eval_fusion_loss`, which do not move with λ.

    >>> from transformers import TrainingArguments
    >>> from fusellm import FusedDataset, Tokenizer, fuse, load_pretrained, read_distributions
    >>> texts = ["for item in items:", "import the module"]
    >>> model, tokenizer = load_pretrained("zoo/python")
    >>> read = {"python": read_distributions(model, tokenizer, texts)}
    >>> dataset = FusedDataset(fuse(texts, Tokenizer.from_pretrained("zoo/prose"), read))
    >>> args = TrainingArguments("out", max_steps=1, report_to="none", save_strategy="no")
    >>> trainer = FusionTrainer("zoo/prose", args, dataset, lambda_=0.5)
    >>> trainer.lambda_at(0)
    0.5
    """

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: TrainingArguments,
        train_dataset: Rows,
        *,
        lambda_: float | LambdaSchedule = 0.9,
        divergence: Divergence = CROSS_ENTROPY,
        data_collator: Collator | None = None,
        **others: Any,
    ) -> None:
        """Prepare a training.

        Args:
            model: the target, with adapters of PEFT or without; or its name, which is loaded in
                float32.
            args: of any Trainer. What removes columns or wraps models in DataParallel is off.
            train_dataset: a `FusedDataset` in the target's tokens. They are compared with those of
                `processing_class`, or of the tokenizer beside the model, where there is one.
            lambda_: λ, or a schedule of it over the steps.
            divergence: what L_Fusion is (docs/method.md).
            data_collator: a `FusionCollator` of the dataset, if not given.
            others: what Trainer takes besides, such as `eval_dataset` (a `FusedDataset` too, or a
                dictionary of them), `callbacks`, `optimizers`.

        Raises:
            ArgumentError: λ is not in [0, 1], something is given that has no meaning here, or the
                dataset does not go with the model, its tokenizer or the divergence.
            ModelError: the model cannot be loaded, or does not keep packed rows' texts apart.
        """
        schedule = lambda_
        if not isinstance(schedule, LambdaSchedule):
            schedule = LambdaSchedule(checked_lambda(schedule))
        require_known(args, others)
        if isinstance(model, str):
            model, tokenizer = load_pretrained(model, device="cpu")  # Trainer places it
            others.setdefault("processing_class", tokenizer.tokenizer)
        given = others.get("processing_class")
        if isinstance(given, Encoder):
            given = others["processing_class"] = given.tokenizer  # which Trainer saves
        self._fit = Fit(model, self._tokenizer_of(model, given), divergence)
        self._fit.require("train_dataset", train_dataset)
        self._fit.require_all("eval_dataset", others.get("eval_dataset"))
        teach_objective(without_adapters(model))
        args = _adjusted(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator or FusionCollator(train_dataset),
            **others,
        )
        # Trainer tells this by the architecture's own forward. With it, it counts the predicted
        # tokens of all batches of a step, and the loss is their mean, not a mean of means.
        self.model_accepts_loss_kwargs = True
        self._schedule, self._divergence = schedule, divergence
        self._row_tokens, self._windows = train_dataset.row_tokens(), train_dataset.windows()
        self._lambda = schedule.start
        self._loss_log, self._eval_log = LossLog(args.device), LossLog(args.device)
        self._order = self._chosen_order()

    def lambda_at(self, step: int) -> float:
        """λ of the step that so many steps were done before."""
        return self._schedule.at(step, max(self.state.max_steps, 1))

    def _tokenizer_of(self, model: torch.nn.Module, given: Any) -> PreTrainedTokenizerBase | None:
        """The tokenizer whose tokens a model reads, as far as it is known."""
        for tokenizer in (given, getattr(given, "tokenizer", None)):  # a processor has one
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                return tokenizer
        return tokenizer_beside(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The objective over another `FusedDataset`, as `eval_loss`, by λ as it is now."""
        began = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._loss_log.leave_out(time.perf_counter() - began)
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Measure a dataset, the two losses each for itself too."""
        self._eval_log = LossLog(self.args.device)
        run: Any = super().evaluation_loop
        measured = run(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_log.any:  # rows that fill up the last batch of several processes count too
            means = self._eval_log.drained(self.accelerator)
            for name in ("clm_loss", "fusion_loss"):
                if name in means:
                    measured.metrics[f"{metric_key_prefix}_{name}"] = means[name]
        return measured

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of a dataset by its own outcomes, which are not those that are trained on."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset[dataset]
        with self._collating("eval_dataset", dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._collating("test_dataset", test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating(self, name: str, dataset: Any) -> Iterator[None]:
        """Make batches of another dataset; it may not be the one that was looked at first."""
        self._fit.require(name, dataset)
        own = self.data_collator
        self.data_collator = FusionCollator(dataset)
        try:
            yield
        finally:
            self.data_collator = own

    # Trainer's own would tell the lengths of rows from dictionaries, which they are not.
    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; under FSDP2 a loss stays float32 whatever the model computes in."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy: Any = getattr(plugin, "mixed_precision_policy", None)
        if plugin is not None and getattr(policy, "output_dtype", None) is not None:
            plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    def _chosen_order(self) -> RowOrder:
        count, seed = processes.count(), self.args.seed
        step = self.args.train_batch_size * count
        if self.args.train_sampling_strategy == "sequential":
            return RowsInOrder(self._windows, seed, step, count)
        if self.args.train_sampling_strategy == "random":
            return RowOrder(self._windows, seed, step, count)
        alike = step * self.args.gradient_accumulation_steps
        return RowsOfLikeLength(self._row_tokens, self._windows, alike, seed, step, count)

    # Trainer's own sampler depends on how often chance was asked before; a training that goes on
    # would read other rows.
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._order

    # accelerate does not reach the sampler of several processes in a resumed epoch, which would be
    # the first one again.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        self._order.set_epoch(kwargs["epoch"])
        run: Any = super()._run_epoch
        return run(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective of a batch, by the λ of the step."""
        if "counts" not in inputs:
            raise ArgumentError("batches have no counts: give a data_collator like FusionCollator")
        counts: BatchCounts = inputs["counts"]
        if "outcomes" in inputs and model.training:
            self._lambda = self._schedule.at(self.state.global_step, self.state.max_steps)
        given = objective_inputs(inputs, self._lambda, num_items_in_batch, self._divergence)
        outputs = model(**given)
        loss = outputs["loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        log = self._loss_log if model.training else self._eval_log
        log.add(counts, outputs["clm"], outputs["fusion"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the loss its parts."""
        if "loss" in logs and self._loss_log.any:
            logs = logs | {"lambda": self._lambda} | self._loss_log.drained(self.accelerator)
        super().log(logs, start_time)


def _adjusted(args: TrainingArguments) -> TrainingArguments:
    """A user's arguments with what the objective needs."""
    args = copy(args)
    args.remove_unused_columns = False  # distributions are columns of their own
    args._n_gpu = min(args.n_gpu, 1)  # with several GPUs in one process Trainer would wrap it
    return args
