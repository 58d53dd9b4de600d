"""How fast the fuse stage is, and what bounds it.

    python benchmarks/fuse.py [--quick] [--json] [--profile]

The stage as a run calls it (read, align, carry, fuse, write) on a made store: the zoo's three
tokenizers over Python's standard library, two further sources, 10 kept a position with their tails
(random masses on the true next id and on such as follow the same one elsewhere). No model is run.

    tokens_per_second_per_core   the target's tokens over the stage's CPU seconds
    memory_growth                peak memory of 4 times the corpus over that of it, above the start
    share_…                      of the CPU seconds: read, align, heal, carry, compare, write; and
                                 check, which is a part of read: that values are what they must be
"""

import cProfile
import itertools
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

import numpy as np

from figures import command_line, peak_bytes, show
from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.cli.console import SafeConsole, Terminal
from fusellm.pipeline import Pipeline
from fusellm.reading.worker import columns_of_tokens
from fusellm.recipe_file import load_recipe
from fusellm.stages.fuse import FuseStage
from fusellm.store.blocks import open_corpus, read_shard
from fusellm.store.externalized import TARGET, externalized_folder, kept_columns, source_schema
from fusellm.store.facts import About
from fusellm.store.identity import Identity
from fusellm.store.quantized import ERROR_NATS, STEP_NATS
from fusellm.store.tables import shard_names, write_table
from fusellm.store.writer import StageWriter
from fusellm.tokens.encode import Encoded

_DEMO = Path(__file__).parent.parent / "recipes" / "demo-full.yaml"
_TEXT = Path(sysconfig.get_paths()["stdlib"]) / "*.py"
_KEPT = 10
# Functions of fusellm, none of which calls another: their times, with all they call, are added up.
_PARTS = {
    "read": (
        "store.tables.Shard.batches",
        "store.externalized.tokens_of",
        "store.externalized.kept_of",
    ),
    "check": ("store.tables.Shard._check", "store.externalized.require_text"),
    "align": ("alignment.strategies.boundary_aligner.<locals>.align",),
    "heal": ("fusion.healing.heal", "fusion.healing.where_cut"),
    "carry": ("fusion.fuse._gather", "fusion.fuse._counts_of"),
    "compare": ("fusion.fuse.compare",),
    "write": ("store.tables.write_table", "stages.fuse._columns"),
}


def _pipeline(run: Path, train_bytes: int) -> Pipeline:
    changes = [
        f"corpus.documents=[{{files: '{_TEXT}', domain: python}}]",
        f"corpus.train_bytes={train_bytes}",
        "corpus.validation_bytes=4000",
        "corpus.held_out_bytes=4000",
        "externalize.scheme=top",
        f"externalize.k={_KEPT}",
        "sources=[{name: python, model: zoo/python}, {name: cpp, model: zoo/cpp}]",
    ]
    return Pipeline(load_recipe(_DEMO, changes), run, Terminal(SafeConsole(stderr=True)))


def _made(pipeline: Pipeline, name: str) -> None:
    """A store of random distributions in place of a model's."""
    encoder, corpus = pipeline.readers[name].encoder, open_corpus(pipeline.run)
    chance = np.random.default_rng(0)
    schema = source_schema(len(encoder.vocabulary), "top", _KEPT)
    identity = Identity(f"externalize/{name}", {}, {})
    with StageWriter.open(externalized_folder(pipeline.run, name), identity) as out:
        out.describe(_about(len(encoder.vocabulary)))
        for shard in shard_names(corpus, "train-"):
            blocks = read_shard(corpus, shard)
            encoded = encoder.encode([b.text for b in blocks], [b.last for b in blocks])
            tokens = columns_of_tokens(blocks, encoded)
            lengths = np.array([max(len(block.ids) - 1, 0) for block in encoded])
            positions = offsets_of(lengths)
            count = int(positions[-1])
            p = np.sort(chance.dirichlet(np.full(_KEPT + 1, 0.3), count), axis=1)[:, ::-1]
            ids = _likely(encoded)
            log_p = np.log(p + 1e-6)
            kept = Kept(
                np.arange(count + 1) * _KEPT,
                ids.ravel(),
                log_p[:, :_KEPT].ravel(),
                np.zeros(0, dtype=np.uint8),
                p[:, _KEPT],
                log_p[:, 0],
            )
            write_table(out, shard, tokens | kept_columns(kept, positions, False), schema)
        out.finish({})


def _likely(encoded: Sequence[Encoded]) -> np.ndarray:
    """[positions, kept] the true next token, then such as follow the same token elsewhere.

    Filled with the commonest of all.
    """
    before = np.concatenate([block.ids[:-1] for block in encoded])
    after = np.concatenate([block.ids[1:] for block in encoded])
    common = [int(id_) for id_, _ in Counter(after.tolist()).most_common(2 * _KEPT)]
    following: dict[int, dict[int, None]] = defaultdict(dict)
    for token, then in zip(before.tolist(), after.tolist(), strict=True):
        following[token][then] = None
    rows = []
    for token, then in zip(before.tolist(), after.tolist(), strict=True):
        likely = itertools.islice(following[token], 2 * _KEPT)
        rows.append(list(dict.fromkeys([then, *likely, *common]))[:_KEPT])
    return np.array(rows)


def _about(vocabulary: int) -> About:
    return {
        "model": "made",
        "revision": None,
        "architecture": "Made",
        "commit": None,
        "weights_sha256": "",
        "dtype": "float32",
        "vocabulary": vocabulary,
        "externalize": {"scheme": "top", "k": _KEPT, "mass": None, "draws": 1},
        "step_nats": STEP_NATS,
        "error_nats": ERROR_NATS,
        "device": "cpu",
    }


def _fuse(pipeline: Pipeline) -> None:
    stage = next(stage for stage in pipeline.stages if isinstance(stage, FuseStage))
    with StageWriter.open(stage.folder, Identity("fuse", {}, {})) as folder:
        stage.fill(folder)


def measure(run: Path, train_bytes: int, profile: bool) -> dict[str, float]:
    """Figures of one run of the stage; peak memory is this process'."""
    pipeline = _pipeline(run, train_bytes)
    pipeline.execute(["corpus", f"externalize/{TARGET}"])
    for source in pipeline.recipe.sources:
        _made(pipeline, source.name)
    target = StageWriter(externalized_folder(run, TARGET))
    before = peak_bytes()
    _fuse_warm(run)
    profiler = cProfile.Profile()
    began = time.process_time()
    if profile:
        profiler.runcall(_fuse, pipeline)
    else:
        _fuse(pipeline)
    seconds = time.process_time() - began
    figures = {
        "tokens": float(target.counts["tokens"]),
        "seconds": seconds,
        "tokens_per_second_per_core": target.counts["tokens"] / seconds,
        "bytes_per_token": _size(run / "fuse") / target.counts["tokens"],
        "peak_mb": peak_bytes() / 2**20,
        "start_mb": before / 2**20,
    }
    return figures | (_shares(profiler) if profile else {})


def _fuse_warm(run: Path) -> None:
    """Compile and map first: neither grows with the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        small = _pipeline(Path(folder), 4000)
        small.execute(["corpus", f"externalize/{TARGET}"])
        for source in small.recipe.sources:
            _made(small, source.name)
        _fuse(small)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("train-*.arrow"))


def _shares(profiler: cProfile.Profile) -> dict[str, float]:
    """Share of each part in the profiled time.

    Raises:
        ValueError: a function of a part was not called, as when it has been renamed.
    """
    seconds: dict[str, float] = defaultdict(float)
    whole = 0.0
    for entry in profiler.getstats():
        whole += entry.inlinetime
        if isinstance(entry.code, CodeType):
            module = Path(entry.code.co_filename).with_suffix("").parts[-2:]
            seconds[".".join((*module, entry.code.co_qualname))] += entry.totaltime
    for part, names in _PARTS.items():
        missing = [name for name in names if name not in seconds]
        if missing:
            raise ValueError(f"part {part!r} of _PARTS: {', '.join(missing)} was never called")
    return {
        f"share_{part}": sum(seconds[name] for name in names) / whole
        for part, names in _PARTS.items()
    }


def _child(train_bytes: int, *flags: str) -> dict[str, float]:
    """Measured in a process of its own, so that peaks do not mix."""
    command = [sys.executable, __file__, "--bytes", str(train_bytes), "--json", *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--bytes", type=int, help="measure one corpus of so many bytes")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.bytes:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), arguments.bytes, arguments.profile)
    else:
        size = 300_000 if arguments.quick else 1_500_000
        small, large = _child(size), _child(4 * size)
        profiled = _child(size, "--profile")
        figures = {
            "tokens_per_second_per_core": large["tokens_per_second_per_core"],
            "memory_growth": large["peak_mb"] / small["peak_mb"],
            "peak_mb": large["peak_mb"],
            "bytes_per_token": large["bytes_per_token"],
        } | {name: value for name, value in profiled.items() if name.startswith("share_")}
    show(figures, arguments.json)


if __name__ == "__main__":
    main()
