"""The explorer on a run of many blocks: opening it, a block, a position, the map, a search.

    python benchmarks/view.py [--blocks N]

A small run of the zoo is made over this project's own files (two sources, no training), then its
blocks are written again and again under new numbers until there are 100,000 (--quick: 2,000). What
is timed is what a browser waits for, over HTTP from the same machine, tokenizers included and
models left out:

    open_seconds                 from nothing to the overview, with who won where still counted
    first_block_seconds          the first block, for which tokenizers are read and vocabularies
                                 mapped; the cache of maps is filled
    block_seconds                another block, the median of 20, anywhere in the run
    position_seconds             another position of a block, the median of 20
    worst_position_seconds       the slowest of them
    search_seconds               a text that only the last block could have
    map_seconds                  until wins are counted, in the background
    open_over_small              open_seconds over those of the run before it was made larger
    position_over_inspect        position_seconds over a call of `Run.block` on a run just opened,
                                 which is what `fusellm inspect` does
"""

import random
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from figures import command_line, show
from fusellm.arrays.ragged import Ragged
from fusellm.config import Recipe
from fusellm.recipe_file import open_recipe
from fusellm.run import Run
from fusellm.store.manifest import MANIFEST, read_manifest
from fusellm.store.tables import Columns, encode_table
from fusellm.view.opened import OpenedRun
from fusellm.view.server import Explorer

_BLOCKS, _QUICK_BLOCKS, _TIMES = 100_000, 2_000, 20
_ROOT = Path(__file__).resolve().parents[1]
_STAGES = ("corpus", "externalize/target", "externalize/python", "externalize/cpp", "fuse")
_NOWHERE = "a text that nobody wrote \u2603"


def main() -> None:
    """Make the run, make it large, and look at it."""
    parser = command_line(__doc__)
    parser.add_argument("--blocks", type=int, metavar="N", help="of the large run")
    options = parser.parse_args()
    blocks = options.blocks or (_QUICK_BLOCKS if options.quick else _BLOCKS)
    with tempfile.TemporaryDirectory() as folder:
        small = make_run(Path(folder) / "small", 6_000 if options.quick else 60_000)
        with served(small) as (address, seconds):
            small_open = seconds
            get(f"{address}block-0.html", wait=True)  # the cache of vocabulary maps is filled
        large = Path(folder) / "large"
        shutil.copytree(small, large)
        for stage in _STAGES:
            enlarge(large / stage, blocks)
        figures = look_at(large, blocks)
        figures["open_over_small"] = figures["open_seconds"] / small_open
        started = time.perf_counter()
        Run(large).block(blocks // 2, 3)
        inspected = time.perf_counter() - started
        figures["position_over_inspect"] = figures["position_seconds"] / inspected
    show(figures, options.json)


def make_run(folder: Path, train_bytes: int) -> Path:
    """A fused run of the zoo, of short blocks."""
    recipe = Recipe.model_validate(
        {
            "name": "many-blocks",
            "target": "zoo/prose",
            "sources": [
                {"name": "python", "model": "zoo/python"},
                {"name": "cpp", "model": "zoo/cpp"},
            ],
            "corpus": {
                "documents": [
                    {"files": str(_ROOT / "src/fusellm/*/*.py"), "domain": "python"},
                    {"files": str(_ROOT / "docs/*.md"), "domain": "prose"},
                ],
                "block_bytes": 128,
                "train_bytes": train_bytes,
                "validation_bytes": 2_000,
                "held_out_bytes": 2_000,
            },
            "externalize": {"scheme": "sampled", "draws": 8},
        }
    )
    run = Run(recipe, folder)
    run.execute("corpus", "externalize", "fuse")
    return folder


def enlarge(folder: Path, blocks: int) -> None:
    """Write a stage's training blocks again and again, until there are so many."""
    manifest = read_manifest(folder / MANIFEST)
    names = sorted(name for name in manifest.shards if name.startswith("train-"))
    tables = [pyarrow.ipc.open_file(str(folder / name)).read_all() for name in names]
    whole = pa.concat_tables(tables).combine_chunks()
    for name in names:
        (folder / name).unlink()
        entry = manifest.shards.pop(name)
    for n, first in enumerate(range(0, blocks, whole.num_rows)):
        part = whole.slice(0, min(whole.num_rows, blocks - first))
        shard = encode_table(columns_of(part, first), whole.schema)
        name = f"train-{n:05}.arrow"
        (folder / name).write_bytes(shard.data)
        numbers = {"blocks": shard.blocks, "numbers": [first, first + shard.blocks]}
        manifest.shards[name] = {
            "sha256": entry["sha256"],  # of all of a file; looked at by `store verify` alone
            "bytes": len(shard.data),
            "segments": [list(segment) for segment in shard.segments],
            "counts": entry["counts"] | numbers,
        }
    (folder / MANIFEST).write_bytes(manifest.to_bytes())


def columns_of(table: pa.Table, first: int) -> Columns:
    """The columns of blocks that are numbered from `first` on."""
    columns: dict[str, np.ndarray | Ragged] = {}
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if pa.types.is_list(field.type):
            offsets = column.offsets.to_numpy().astype(np.int64)
            values = column.values.to_numpy(zero_copy_only=False)
            columns[field.name] = Ragged(offsets - offsets[0], values[offsets[0] : offsets[-1]])
        else:
            columns[field.name] = column.to_numpy(zero_copy_only=False)
    columns["block"] = np.arange(first, first + table.num_rows)
    return columns


@contextmanager
def served(run: Path) -> Iterator[tuple[str, float]]:
    """(address, seconds until the overview was there) of a run that is looked at."""
    started = time.perf_counter()
    opened = OpenedRun(open_recipe(run), run, asks_models=False)
    with Explorer(opened) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        get(server.address)
        yield server.address, time.perf_counter() - started
        server.shutdown()


def get(address: str, wait: bool = False) -> str:
    """A page; `wait` until it is more than one that waits."""
    while True:
        with urllib.request.urlopen(address) as answer:
            text: str = answer.read().decode()
        if not wait or "data-waits" not in text:
            return text


def timed(address: str, wait: bool = False) -> float:
    """Seconds that a page takes."""
    started = time.perf_counter()
    get(address, wait)
    return time.perf_counter() - started


def look_at(run: Path, blocks: int) -> dict[str, float]:
    """What a browser waits for."""
    chance, figures = random.Random(0), {"blocks": float(blocks)}
    with served(run) as (address, seconds):
        figures["open_seconds"] = seconds
        started = time.perf_counter()
        get(f"{address}index.html", wait=True)
        figures["map_seconds"] = seconds + time.perf_counter() - started
        figures["first_block_seconds"] = timed(f"{address}block-0.html", wait=True)
        numbers = [chance.randrange(blocks) for _ in range(_TIMES)]
        pages = [timed(f"{address}block-{n}.html") for n in numbers]
        figures["block_seconds"] = statistics.median(pages)
        positions = [
            timed(f"{address}position.json?block={numbers[-1]}&position={n}") for n in range(_TIMES)
        ]
        figures["position_seconds"] = statistics.median(positions)
        figures["worst_position_seconds"] = max(positions)
        sought = quote(_NOWHERE)
        figures["search_seconds"] = timed(f"{address}index.html?find={sought}")
    return figures


if __name__ == "__main__":
    main()
