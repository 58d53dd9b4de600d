"""How fast distributions are read: over the model's own forward, and over the authors' loop.

    python benchmarks/externalize.py [--quick] [--json] [--recipe FILE --set KEY=VALUE]

Ours is what the stage does with a loaded model, from a finished corpus to shards on disk: it
tokenizes, runs the model, selects, encodes, writes and syncs. All read the same blocks of the
built-in corpus: documents of its three domains, cut at 2,048 bytes, most of them shorter. With
--quick they are files of Python's standard library.

    over_forward     speed of ours over the bare forward `model(ids, mask)`, logits and all, on the
                     same batches; tokenized beforehand; least of the models
    over_forward_float32
                     the same where the reference's logits are float32 too, as ours are: the
                     model's body, and its head's product in float32; only of half-precision models
    over_textbook    speed of ours over the authors' loop: blocks padded to the model's context,
                     whole logits in half precision to the host, cross-entropy and top 10 of these;
                     least of the models
    padding          share of padded positions in our batches; most of the models
    memory_growth    peak memory of a process that reads 50 shards over that of one that reads 1

With --recipe the sources of another recipe are read, in its precision, over a little text; the
authors' loop and the growth of memory are left out.

Speeds are in real tokens per second. Rounds are interleaved, and the median of their ratios is
taken. The stage's settings of the C library's allocator hold for ours alone.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from figures import command_line, peak_bytes, show
from fusellm.config import Recipe
from fusellm.models.heads import head_of, hidden_states
from fusellm.models.load import default_device, load_model
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.reading.allocator import give_back, keep_flat
from fusellm.reading.background import Background
from fusellm.reading.batches import pad, plan_batches
from fusellm.reading.engine import ReadShard
from fusellm.reading.local_engine import read_shards
from fusellm.reading.worker import Worker
from fusellm.recipe_file import load_recipe
from fusellm.store.blocks import Block, open_corpus, read_shard
from fusellm.store.identity import Identity
from fusellm.store.tables import shard_names, write_encoded
from fusellm.store.writer import StageWriter

_DEMO = Path(__file__).parent.parent / "recipes" / "demo-full.yaml"
_TEXT = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
_LITTLE = f"corpus.documents=[{{files: '{_TEXT}', domain: python}}]"
_TOP = 10
_AUTHORS_BATCH = 4
_TEXTBOOK_ROUNDS = 3
_MEMORY_BYTES = 2_000_000


def _read(
    worker: Worker,
    names: list[str],
    blocks_of: Callable[[str], list[Block]],
    folder: StageWriter,
) -> None:
    """Read shards and write them, as the stage does."""

    def write(shard: ReadShard) -> None:
        done = shard.encode()
        write_encoded(folder, shard.name, done.shard, done.counts)
        give_back()

    with Background("fusellm-write") as writing:
        for event in read_shards(worker, names, blocks_of):
            if isinstance(event, ReadShard):
                writing.submit(partial(write, event))


def corpus(
    run: Path, train_bytes: int, shard_blocks: int, changes: list[str], recipe_file: Path = _DEMO
) -> Pipeline:
    """A run with its corpus made, here or before."""
    recipe = load_recipe(
        recipe_file,
        [
            f"corpus.train_bytes={train_bytes}",
            "corpus.block_bytes=2048",
            f"corpus.shard_blocks={shard_blocks}",
            *changes,
        ],
    )
    pipeline = Pipeline(recipe, run, Silent())
    pipeline.execute(["corpus"])
    return pipeline


class Contest:
    """One model, and the same blocks read in three ways."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        """Load it."""
        self.recipe: Recipe = pipeline.recipe
        reader = pipeline.readers[name]
        self.device = default_device()
        self.worker = Worker(self.recipe, reader.located, reader.encoder, self.device)
        self.model = load_model(reader.located, self.device)
        weight = head_of(self.model).weight.detach()
        self.is_half = weight.dtype != torch.float32
        self.float32_weight = weight.float()
        self.context = int(reader.located.context_tokens or 2048)
        folder = open_corpus(pipeline.run)
        self.blocks: dict[str, list[Block]] = {
            shard: read_shard(folder, shard) for shard in shard_names(folder, "train-")
        }
        self.prepared = {shard: self.worker.prepare(b) for shard, b in self.blocks.items()}
        self.ids = {
            shard: [block.ids for block in prepared.encoded if block.ends is not None]
            for shard, prepared in self.prepared.items()
        }
        self.tokens = sum(len(row) for rows in self.ids.values() for row in rows)
        budget = self.recipe.externalize.batch_tokens
        budget = budget or (16_384 if self.device.type == "cuda" else 2048)
        self.plan = {
            shard: plan_batches([len(row) for row in rows], budget)
            for shard, rows in self.ids.items()
        }

    def padding(self) -> float:
        """Share of padded positions in our batches."""
        positions = sum(
            len(batch) * max(len(self.ids[shard][n]) for n in batch)
            for shard, plan in self.plan.items()
            for batch in plan
        )
        return 1 - self.tokens / positions

    def ours(self) -> None:
        """The stage's work."""
        with (
            tempfile.TemporaryDirectory() as place,
            StageWriter.open(Path(place), Identity("externalize", {}, {})) as folder,
        ):
            _read(self.worker, list(self.blocks), self.blocks.__getitem__, folder)
            folder.finish({})

    @torch.no_grad()
    def forward(self) -> None:
        """The model alone, on the same batches."""
        for shard, plan in self.plan.items():
            for batch in plan:
                ids, mask = pad([self.ids[shard][n] for n in batch], self.device)
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        self._wait()

    @torch.no_grad()
    def float32_forward(self) -> None:
        """The model's body, and all logits in float32 by a float32 product."""
        for shard, plan in self.plan.items():
            for batch in plan:
                ids, mask = pad([self.ids[shard][n] for n in batch], self.device)
                hidden = hidden_states(self.model, input_ids=ids, attention_mask=mask)
                hidden.float() @ self.float32_weight.t()
        self._wait()

    @torch.no_grad()
    def textbook(self) -> None:
        """The authors' loop, after their description: everything padded, everything to the host."""
        rows = [row for rows in self.ids.values() for row in rows]
        for start in range(0, len(rows), _AUTHORS_BATCH):
            batch = rows[start : start + _AUTHORS_BATCH]
            ids = torch.zeros(len(batch), self.context, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for n, row in enumerate(batch):
                ids[n, : len(row)] = torch.from_numpy(row)
                mask[n, : len(row)] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits = logits.to(torch.float16)
            labels = torch.where(mask.bool(), ids, -100)[:, 1:].reshape(-1)
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), labels, reduction="none"
            )
            on_host = logits.cpu()
            values, indices = on_host.to(self.device).topk(_TOP, dim=-1)
            [values.cpu().numpy(), indices.cpu().numpy(), losses.cpu().numpy()]
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _seconds(work: Callable[[], None], allocator: Callable[[], None]) -> float:
    allocator()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _as_found() -> None:
    """Set glibc's allocator to what it comes to by itself where large arrays are freed."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, DEFAULT_MMAP_THRESHOLD_MAX
    libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, twice that


def _ratios(
    reference: Callable[[], None], ours: Callable[[], None], rounds: int
) -> list[tuple[float, float]]:
    """(reference's, ours) seconds of each round; which comes first alternates."""
    jobs = [(reference, _as_found), (ours, keep_flat)]
    found = []
    for n in range(rounds):
        times = {which: _seconds(*jobs[which]) for which in ((0, 1) if n % 2 else (1, 0))}
        found.append((times[0], times[1]))
    return found


def measure(
    name: str, train_bytes: int, rounds: int, changes: list[str], recipe_file: Path
) -> dict[str, float]:
    """Figures of one model."""
    with tempfile.TemporaryDirectory() as place:
        run = corpus(Path(place), train_bytes, 64, changes, recipe_file)
        contest = Contest(run, name)
        contest.forward()
        contest.ours()
        forward = _ratios(contest.forward, contest.ours, rounds)
        figures = {
            "tokens_per_second": contest.tokens / statistics.median(ours for _, ours in forward),
            "over_forward": statistics.median(theirs / ours for theirs, ours in forward),
            "padding": contest.padding(),
            "mean_tokens": float(np.mean([len(r) for rows in contest.ids.values() for r in rows])),
        }
        if contest.is_half:
            figures["over_forward_float32"] = statistics.median(
                theirs / ours
                for theirs, ours in _ratios(contest.float32_forward, contest.ours, rounds)
            )
        if recipe_file == _DEMO:
            figures["over_textbook"] = statistics.median(
                theirs / ours
                for theirs, ours in _ratios(
                    contest.textbook, contest.ours, min(rounds, _TEXTBOOK_ROUNDS)
                )
            )
    return figures


def memory(run: Path, shards: int, changes: list[str]) -> dict[str, float]:
    """Peak memory of this process, which reads the first so many shards of a finished corpus."""
    pipeline = corpus(run, _MEMORY_BYTES, 8, [_LITTLE, *changes])
    folder, reader = open_corpus(run), pipeline.readers["python"]
    worker = Worker(pipeline.recipe, reader.located, reader.encoder, default_device())
    names = shard_names(folder, "train-")[:shards]
    with (
        tempfile.TemporaryDirectory() as place,
        StageWriter.open(Path(place), Identity("externalize", {}, {})) as out,
    ):
        before = peak_bytes()
        _read(worker, names, lambda shard: read_shard(folder, shard), out)
        after = peak_bytes()
    return {"shards": len(names), "before_mb": before / 2**20, "peak_mb": after / 2**20}


def _child(run: Path, shards: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--json", f"--run={run}", f"--shards={shards}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--set", action="append", default=[], help="as in fusellm")
    parser.add_argument("--recipe", type=Path, default=_DEMO, help="whose sources are read")
    parser.add_argument("--model", action="append", help="name of a source; all by default")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shards:
        figures = memory(arguments.run, arguments.shards, arguments.set)
    else:
        is_demo = arguments.recipe == _DEMO
        names = arguments.model or (("python",) if arguments.quick and is_demo else ())
        names = names or [s.name for s in load_recipe(arguments.recipe, arguments.set).sources]
        size, rounds = (40_000, 3) if arguments.quick else (300_000, 8)
        if not is_demo:
            size, rounds = (4_000, 1) if arguments.quick else (8_000, 3)
        little = arguments.quick or not is_demo
        changes = [_LITTLE, *arguments.set] if little else arguments.set
        found = {name: measure(name, size, rounds, changes, arguments.recipe) for name in names}
        worst = {"over_forward": min, "over_forward_float32": min, "over_textbook": min}
        figures = {
            key: take(row[key] for row in found.values() if key in row)
            for key, take in (worst | {"padding": max}).items()
            if any(key in row for row in found.values())
        } | {f"{name}_{key}": value for name, row in found.items() for key, value in row.items()}
        if not arguments.quick and is_demo:
            with tempfile.TemporaryDirectory() as place:
                corpus(Path(place), _MEMORY_BYTES, 8, [_LITTLE, *arguments.set])
                one, many = _child(Path(place), 1), _child(Path(place), 50)
            figures |= {
                "memory_growth": many["peak_mb"] / one["peak_mb"],
                "memory_shards": many["shards"],
                "memory_peak_mb": many["peak_mb"],
                "memory_before_mb": many["before_mb"],
            }
    show(figures, arguments.json)


if __name__ == "__main__":
    main()
