"""Faults at random instants of externalize: each ends in a clear message, loses nothing that was
finished, and another run ends with the store of a run that nothing disturbed, byte for byte.

`pytest -m faults -s tests/test_faults.py` does all of them and says how many they were; by default
a few of each are tried. Every case has a seed of its own, and a failure says which.
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from faults import BROKEN, FULL, QUOTA, Child, Ended, Fault, Server
from fusellm.errors import IdentityError, StoreError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.reading import worker
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import Block, open_corpus, read_part
from fusellm.store.externalized import layout_of
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names

SOURCE = "second"
PART = f"externalize/{SOURCE}"
CHANGES = ("corpus.shard_blocks=12", "externalize.batch_tokens=400")
TOP = ("externalize.scheme=top", "externalize.k=10", "externalize.mass=null")
HISTORY = ("seconds", "software", "checksum")
Store = dict[str, Any]


def some(few: int, many: int) -> pytest.MarkDecorator:
    """So many cases by default, and so many under the marker `faults`."""
    every = pytest.param(many, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("cases", [few, every])


def store_of(folder: Path) -> Store:
    """All files of a folder, the manifest without its history."""
    found: Store = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(found["manifest.json"])
    found["manifest.json"] = {k: v for k, v in manifest.items() if k not in HISTORY}
    found["order"] = list(manifest["shards"])
    return found


def differences(mine: Store, theirs: Store) -> list[str]:
    """Names of what differs."""
    return sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished shard."""
    if not (folder / "manifest.json").exists():
        return {}
    found = {}
    for name in StageFolder(folder).shards:
        stat = (folder / name).stat()
        found[name] = (stat.st_ino, stat.st_mtime_ns)
    return found


@dataclass
class Ground:
    """A server, a world with a corpus, and what a run without disturbance makes of it."""

    server: Server
    world: Path
    corpus: Path
    done: Path
    whole: Store
    seconds: float

    def fresh(self, run: Path) -> Path:
        """A run with its corpus and nothing else."""
        run.mkdir(parents=True)
        shutil.copytree(self.corpus, run / "corpus")
        return run

    def copy(self, run: Path) -> Path:
        """A run that nothing disturbed."""
        shutil.copytree(self.done / "externalize", self.fresh(run) / "externalize")
        return run

    def start(self, run: Path, *disturbed: Fault, changes: tuple[str, ...] = ()) -> Child:
        """Begin to read the source, or go on with it."""
        return self.server.start("stages", **self._arguments(run, disturbed, changes))

    def do(self, run: Path, *disturbed: Fault, changes: tuple[str, ...] = ()) -> Ended:
        """Read the source, or go on with it."""
        return self.start(run, *disturbed, changes=changes).wait()

    def _arguments(
        self, run: Path, disturbed: tuple[Fault, ...], changes: tuple[str, ...]
    ) -> dict[str, Any]:
        return {
            "world": self.world,
            "run": run,
            "changes": [*CHANGES, *changes],
            "parts": [PART],
            "faults": disturbed,
        }

    def end(self, run: Path, case: str, kept: dict[str, tuple[int, int]]) -> Ended:
        """Finish a run without disturbance, and compare it with one that never had any.

        Args:
            kept: shards that were finished before.
        """
        ended = self.do(run)
        assert ended.well, f"{case}: {ended}"
        assert (found := differences(store_of(run / PART), self.whole)) == [], f"{case}: {found}"
        now = finished_shards(run / PART)
        again = [name for name in kept if now[name] != kept[name]]
        assert again == [], f"{case}: {again} were finished and written again"
        assert not [*run.glob("*.writing"), *(run / PART).glob("*.writing")], case
        return ended

    def partial(self, run: Path, shards: int) -> Path:
        """A run that has so many shards finished."""
        ended = self.do(self.fresh(run), ("writing_fails", shards))
        assert ended.error == "UnexpectedError", ended
        assert len(finished_shards(run / PART)) == shards
        return run

    @property
    def tokens(self) -> int:
        """Of the source's tokenizer."""
        return int(self.whole["manifest.json"]["about"]["vocabulary"])

    def blocks(self) -> list[Block]:
        """All blocks that are read."""
        return read_part(StageFolder(self.corpus), "train")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: on a disk most of a small run is waiting for it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="fusellm-faults-") as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(root: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A test's own folder there."""
    folder = root / re.sub(r"\W+", "-", request.node.name)[:60]
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ground(world: Path, cache: Path, root: Path) -> Iterator[Ground]:
    """The tiny world in 12 shards or more, read without disturbance."""
    server = Server(root / "children")
    made = Ground(server, world, root / "corpus", root / "whole-0", {}, 0.0)
    run = root / "run"
    arguments = made._arguments(run, (), ())
    assert (ended := server.do("stages", **arguments | {"parts": ["corpus"]})).well, ended
    (run / "corpus").rename(made.corpus)
    seconds = []
    for n in range(3):
        ended = made.do(made.fresh(root / f"whole-{n}"))
        assert ended.well, ended
        seconds.append(ended.seconds)
    made.whole, made.seconds = store_of(made.done / PART), statistics.median(seconds)
    assert differences(store_of(root / "whole-1" / PART), made.whole) == []
    assert len(made.whole["order"]) >= 12
    yield made
    server.close()


# --- killed ---


@some(6, 200)
def test_killed_at_random_instants_it_ends_with_the_same_store(
    ground: Ground, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, cases: int
) -> None:
    """SIGKILL, once to three times in a row; every third run on a disk.

    Half of the instants are uniform over a run's seconds, half over its shards. A run that was done
    before it was killed does not count.
    """
    places = [tmp_path, tmp_path, tmp_path_factory.mktemp("disk")]
    where: Counter[str] = Counter()
    identical = case = 0
    while identical < cases:
        rng = random.Random(f"kill {case}")
        run, kept, at, killed = ground.fresh(places[case % 3] / str(case)), {}, [], 0
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            child = ground.start(run)
            at.append(_wait_for_an_instant(ground, run, rng))
            child.kill()
            status = child.wait().status
            now = finished_shards(run / PART)
            what = f"case {case}, killed {at}, {len(now)} shards were finished"
            assert all(now[name] == kept[name] for name in kept), what
            kept = now
            if (run / PART / "manifest.json").exists() and StageFolder(run / PART).complete:
                break
            assert status == -signal.SIGKILL, what
            where[f"{len(now):02}"] += 1
            killed += 1
        ground.end(run, what, kept)
        shutil.rmtree(run)
        identical += killed > 0
        case += 1
        assert case < 3 * cases + 10, "most runs were done before they were killed"
    print(f"\n{sum(where.values())} kills, {identical} of {cases} stores identical")
    print(f"shards finished at the kill, and how often: {dict(sorted(where.items()))}")
    if cases >= 100:
        assert len(where) > len(ground.whole["order"]), "at some number of shards it was not killed"


def _wait_for_an_instant(ground: Ground, run: Path, rng: random.Random) -> str:
    """Wait until a random instant of a run that just began; says which."""
    order = ground.whole["order"]
    begun, after = len(finished_shards(run / PART)), rng.random()
    if rng.random() < 0.5:
        time.sleep(after * ground.seconds)
        return f"after {after * ground.seconds:.4f} s"
    shard = rng.randint(min(begun, len(order) - 1), len(order) - 1)
    shard_seconds = after * ground.seconds / len(order)
    if shard == len(order) - 1:
        shard_seconds /= 10  # only the manifest is left
    deadline = time.monotonic() + 10
    while not (run / PART / order[shard]).exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(shard_seconds)
    return f"{shard_seconds:.4f} s after {order[shard]} was there"


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_the_real_command_killed_again_and_again(ground: Ground, tmp_path: Path) -> None:
    """Twenty kills, up to four of one run, each after that command has begun with the source."""
    kills = case = 0
    while kills < 20:
        rng = random.Random(f"real {case}")
        run, kept, at = ground.fresh(tmp_path / str(case)), {}, []
        for _ in range(4):
            child = _real(ground, run)
            begun, before = time.monotonic(), _changed(run)
            while child.poll() is None and _changed(run) == before:
                assert time.monotonic() < begun + 60
                time.sleep(0.001)
            at.append(round(rng.uniform(0.0, 0.4 * ground.seconds), 4))
            time.sleep(at[-1])
            child.kill()
            _, errors = child.communicate()
            now = finished_shards(run / PART)
            what = f"case {case}, killed {at} s after the folder was there, {len(now)} finished"
            assert all(now[name] == kept[name] for name in kept), what
            kept = now
            if StageFolder(run / PART).complete:
                break
            assert child.returncode == -signal.SIGKILL, f"{what}: {errors}"
            kills += 1
        child = _real(ground, run)
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, f"{what}: {errors}"
        ground.end(run, what, kept)
        case += 1
        assert case < 20, "most runs were done before they were killed"
    print(f"\n{kills} kills of the real command, {case} of {case} stores identical")


def _real(ground: Ground, run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fusellm", *_arguments(ground, run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _arguments(ground: Ground, run: Path) -> list[str]:
    """The command that reads one source: the target is not among the parts that are asked for."""
    settings = [word for change in CHANGES for word in ("--set", change)]
    return ["externalize", str(ground.world / "recipe.yaml"), "--out", str(run), *settings]


def _changed(run: Path) -> int:
    path = run / PART / "manifest.json"
    return path.stat().st_mtime_ns if path.exists() else 0


STOPS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@some(2, 50)
@STOPS
def test_interrupted_it_says_so_and_goes_on_later(
    ground: Ground, tmp_path: Path, number: signal.Signals, cases: int
) -> None:
    """Ctrl-C, a scheduler's signal, or that of a connection that is lost, at a random instant."""
    ended_after, case = list[float](), 0
    while len(ended_after) < cases:
        rng = random.Random(f"{number.name} {case}")
        run = ground.fresh(tmp_path / str(case))
        child = ground.server.start("command", arguments=_arguments(ground, run))
        at = round(rng.uniform(0.02, 2 * ground.seconds), 4)
        time.sleep(at)
        sent = time.monotonic()
        child.kill(number)
        ended = child.wait()
        took = time.monotonic() - sent
        kept = finished_shards(run / PART)
        what = f"case {case}, interrupted after {at} s, ended {took:.2f} s later: {ended}"
        if ended.status not in (0, -number):  # it had done all, or was no command yet or any more
            assert took < 15.0, what
            assert "Traceback" not in ended.output, what
            assert "stopped; the same command goes on from here" in ended.output, what
            assert ended.status == 128 + number, what
            ended_after.append(took)
        ground.end(run, what, kept)
        shutil.rmtree(run)
        case += 1
        assert case < 4 * cases + 10, "most runs ended before they were interrupted"
    print(f"\n{cases} interrupts, the slowest ended {max(ended_after):.2f} s later")
    assert statistics.median(ended_after) < 3.0  # one of many may wait for a busy machine


@some(2, 50)
@STOPS
def test_a_training_that_is_stopped_saves_a_checkpoint(
    ground: Ground, tmp_path: Path, number: signal.Signals, cases: int
) -> None:
    """At a random instant; the same command goes on, and ends with the same weights.

    A run that had no step behind it, or was done, counts for nothing but its end.
    """
    changes = (*CHANGES, "training.save_steps=1000", "training.clm_baseline=false")
    whole = ground.fresh(tmp_path / "whole")
    recipe = resolve_paths(load_recipe(ground.world / "recipe.yaml", changes), ground.world)
    Pipeline(recipe, whole, Silent()).execute(["corpus", "externalize", "fuse"])
    fused = tmp_path / "fused"
    shutil.copytree(whole, fused, symlinks=True)
    command = [word for change in changes for word in ("--set", change)]
    took = ground.server.do("command", arguments=["train", str(whole), *command]).seconds
    saved = case = 0
    while saved < cases:
        run = tmp_path / str(case)
        shutil.copytree(fused, run, symlinks=True)
        arguments = ["train", str(run), *command]
        child = ground.server.start("command", arguments=arguments)
        while not (run / "train" / "fused").exists():
            time.sleep(0.001)
        time.sleep(random.Random(f"{number.name} {case}").uniform(0.0, 0.8) * took)
        child.kill(number)
        ended = child.wait()
        checkpoints = run / "train" / "fused-checkpoints"
        saved += any(checkpoints.glob("checkpoint-*/saved-whole"))
        what = f"case {case}: {ended}"
        done = ended.status == 0 or ended.message == "0"  # told once it was ending by itself
        if ended.status == -number:  # or once it was no command any more
            done = StageFolder(run / "train" / "fused").complete
        assert done or ended.status == 128 + number, what
        assert done or "stopped; the same command goes on" in ended.output, what
        again = ground.server.do("command", arguments=arguments)
        assert again.status == 0, again
        mine, theirs = (
            load_file(one / "train" / "fused" / "model.safetensors") for one in (run, whole)
        )
        assert all(mine[name].equal(weight) for name, weight in theirs.items()), what
        assert not checkpoints.exists()
        shutil.rmtree(run)
        case += 1
        assert case < 4 * cases + 10, "most trainings were stopped before or after all steps"


@pytest.mark.faults
@pytest.mark.parametrize("what", ["imports", "reads"])
def test_the_real_command_interrupted(ground: Ground, tmp_path: Path, what: str) -> None:
    """Ctrl-C while it imports for seconds, and once the source's folder is there."""
    run = ground.fresh(tmp_path / "run")
    child = _real(ground, run)
    maps = Path(f"/proc/{child.pid}/maps")
    while _changed(run) == 0 if what == "reads" else "libtorch" not in maps.read_text():
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert time.monotonic() - sent < 15.0  # most of it Python's own end, which is seconds if busy
    assert child.returncode == 130
    assert "Traceback" not in errors
    assert "stopped; the same command goes on from here" in errors
    ground.end(run, f"interrupted when it {what}", finished_shards(run / PART))


# --- disks ---


@some(5, 0)
def test_whatever_write_fails_the_message_says_which(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    """Every call that writes, one after another: open, write, fsync, rename, mkdir.

    By default those of the recipe, the folder, the lock and the end, and a random few.
    """
    counted = ground.do(ground.fresh(tmp_path / "counted"), ("disk_fails", None, 0, False))
    calls = counted.seen["calls"]
    ends = [1, calls.index(f"mkdir {PART}"), calls.index(f"open {PART}/.lock"), len(calls) - 2]
    few = ends + random.Random("disk").sample(range(len(calls)), cases - 4) if cases else []
    for at in few or range(len(calls)):
        rng = random.Random(f"disk {at}")
        number = rng.choice([FULL, FULL, QUOTA, BROKEN])
        run = ground.fresh(tmp_path / str(at))
        ended = ground.do(run, ("disk_fails", at, number, stays := rng.random() < 0.5))
        what = f"call {at} ({calls[at]}) fails with {number}, later ones too: {stays}: {ended}"
        assert ended.status != 0, what
        kept = finished_shards(run / PART)
        assert ended.error == "StoreError", what
        path = run / calls[at].split(" ", 1)[1].removesuffix(".writing")
        if path.name.endswith("(deleted)"):  # has no name: the folder is tried
            path = path.parent
        assert str(path) in ended.message, what
        full = number in (FULL, QUOTA)
        assert ("the disk is full" in ended.message) is full, what
        assert full or os.strerror(number) in ended.message, what
        assert not list(run.rglob("*.writing")), what
        ground.end(run, what, kept)
        shutil.rmtree(run)
    print(f"\n{len(few) or len(calls)} of {len(calls)} calls that write failed")


@pytest.mark.parametrize(
    "options",
    [
        "size={half}",
        pytest.param("nr_inodes=40", marks=pytest.mark.faults),
        pytest.param("nr_inodes=32", marks=pytest.mark.faults),
        pytest.param("size={less}", marks=pytest.mark.faults),
        pytest.param("size={more}", marks=pytest.mark.faults),
    ],
)
def test_a_file_system_that_is_full(ground: Ground, tmp_path: Path, options: str) -> None:
    """A real one: it is full, is still full, and then has room."""
    corpus = _pages(ground.corpus.iterdir())
    store = sum(len(v) // 4096 + 1 for v in ground.whole.values() if isinstance(v, bytes)) + 2
    sizes = {"half": store // 2, "less": 2, "more": store - 2}
    options = options.format(**{k: f"{(corpus + n + 2) * 4}k" for k, n in sizes.items()})
    ended = ground.server.do(
        "small_disk",
        world=ground.world,
        run=tmp_path,
        corpus=ground.corpus,
        changes=CHANGES,
        source=SOURCE,
        options=options,
    )
    if ended.error == "NoMountsError":
        pytest.skip(f"no file system can be mounted here: {ended.message}")
    assert ended.well, ended
    errors = ended.seen["errors"]
    assert [kind for kind, _ in errors] == ["StoreError", "StoreError"], errors
    for _, message in errors:
        assert "the disk is full" in message
        assert "/disk/" in message
    for names in ended.seen["names"]:
        assert not [name for name in names if name.endswith(".writing")]
    assert len(ended.seen["kept"]) == ended.seen["before"]
    assert differences(store_of(tmp_path / PART), ground.whole) == []
    print(f"\n{options}: {ended.seen['before']} shards kept")


@some(1, 20)
@pytest.mark.timeout(3600)
def test_a_file_system_that_is_full_in_a_training(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    """Of some size between what is there and what a training takes, so that it is full at some
    instant: before the first step, in a checkpoint, or as the model is saved."""
    done = tmp_path / "done"
    arguments = ground._arguments(done, (), ()) | {"parts": ["corpus", "externalize", "fuse"]}
    assert (ended := ground.server.do("stages", **arguments)).well, ended
    there = _pages(path for path in done.rglob("*") if path.is_file()) + 12
    shutil.copytree(done, whole := tmp_path / "whole")
    assert ground.server.do(
        "stages", **ground._arguments(whole, (), ()) | {"parts": ["train/fused"]}
    )
    trained = _pages((whole / "train" / "fused").iterdir())
    expected = (whole / "train" / "fused" / "model.safetensors").read_bytes()
    full = case = 0
    where: Counter[str] = Counter()
    while full < cases:
        more = random.Random(f"training {case}").randrange(2, 6 * trained)
        run = tmp_path / str(case)
        ended = ground.server.do(
            "small_disk_of_a_training",
            world=ground.world,
            run=run,
            done=done,
            changes=CHANGES,
            options=f"size={(there + more) * 4}k",
        )
        if ended.error == "NoMountsError":
            pytest.skip(f"no file system can be mounted here: {ended.message}")
        what = f"case {case}, {more} pages more than there are: {ended}"
        assert ended.well, what
        for kind, message in ended.seen.get("errors", []):
            assert kind == "StoreError", what
            assert "the disk is full" in message, what
            assert "/disk/" in message, what
        assert (run / "train" / "fused" / "model.safetensors").read_bytes() == expected, what
        assert not list((run / "train").glob("*-checkpoints")), what
        saved = ended.seen["checkpoints"][0]
        where[saved[-1].rpartition("/")[2] if saved else "none"] += bool(ended.seen.get("errors"))
        full += bool(ended.seen.get("errors"))
        case += 1
        shutil.rmtree(run)
        assert case < 3 * cases + 10, "most disks were large enough"
    print(f"\n{full} full disks in a training; the last checkpoint then: {dict(where)}")


def test_a_finished_run_on_a_disk_that_cannot_be_written_to(ground: Ground, tmp_path: Path) -> None:
    """Every stage of it is finished, and its report is there."""
    run = tmp_path / "run"
    every = ["corpus", "externalize", "fuse", "train", "evaluate", "report"]
    arguments = ground._arguments(run, (), ()) | {"parts": every}
    assert (ended := ground.server.do("stages", **arguments)).well, ended
    before = store_of_files(run)
    named = {"world": ground.world, "run": run, "changes": CHANGES}
    ended = ground.server.do("read_only", **named, parts=every)
    if ended.error == "NoMountsError":
        pytest.skip(f"no file system can be mounted here: {ended.message}")
    assert ended.well, ended
    assert store_of_files(run) == before
    (run / "report" / "index.html").unlink()
    ended = ground.server.do("read_only", **named, parts=["report"])
    assert ended.error == "StoreError", ended
    assert f"{run / 'report' / 'index.html'} could not be written: Read-only" in ended.message


def store_of_files(run: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.*")}


def _pages(paths: Iterator[Path]) -> int:
    return sum(path.stat().st_size // 4096 + 1 for path in paths)


@pytest.mark.parametrize("size", [1500, pytest.param(100, marks=pytest.mark.faults)])
def test_a_process_that_may_not_write_so_much(ground: Ground, tmp_path: Path, size: int) -> None:
    """A limit on the size of files: with one of 100 bytes no manifest can be written."""
    run = ground.fresh(tmp_path / "run")
    ended = ground.do(run, ("largest_file", size))
    assert ended.error == "StoreError", ended
    assert "File too large" in ended.message
    assert str(run) in ended.message
    ground.end(run, f"files of at most {size} bytes", finished_shards(run / PART))


# --- the three threads ---


@some(2, 40)
def test_the_writers_error_stops_the_model(ground: Ground, tmp_path: Path, cases: int) -> None:
    further = []
    for case in range(cases):
        rng = random.Random(f"writer {case}")
        shard, seconds = rng.randrange(16), rng.choice([0.0, 0.0, 0.005, 0.05])
        run = ground.fresh(tmp_path / str(case))
        ended = ground.do(run, ("writing_fails", shard, seconds))
        what = f"case {case}, shard {shard} fails after {seconds} s: {ended}"
        assert ended.error == "UnexpectedError", what
        assert ended.message == f"no way to write train-{shard:05}.arrow", what
        further.append(ended.seen["batches"] - ended.seen["batches_then"])
        # One that the model is at, and one that may begin before the thread has ended.
        assert further[-1] <= 2, what
        kept = finished_shards(run / PART)
        assert len(kept) >= shard, what
        ground.end(run, what, kept)
        shutil.rmtree(run)
    print(f"\nbatches begun after the error: {dict(Counter(further))}")


# --- memory ---

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "",  # torch.OutOfMemoryError says it all
    None,  # MemoryError
)


@some(2, 48)
def test_out_of_memory_changes_batches_and_nothing_else(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    run = ground.fresh(tmp_path / "top")
    assert ground.do(run, changes=TOP).well
    undisturbed = {(): ground.done, TOP: run}
    longest = _longest(run)
    failed = batches = identical = 0
    for case in range(cases):
        rng = random.Random(f"memory {case}")
        scheme = rng.choice([(), TOP])
        tokens = rng.choice([400, 1500])
        most = rng.choice([longest, longest + 100, 10**9])
        chance = rng.choice([0.0, 0.2, 0.5]) if most < 10**9 else 0.4
        message = OUT_OF_MEMORY[case % len(OUT_OF_MEMORY)]
        run = ground.fresh(tmp_path / str(case))
        changes = (*scheme, f"externalize.batch_tokens={tokens}")
        ended = ground.do(run, ("memory_is_out", most, chance, case, message), changes=changes)
        what = (
            f"case {case}: {scheme}, {tokens} tokens a batch, {most} fit, chance {chance}, "
            f"{message!r}: {ended}"
        )
        assert ended.well, what
        # What did not fit once is not tried again, in no later shard.
        tried = [call for shard in _by_shard(ended.seen["calls"]) for call in shard]
        sizes = [blocks * length for blocks, length, fits in tried if not fits]
        assert all(b < a for a, b in pairwise(sizes)), (what, sizes)
        assert all(blocks * length <= most for blocks, length, fits in tried if fits)
        failed += len(sizes)
        batches += len(tried)
        _assert_close(run, undisturbed[scheme], what)
        identical += differences(store_of(run / PART), store_of(undisturbed[scheme] / PART)) == []
        shutil.rmtree(run)
    print(f"\n{failed} of {batches} batches did not fit; {identical} of {cases} stores identical")
    assert failed > cases


def _by_shard(calls: list[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for call in calls:
        if call == "shard":
            found.append([])
        else:
            found[-1].append(call)
    return found


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    folder = StageFolder(run / PART)
    for name in shard_names(folder):
        shard = Shard(folder, name, layout_of(folder))
        for n in range(len(shard)):
            yield {key: np.asarray(value) for key, value in shard.block(n).items()}


def _longest(run: Path) -> int:
    return max(len(row["ids"]) for row in _rows(run))


def _assert_close(run: Path, undisturbed: Path, what: str) -> None:
    """Equal ids, log-probabilities within two steps of the store.

    A batch of another shape rounds otherwise, so that a draw may fall on the id beside its own.
    """
    draws = other = 0
    for mine, theirs in zip(_rows(run), _rows(undisturbed), strict=True):
        for column in ("block", "read", "ids", "bytes"):
            np.testing.assert_array_equal(mine[column], theirs[column], what)
        for column in set(mine) & {"tail", "true_log_prob"}:
            apart = np.abs(mine[column].astype(np.int64) - theirs[column])
            assert apart.max(initial=0) <= 2, (column, what)
        if "counts" in mine:
            found = [np.repeat(row["kept_ids"], row["counts"]) for row in (mine, theirs)]
            other += int((found[0] != found[1]).sum())
            draws += len(found[0])
            continue
        for column in ("kept", "kept_ids"):
            np.testing.assert_array_equal(mine[column], theirs[column], what)
        assert np.abs(mine["drops"].astype(np.int64) - theirs["drops"]).max(initial=0) <= 2, what
    assert other <= 0.001 * draws, what


@pytest.mark.parametrize(
    "message", [OUT_OF_MEMORY[0], pytest.param(None, marks=pytest.mark.faults)]
)
def test_a_block_that_does_not_fit_is_named(
    ground: Ground, tmp_path: Path, message: str | None
) -> None:
    run = ground.fresh(tmp_path / "run")
    ended = ground.do(run, ("memory_is_out", 60, 0.0, 0, message))
    assert ended.error == "ModelError", ended
    blocks, tokens, _ = ended.seen["calls"][-1]
    assert blocks == 1
    assert f"one block of {tokens} tokens" in ended.message
    assert "corpus.block_bytes" in ended.message
    assert "quantization" in ended.message
    ground.end(run, "no block fits", finished_shards(run / PART))


# --- NaN and infinity ---


def _marked(ground: Ground, marker: str) -> list[Block]:
    return [block for block in ground.blocks() if marker in block.text]


def _markers(ground: Ground) -> list[str]:
    """Texts that some blocks contain, and by far not all."""
    found = [f"({n})" for n in range(100)]
    return [text for text in found if 3 <= len(_marked(ground, text)) <= 20]


@some(1, 20)
def test_blocks_with_nan_are_put_aside_and_no_other_changes(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    whole = ground.copy(tmp_path / "whole")
    markers, put_aside = _markers(ground), 0
    for case in range(cases):
        marker = markers[case % len(markers)]
        run = ground.fresh(tmp_path / str(case))
        fault = ("not_finite", ground.tokens, marker, case)
        ended = ground.do(run, fault, changes=("externalize.not_finite_share=0.2",))
        what = f"case {case}, blocks with {marker!r}: {ended}"
        assert ended.well, what
        expected = {block.number: block for block in _marked(ground, marker)}
        folder = StageFolder(run / PART)
        aside = [entry for shard in folder.shards.values() for entry in shard["counts"]["aside"]]
        assert {number for number, *_ in aside} == set(expected), what
        for number, document, reason in aside:
            assert (document, reason) == (expected[number].document, worker.NOT_FINITE), what
        assert folder.counts["not_finite"] == len(expected), what
        for mine, theirs in zip(_rows(run), _rows(whole), strict=True):
            is_aside = int(mine["block"]) in expected
            assert bool(mine["read"]) is not is_aside, what
            for column, values in mine.items():
                if not is_aside or column == "ids":
                    np.testing.assert_array_equal(values, theirs[column], what)
                elif column not in ("block", "read"):
                    assert len(values) == 0, what
        put_aside += len(expected)
        shutil.rmtree(run)
    print(f"\n{put_aside} blocks put aside in {cases} runs")


def test_too_many_blocks_with_nan_stop_it_each_time(ground: Ground, tmp_path: Path) -> None:
    marker = _markers(ground)[0]
    run = ground.fresh(tmp_path / "run")
    total = len(ground.blocks())
    for n in range(40):
        before = finished_shards(run / PART)
        ended = ground.do(run, ("not_finite", ground.tokens, marker, 0))
        assert ended.error == "NumericsError", f"run {n}: {ended}"
        folder = StageFolder(run / PART)
        aside = sorted(
            entry for shard in folder.shards.values() for entry in shard["counts"]["aside"]
        )
        assert f"source '{SOURCE}'" in ended.message
        assert f"on {len(aside)} of {total} blocks" in ended.message
        assert "externalize.not_finite_share: 0.01" in ended.message
        number, document, _ = aside[0]
        assert f"block {number}, document {document!r}" in ended.message
        assert not folder.complete
        now = finished_shards(run / PART)
        assert {name: now[name] for name in before} == before
        if len(now) == len(before):
            break
    # Nothing is left to read, or nothing is read any more: it stops all the same, without a model.
    assert "loaded" not in ended.seen
    more = ground.do(run, ("not_finite", ground.tokens, marker, 0), changes=(
        "externalize.not_finite_share=1",
    ))  # fmt: skip
    assert more.well, more
    expected = _marked(ground, marker)
    assert StageFolder(run / PART).counts["not_finite"] == len(expected)


@pytest.mark.faults
def test_fuse_treats_a_block_put_aside_as_one_that_was_not_read(
    ground: Ground, tmp_path: Path
) -> None:
    marker = _markers(ground)[0]
    found: dict[str, tuple[Store, dict[str, Any]]] = {}
    for name, fault in {
        "nan": ("not_finite", ground.tokens, marker, 0),
        "walk": ("walk_fails", ground.tokens, marker),
    }.items():
        run = ground.fresh(tmp_path / name)
        arguments = ground._arguments(run, (fault,), ("externalize.not_finite_share=0.2",))
        ended = ground.server.do("stages", **arguments | {"parts": ["externalize", "fuse"]})
        assert ended.well, ended
        store = store_of(run / "fuse")
        counts = json.loads((run / "fuse" / "counts.json").read_text())["domains"]
        del store["manifest.json"]
        found[name] = store, counts
        sources = {s: sum(d["sources"][s]["blocks_left_out"] for d in counts.values()) for s in
                   ("first", SOURCE)}  # fmt: skip
        assert sources == {"first": 0, SOURCE: len(_marked(ground, marker))}
        assert marker in counts["code"]["sources"][SOURCE]["example_left_out"]
    assert differences(found["nan"][0], found["walk"][0]) == []


# --- damaged and foreign files ---

DAMAGE = {
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer by a byte": lambda path: os.truncate(path, path.stat().st_size + 1),
    "missing": lambda path: path.unlink(),
}


@some(2, 30)
def test_truncated_and_missing_shards_of_an_unfinished_run_are_read_anew(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    unfinished = ground.partial(tmp_path / "unfinished", 9)
    for case in range(cases):
        rng = random.Random(f"damage {case}")
        run = ground.fresh(tmp_path / str(case))
        shutil.copytree(unfinished / "externalize", run / "externalize")
        kept = finished_shards(run / PART)
        hurt = {name: rng.choice(list(DAMAGE)) for name in rng.sample(sorted(kept), case % 4 + 1)}
        for name, how in hurt.items():
            DAMAGE[how](run / PART / name)
            del kept[name]
        for n in range(rng.randint(0, 3)):  # what a kill may leave
            leftover = rng.choice([f"train-{rng.randrange(16):05}.arrow", "manifest.json", f"{n}"])
            (run / PART / f"{leftover}.writing").write_bytes(b"half a")
        ground.end(run, f"case {case}: {hurt}", kept)
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=[pytest.mark.faults] * (n > 0)) for n, how in enumerate(DAMAGE)],
)
def test_a_reader_of_a_finished_run_says_which_file_is_damaged(
    ground: Ground, tmp_path: Path, how: str
) -> None:
    run = ground.copy(tmp_path / "run")
    (run / PART / "train-00003.arrow.writing").write_bytes(b"half a")
    path = run / PART / "train-00005.arrow"
    DAMAGE[how](path)
    ended = ground.do(run)
    assert ended.well, ended
    assert "loaded" not in ended.seen  # what is finished is for its reader to refuse
    assert not list(run.rglob("*.writing"))
    folder = StageFolder(run / PART)
    for name in shard_names(folder):
        if name != path.name:
            Shard(folder, name, layout_of(folder))
    with pytest.raises(StoreError) as refused:
        Shard(folder, path.name, layout_of(folder))
    assert f"{path} is {'missing' if how == 'missing' else 'damaged'}" in str(refused.value)
    assert f"fusellm store verify {run / PART} --repair" in str(refused.value)


@pytest.mark.parametrize(
    "what", ["folder", "target's", "weights", "vocabulary", "normalizer", "eos"]
)
def test_what_was_made_from_something_else_is_refused_before_a_model_is_loaded(
    ground: Ground, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "load_model", lambda *_: pytest.fail("a model was loaded"))
    run = ground.copy(tmp_path / "run")
    model = tmp_path / "neox"
    shutil.copytree(ground.world / "neox", model)
    if what == "folder":
        arguments = ground._arguments(run, (), ()) | {"parts": ["externalize/first"]}
        assert ground.server.do("stages", **arguments).well
        shutil.rmtree(run / PART)
        shutil.copytree(run / "externalize" / "first", run / PART)
        differs = {"input weights was", "input tokenizer was"}
    elif what == "target's":
        arguments = ground._arguments(run, (), ()) | {"parts": ["externalize/target"]}
        assert ground.server.do("stages", **arguments).well
        shutil.rmtree(run / PART)
        shutil.copytree(run / "externalize" / "target", run / PART)
        differs = {"input weights was", "input tokenizer was", "dtype was"}
    elif what == "weights":
        weights = load_file(model / "model.safetensors")
        next(iter(weights.values())).view(-1)[7] += 1e-6
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        differs = {"input weights was"}
    elif what == "eos":
        path = model / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<|endoftext|>", "a"))
        differs = {"input tokenizer was"}
    else:
        path = model / "tokenizer.json"
        layout = json.loads(path.read_text(encoding="utf-8"))
        if what == "vocabulary":
            vocabulary = layout["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        else:
            layout["normalizer"] = {"type": "NFC"}
        path.write_text(json.dumps(layout), encoding="utf-8")
        differs = {"input tokenizer was"}
    before = store_of(run / PART)
    recipe = load_recipe(ground.world / "recipe.yaml", [*CHANGES, f"sources.1.model={model}"])
    with pytest.raises(IdentityError) as refused:
        Pipeline(resolve_paths(recipe, ground.world), run, Silent()).execute([PART])
    message = str(refused.value)
    assert f"{run / PART} was made from something else" in message
    assert "--redo" in message
    for words in {"input weights was", "input tokenizer was", "dtype was"}:
        assert (words in message) is (words in differs), message
    assert differences(store_of(run / PART), before) == []


# --- two at a time ---


@some(1, 10)
def test_of_two_processes_one_is_refused(ground: Ground, tmp_path: Path, cases: int) -> None:
    refused = case = 0
    while refused < cases:
        offset = round(random.Random(f"two {case}").uniform(0.0, 0.4 * ground.seconds), 4)
        run = ground.fresh(tmp_path / str(case))
        children = [ground.start(run)]
        time.sleep(offset)
        children.append(ground.start(run))
        both = [child.wait() for child in children]
        what = f"case {case}, {offset} s apart: {both}"
        failed = [ended for ended in both if not ended.well]
        assert len(failed) <= 1, what
        for ended in failed:
            assert ended.error == "StoreError", what
            assert f"another process is writing in {run / PART}" in ended.message, what
            assert "loaded" not in ended.seen, what
            refused += 1
        assert sum(ended.seen.get("loaded", 0) for ended in both) == 1, what
        kept = finished_shards(run / PART)
        assert len(kept) == len(ground.whole["order"]), what
        ground.end(run, what, kept)
        case += 1
        assert case < 4 * cases + 10, "most second processes came when the first was done"
    print(f"\n{refused} of {case} second processes were refused; the others came when it was done")


@some(1, 20)
def test_the_second_goes_on_where_the_first_was_killed(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    """The first is killed while the second starts: a lock that nobody holds is in nobody's way."""
    ended_well = 0
    for case in range(cases):
        rng = random.Random(f"killed first {case}")
        starts, kill = sorted(round(rng.uniform(0.0, ground.seconds), 4) for _ in range(2))
        run = ground.fresh(tmp_path / str(case))
        first = ground.start(run)
        time.sleep(starts)
        second = ground.start(run)
        time.sleep(min(kill - starts, 0.2))
        first.kill()
        first.wait()
        kept = finished_shards(run / PART)
        ended = second.wait()
        what = f"case {case}, the second after {starts} s, the first killed after {kill}: {ended}"
        assert ended.well or ended.error == "StoreError", what
        assert ended.well or "another process is writing" in ended.message, what
        ended_well += ended.well
        ground.end(run, what, kept)
    print(f"\n{ended_well} of {cases} second processes went on, the others came too early")


def test_a_lock_that_another_holds(ground: Ground, tmp_path: Path) -> None:
    run = ground.fresh(tmp_path / "run")
    (run / PART).mkdir(parents=True)
    with (run / PART / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = ground.do(run)
    assert ended.error == "StoreError"
    assert "another process is writing" in ended.message
    ground.end(run, "the other has ended", {})


@some(1, 10)
def test_two_sources_at_a_time_are_in_nobodys_way(
    ground: Ground, tmp_path: Path, cases: int
) -> None:
    """Two processes read a source each: they have folders of their own, and the run in common."""
    for case in range(cases):
        seconds = random.Random(f"sources {case}").choice([0.0, 0.02])
        run = ground.fresh(tmp_path / str(case))
        arguments = ground._arguments(run, (), ())
        children = []
        for part in (PART, "externalize/first"):
            children.append(ground.server.start("stages", **arguments | {"parts": [part]}))
            time.sleep(seconds)
        for child in children:
            assert (ended := child.wait()).well, f"case {case}: {ended}"
        ground.end(run, f"case {case}", finished_shards(run / PART))


def test_two_processes_write_the_runs_recipe(ground: Ground, tmp_path: Path) -> None:
    """The one file that processes of one run have in common; neither takes the other's away."""
    run = ground.fresh(tmp_path / "run")
    children = [ground.server.start("recipes", world=ground.world, run=run) for _ in range(2)]
    for child in children:
        assert (ended := child.wait()).well, ended
    assert load_recipe(run / "recipe.yaml").name == "tiny"
    assert open_corpus(run).complete
