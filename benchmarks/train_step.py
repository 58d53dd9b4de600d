"""What a step of fusion training costs over a step of transformers' own Trainer.

    python benchmarks/train_step.py [--quick] [--json] [--recipe FILE] [--set KEY=VALUE]
                                    [--layers L --size D]

The demo's target on the demo's corpus, fused beforehand: ours is the stage's trainer with fused
distributions, the reference is `Trainer` with the model's own loss, on the same rows in the same
order. A step is all from the end of one to the end of the next: the loader, forward, backward,
clipping, AdamW, logging. In a full run also with a target of 6 layers and d = 512 of random
weights (`large_…`). With --recipe it is another recipe's target, in that recipe's precision.

    time_over_clm         seconds of a step of ours over one of Trainer's
    memory_over_clm       peak of a process that trains by ours over one that trains by Trainer,
                          above what it has before and the weights' gradients
    loader_over_training  tokens per second of the loader alone over those of the training
    windowed_loader_over_training
                          the same where the store is too large to be kept in memory

Rounds are interleaved, and the median of their ratios is taken.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from figures import command_line, peak_above, show
from fusellm.config import ModelSettings
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.objective.divergence import CROSS_ENTROPY
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.stages.train import lambda_schedule
from fusellm.store.blocks import open_corpus
from fusellm.training import rows as training_rows
from fusellm.training.arguments import training_arguments
from fusellm.training.collator import Collator
from fusellm.training.dataset import FusedDataset, FusionCollator
from fusellm.training.nan_report import Blame
from fusellm.training.rows import RowOrder, Rows
from fusellm.training.run_trainer import ObjectiveTrainer
from fusellm.training.stop import Stop
from fusellm.training.validation import Validation

_DEMO = Path(__file__).parent.parent / "recipes" / "demo-full.yaml"
_TEXT = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
_CORPUS = f"corpus.documents=[{{files: '{_TEXT}', domain: python}}]"
_OURS, _CLM = "ours", "clm"
_LARGE = (6, 512)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())

    def step_seconds(self) -> float:
        """Median over the steps after the first two."""
        return statistics.median(b - a for a, b in pairwise(self.ends[1:]))


class Bench:
    """A fused run, and trainings on it."""

    def __init__(
        self, run: Path, file: Path, changes: Sequence[str], layers: int | None, size: int
    ) -> None:
        """Open a run of a recipe.

        Args:
            layers: of a target of random weights; None for the recipe's.
        """
        recipe = resolve_paths(load_recipe(file, changes), file.parent)
        self.pipeline = Pipeline(recipe, run, Silent())
        self.recipe, self.run, self._layers, self._size = recipe, run, layers, size

    def rows(self) -> Rows:
        """Packed as the demo's are."""
        encoder = self.pipeline.readers["target"].encoder
        return FusedDataset.of_run(self.recipe, self.run, encoder, 0)

    def model(self) -> PreTrainedModel:
        """The target, in float32."""
        if self._layers is None:
            return load_model(
                self.pipeline.readers["target"].located, torch.device("cpu"), torch.float32
            )
        torch.manual_seed(0)
        tokens = len(load_tokenizer(locate(ModelSettings(model=self.recipe.target.model))))
        config = LlamaConfig(
            vocab_size=tokens,
            hidden_size=self._size,
            intermediate_size=4 * self._size,
            num_hidden_layers=self._layers,
            num_attention_heads=8,
            max_position_embeddings=4096,
        )
        return LlamaForCausalLM(config)

    @contextmanager
    def training(self, kind: str, steps: int, model: PreTrainedModel) -> Iterator[Trainer]:
        """A trainer, ready to train."""
        rows = self.rows()
        arguments = training_arguments(self.recipe, self.run / "none", "fused")
        arguments.max_steps, arguments.save_strategy = steps, "no"
        if kind == _CLM:
            arguments.include_num_input_tokens_seen = "no"
            trainer = Trainer(model, arguments, without_counts, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            yield trainer
            return
        encoder = self.pipeline.readers["target"].encoder
        ours = ObjectiveTrainer(
            model,
            arguments,
            rows,
            lambda_schedule(self.recipe.objective),
            CROSS_ENTROPY,
            Validation(encoder, [], self.recipe),
            Blame(open_corpus(self.run), self.run / "none"),
            Stop(),
        )
        yield ours

    def seconds(self, kind: str, steps: int) -> float:
        """Of a step."""
        clock = Clock()
        with self.training(kind, steps, self.model()) as trainer:
            trainer.add_callback(clock)
            trainer.train()
        return clock.step_seconds()

    def loader_seconds(self, steps: int, windowed: bool = False) -> float:
        """Of a step's batch, from the store to tensors."""
        kept = training_rows._CACHED_WHOLE_BYTES
        training_rows._CACHED_WHOLE_BYTES = 0 if windowed else kept
        rows, training = self.rows(), self.recipe.training
        training_rows._CACHED_WHOLE_BYTES = kept
        size = int(training.arguments["per_device_train_batch_size"])
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_size=size,
            sampler=RowOrder(rows.windows(), 0, size),
            collate_fn=FusionCollator(rows),
        )
        began = time.perf_counter()
        done = sum(1 for _ in zip(range(steps), loader, strict=False))
        return (time.perf_counter() - began) / done

    def peak_bytes(self, kind: str, steps: int) -> float:
        """Peak of this process above what it has before and the weights' gradients."""
        model = self.model()
        with self.training(kind, steps, model) as trainer:
            gradients = sum(p.nbytes for p in model.parameters())
            return float(peak_above(trainer.train) - gradients)


_collate = Collator(None, packed=True)


def without_counts(rows: Any) -> dict[str, Any]:
    """The batch as a model takes it."""
    batch = _collate(rows)
    del batch["counts"]
    return batch


def measure(
    bench: Bench, child: Callable[[str], float], steps: int, rounds: int
) -> dict[str, float]:
    """The figures of one target."""
    over_clm, over_loader, over_windowed, seconds = [], [], [], []
    for _ in range(rounds):
        ours, clm = bench.seconds(_OURS, steps), bench.seconds(_CLM, steps)
        over_clm.append(ours / clm)
        over_loader.append(ours / bench.loader_seconds(4 * steps))
        over_windowed.append(ours / bench.loader_seconds(4 * steps, windowed=True))
        seconds.append(ours)
    return {
        "time_over_clm": statistics.median(over_clm),
        "memory_over_clm": child(_OURS) / child(_CLM),
        "loader_over_training": statistics.median(over_loader),
        "windowed_loader_over_training": statistics.median(over_windowed),
        "step_seconds": statistics.median(seconds),
    }


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--recipe", type=Path, default=_DEMO, help="whose target is trained")
    parser.add_argument("--set", action="append", default=[], help="as in fusellm")
    parser.add_argument("--layers", type=int, help="of a target of random weights")
    parser.add_argument("--size", type=int, default=_LARGE[1], help="d of that target")
    parser.add_argument("--peak", choices=[_OURS, _CLM], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    is_demo = given.recipe == _DEMO
    size, steps, rounds = (30_000, 4, 2) if given.quick else (1_500_000, 10, 5)
    rows = 4 if given.quick else 8
    if not is_demo:
        size, steps, rounds, rows = (10_000, 3, 1, 1) if given.quick else (30_000, 5, 3, 2)
    changes = [
        *(_CORPUS, f"corpus.train_bytes={size}", "training.validations=0"),
        *(f"training.per_device_train_batch_size={rows}", "training.num_train_epochs=9"),
        *given.set,
    ]
    if given.peak:
        bench = Bench(given.run, given.recipe, changes, given.layers, given.size)
        print(json.dumps(bench.peak_bytes(given.peak, 3)))
        return
    targets = [("", given.layers)]
    if not given.quick and given.layers is None and is_demo:
        targets.append(("large_", _LARGE[0]))
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        Bench(run, given.recipe, changes, None, 0).pipeline.execute(
            ["corpus", "externalize", "fuse"]
        )
        for prefix, layers in targets:

            def child(kind: str, layers: int | None = layers) -> float:
                command = [sys.executable, __file__, f"--peak={kind}", f"--run={run}"]
                command += [f"--recipe={given.recipe}"]
                command += ["--quick"] * given.quick + [f"--set={change}" for change in given.set]
                command += [f"--layers={layers}", f"--size={given.size}"] if layers else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                return float(json.loads(done.stdout.splitlines()[-1]))

            bench = Bench(run, given.recipe, changes, layers, given.size)
            large = (min(steps, 5), min(rounds, 3)) if layers else (steps, rounds)
            found = measure(bench, child, *large)
            figures |= {prefix + name: value for name, value in found.items()}
    show(figures, given.json)


if __name__ == "__main__":
    main()
