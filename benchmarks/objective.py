"""What the objective costs: over plain CLM, the authors' dense formulation, and torch's own.

    python benchmarks/objective.py [--quick] [--json] [--vocabulary N] [--positions 2048]

Forward and backward from last hidden states (d = 2,048; with --quick 256) and the head, float32,
one batch, all in one run with interleaved rounds; medians of ratios. V = 32,000, and 128,000
without --quick, whose figures begin with `large_`: 20 minutes on 2 cores and 10 GB.

    time_over_clm       ours with 20 single tokens a position and a rest, over cross-entropy
                        through full logits
    classes_over_clm    ours with the classes of Llama-2 with GPT-NeoX (tokenizers beside the
                        project; else of the zoo): 20 sampled source tokens a position
    time_over_dense     ours over the authors' way: a collator in Python that fills a dense row a
                        position for the target and two sources, cross-entropy against one of them
    time_over_torch     plain CLM by ours, over torch's chunked linear_cross_entropy
    memory_over_…       peak above inputs, weights and their gradients, in a process each
    error               largest |float32 − float64 textbook| of the gradients over their largest
                        entry, on a small batch of the same kind
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear_cross_entropy

from figures import add_tokenizers, command_line, load_encoder, peak_above, show
from fusellm.alignment.strategies import STRATEGIES
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.config import ModelSettings
from fusellm.models.load import load_tokenizer, locate
from fusellm.objective.chunked import Head, objective
from fusellm.objective.outcomes import Outcomes
from fusellm.objective.textbook import objective_textbook
from fusellm.store.translations import cached_translation
from fusellm.tokens.encode import Encoder

_KEPT, _LAMBDA = 20, 0.9
_VOCABULARY, _LARGE = 32_000, 128_000
_STDLIB = Path(statistics.__file__).parent


class Batch:
    """One batch's inputs. N positions, V vocabulary, d hidden size."""

    def __init__(self, positions: int, vocabulary: int, size: int, tokenizers: Path) -> None:
        """Random numbers of a trained head's scale; `tokenizers`: folder of real ones."""
        self.tokenizers = tokenizers
        self.chance = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(positions, size, generator=generator)
        self.weight = torch.randn(vocabulary, size, generator=generator) / size**0.5
        self.labels = torch.randint(0, vocabulary, (positions,), generator=generator)
        self.positions, self.vocabulary = positions, vocabulary

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and weight without gradients."""
        self.hidden.requires_grad_().grad = None
        self.weight.requires_grad_().grad = None
        return self.hidden, self.weight

    def single(self) -> Outcomes:
        """20 single tokens a position, the true one among them, and a rest."""
        ids = np.stack(
            [self.chance.choice(self.vocabulary, _KEPT, replace=False) for _ in self.labels]
        )
        mass = self.chance.dirichlet(np.full(_KEPT + 1, 0.3), self.positions)
        every = torch.arange(ids.size)
        return Outcomes(
            torch.ones(self.positions, dtype=torch.bool),
            torch.arange(self.positions),
            torch.from_numpy(mass[:, -1].astype(np.float32)),
            torch.arange(self.positions).repeat_interleave(_KEPT),
            torch.from_numpy(mass[:, :-1].astype(np.float32).ravel()),
            every,
            torch.from_numpy(ids.ravel()),
        )

    def classes(self) -> Outcomes:
        """Outcomes that are classes: those of source tokens drawn as a text has them.

        For another vocabulary than the tokenizers': a random partition into half as many classes.
        """
        source, target, names = _pair(self.tokenizers)
        if len(target.vocabulary) == self.vocabulary:
            sizes = len(source.vocabulary), len(target.vocabulary)
            make = partial(STRATEGIES["partition"].translate, source, target, None)
            translation = cached_translation("partition", *names, sizes, make)
            sets = translation.sets
            text = "".join(f.read_text(errors="ignore") for f in sorted(_STDLIB.glob("*.py"))[:20])
            (read,) = source.encode([text], [False])
            drawn = self.chance.choice(read.ids, (self.positions, _KEPT))
            outcome = translation.outcome_of_source[drawn]
        else:
            of_target = self.chance.integers(0, self.vocabulary // 2, self.vocabulary)
            offsets = offsets_of(np.bincount(of_target, minlength=self.vocabulary // 2))
            sets = OutcomeSets(offsets[:-1], offsets[1:], np.argsort(of_target, kind="stable"))
            outcome = of_target[self.chance.integers(0, self.vocabulary, (self.positions, _KEPT))]
        rows = [np.unique(row[row >= 0], return_counts=True) for row in outcome]
        lengths = np.array([len(ids) for ids, _ in rows])
        mass = np.concatenate([counts / _KEPT for _, counts in rows])
        rest = 1 - np.array([counts.sum() / _KEPT for _, counts in rows])
        members, place = sets.take(np.concatenate([ids for ids, _ in rows]))
        return Outcomes(
            torch.ones(self.positions, dtype=torch.bool),
            torch.arange(self.positions),
            torch.from_numpy(rest.clip(0).astype(np.float32)),
            torch.arange(self.positions).repeat_interleave(torch.from_numpy(lengths)),
            torch.from_numpy(mass.astype(np.float32)),
            torch.from_numpy(place),
            torch.from_numpy(members),
        )


def _pair(tokenizers: Path) -> tuple[Encoder, Encoder, tuple[str, str]]:
    """Source and target of the classes, and names for their cached map."""
    if (tokenizers / "llama-2").exists():
        return (
            load_encoder(tokenizers / "gpt-neox-20b"),
            load_encoder(tokenizers / "llama-2"),
            ("benchmark-gpt-neox-20b", "benchmark-llama-2"),
        )
    source, target = (
        Encoder(load_tokenizer(locate(ModelSettings(model=f"zoo/{name}"))))
        for name in ("python", "prose")
    )
    return source, target, ("benchmark-zoo-python", "benchmark-zoo-prose")


def clm(batch: Batch) -> None:
    """Through full logits."""
    hidden, weight = batch.leaves()
    cross_entropy(hidden @ weight.t(), batch.labels).backward()


def torchs(batch: Batch) -> None:
    """torch's own, in chunks."""
    hidden, weight = batch.leaves()
    options = torch.nn.LinearCrossEntropyOptions()
    linear_cross_entropy(hidden, weight, batch.labels, options=options).backward()


def ours(batch: Batch, outcomes: Outcomes | None) -> None:
    """Ours."""
    hidden, weight = batch.leaves()
    count = len(batch.labels)
    objective(hidden, Head(weight), batch.labels, outcomes, _LAMBDA, count=count).total.backward()


def dense(batch: Batch, outcomes: Outcomes) -> None:
    """The authors' collator and loss: three dense tensors, filled row by row."""
    ids = outcomes.member_id.view(-1, _KEPT).tolist()
    masses = outcomes.mass.view(-1, _KEPT).tolist()
    filled = []
    for _ in range(3):
        rows = torch.zeros(batch.positions, batch.vocabulary)
        for n in range(batch.positions):
            row = torch.zeros(batch.vocabulary)
            whole = sum(masses[n])
            row[ids[n]] = torch.tensor([mass / whole for mass in masses[n]])
            rows[n] = row
        filled.append(rows)
    chosen = torch.randint(0, 3, (batch.positions, 1))
    target = torch.where(chosen == 0, filled[0], torch.where(chosen == 1, filled[1], filled[2]))
    hidden, weight = batch.leaves()
    logits = hidden @ weight.t()
    plain = cross_entropy(logits, batch.labels)
    fused = cross_entropy(logits, target)
    (_LAMBDA * plain + (1 - _LAMBDA) * fused).backward()


def works(batch: Batch) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""
    single, classes = batch.single(), batch.classes()
    return {
        "clm": lambda: clm(batch),
        "ours": lambda: ours(batch, single),
        "classes": lambda: ours(batch, classes),
        "ours_clm": lambda: ours(batch, None),
        "torch": lambda: torchs(batch),
        "dense": lambda: dense(batch, single),
    }


def times(batch: Batch, rounds: int) -> dict[str, float]:
    """Ratios of seconds."""
    todo = works(batch)
    rows: list[dict[str, float]] = []
    for n in range(rounds + 1):
        row = {}
        for name, work in todo.items():
            if name == "dense" and n not in (0, 1):
                row[name] = rows[-1][name]  # a second of Python a batch; once is enough
                continue
            began = time.perf_counter()
            work()
            row[name] = time.perf_counter() - began
        rows.append(row)

    def ratio(ours_: str, reference: str) -> float:
        return statistics.median(row[ours_] / row[reference] for row in rows[1:])

    return {
        "time_over_clm": ratio("ours", "clm"),
        "classes_over_clm": ratio("classes", "clm"),
        "clm_over_clm": ratio("ours_clm", "clm"),
        "time_over_torch": ratio("ours_clm", "torch"),
        "time_over_dense": rows[1]["ours"] / rows[1]["dense"],
        "clm_seconds": statistics.median(row["clm"] for row in rows[1:]),
    }


def peak_bytes(batch: Batch, name: str) -> float:
    """Peak above inputs, weights and their gradients, of this process."""
    work = works(batch)[name]
    small = Batch(8, 64, batch.hidden.shape[1], batch.tokenizers)
    clm(small)
    ours(small, None)
    hidden, weight = batch.leaves()
    return float(peak_above(work) - hidden.nbytes - weight.nbytes)


def memory(arguments: argparse.Namespace, vocabulary: int) -> dict[str, float]:
    """Ratios of peaks."""
    found = {}
    for name in ("clm", "ours", "classes", "torch", "dense"):
        command = [sys.executable, __file__, "--json", f"--peak={name}", f"--size={arguments.size}"]
        command += [f"--positions={arguments.positions}", f"--vocabulary={vocabulary}"]
        command += [f"--tokenizers={arguments.tokenizers}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = float(json.loads(done.stdout)["peak"])
    return {
        "memory_over_clm": found["ours"] / found["clm"],
        "classes_memory_over_clm": found["classes"] / found["clm"],
        "memory_over_dense": found["ours"] / found["dense"],
        "peak_mb": found["ours"] / 2**20,
    }


def error(batch: Batch, outcomes: Outcomes) -> float:
    """Against the textbook in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        hidden = batch.hidden.detach().to(dtype).requires_grad_()
        weight = batch.weight.detach().to(dtype).requires_grad_()
        if dtype == torch.float32:
            total = objective(hidden, Head(weight), batch.labels, outcomes, _LAMBDA).total
        else:
            logits = hidden @ weight.t()
            total = objective_textbook(logits, batch.labels, outcomes, _LAMBDA)
        total.backward()
        found.append((hidden.grad, weight.grad))
    return max(
        float((mine.double() - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(*found, strict=True)
        if mine is not None and theirs is not None
    )


def _batch(arguments: argparse.Namespace, vocabulary: int) -> Batch:
    torch.manual_seed(0)
    return Batch(arguments.positions, vocabulary, arguments.size, arguments.tokenizers)


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    add_tokenizers(parser)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--positions", type=int, default=0)
    parser.add_argument("--size", type=int, default=0, help="of hidden states")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.positions = arguments.positions or (1024 if arguments.quick else 2048)
    arguments.size = arguments.size or (256 if arguments.quick else 2048)
    given = arguments.vocabulary
    sizes = [given] if given else [_VOCABULARY] if arguments.quick else [_VOCABULARY, _LARGE]
    if arguments.peak:
        show({"peak": peak_bytes(_batch(arguments, *sizes), arguments.peak)}, arguments.json)
        return
    figures: dict[str, float] = {}
    for size in sizes:
        rounds = 2 if arguments.quick else 3 if size >= _LARGE else 11
        found = times(_batch(arguments, size), arguments.rounds or rounds)
        found |= memory(arguments, size)
        figures |= {f"large_{key}" if figures else key: value for key, value in found.items()}
    small = Batch(24, 3000, 64, arguments.tokenizers)
    figures["error"] = max(error(small, small.single()), error(small, small.classes()))
    show(figures, arguments.json, ",.7g")


if __name__ == "__main__":
    main()
