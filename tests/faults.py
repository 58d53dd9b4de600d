"""Runs that are disturbed: a server that forks a child for each, and what goes wrong in it.

The server has imported everything and works on one thread, so a child begins in milliseconds with
locks that nobody holds. A child patches itself and ends, so nothing is ever put back.
"""

import atexit
import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_PATIENCE = 120.0  # seconds until a child counts as hanging


@dataclass
class Ended:
    """How a child ended.

    Attributes:
        status: exit status; below zero the signal that killed it.
        error, message: class and text of the exception that ended it.
        seen: what the faults and counters in it noted.
        output: what it printed.
        seconds: from its start to its end.
    """

    status: int
    error: str | None
    message: str
    seen: dict[str, Any]
    output: str
    seconds: float

    @property
    def well(self) -> bool:
        """Whether it did all that it was asked to."""
        return self.status == 0 and self.error is None


@dataclass
class Child:
    """A child of the server."""

    pid: int
    _server: "Server"
    _folder: Path
    began: float = field(default_factory=time.monotonic)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal. Until `wait` it is a zombie at least, so its id is nobody else's."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end.

        Raises:
            AssertionError: it hangs; the message has what its threads were at.
        """
        status = self._server.ask("wait", self.pid)
        seconds = time.monotonic() - self.began
        output = (self._folder / "output").read_text(errors="replace")
        assert status is not None, f"a child hangs:\n{output}"
        outcome = self._folder / "outcome.json"
        told = outcome.read_text() if outcome.exists() else ""
        found = json.loads(told) if told.endswith("}") else {}  # killed as it wrote it
        return Ended(
            status, found.get("error"), found.get("message", ""), found.get("seen", {}), output,
            seconds,
        )  # fmt: skip


class Server:
    """A process that forks children; `folder` is for what they leave."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._children = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for pytest
        )

    def ask(self, *message: Any) -> Any:
        """An answer of the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def start(self, job: str, **arguments: Any) -> Child:
        """Start a child that does one of JOBS."""
        self._children += 1
        folder = self._folder / str(self._children)
        folder.mkdir(parents=True)
        (folder / "output").touch()
        began = time.monotonic()
        return Child(self.ask("start", job, arguments, folder), self, folder, began)

    def do(self, job: str, **arguments: Any) -> Ended:
        """Have a child do a job, and wait for it."""
        return self.start(job, **arguments).wait()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve(asked: BinaryIO, answer: BinaryIO) -> None:
    """Answer until the other side closes."""
    while True:
        try:
            kind, *message = pickle.load(asked)
        except EOFError:
            return
        found = _fork(*message) if kind == "start" else _wait(*message)
        pickle.dump(found, answer)
        answer.flush()


def _fork(job: str, arguments: dict[str, Any], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    status, outcome = 1, folder / "outcome.json"
    try:
        status = _do(job, arguments, outcome)
    finally:
        _leave(status)
    return 0


def _leave(status: int) -> None:
    """End a child as Python ends: once all threads have."""
    # Threads of an executor wait to be told, which is what this does.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)


def _do(job: str, arguments: dict[str, Any], outcome: Path) -> int:
    status, found = 0, {}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            JOBS[job](**arguments)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BaseException as error:
        status = 1
        found = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, SystemExit):
            status = int(error.code or 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    SEEN["seconds"] = time.monotonic() - _BEGAN[0]
    text = json.dumps(found | {"seen": SEEN})
    with open(outcome, "w") as file:  # noqa: PTH123  (Path.open may be patched)
        file.write(text)
    return status


def _wait(pid: int) -> int | None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


# What follows runs in children.

SEEN: dict[str, Any] = {}
_BEGAN = [0.0]
Fault = tuple[Any, ...]
"""Name of one of FAULTS, and what it takes."""


def stages(
    world: Path, run: Path, changes: Sequence[str], parts: Sequence[str], faults: Sequence[Fault]
) -> None:
    """Stages of a run in a world, disturbed."""
    from fusellm.pipeline import Pipeline
    from fusellm.progress import Silent
    from fusellm.recipe_file import load_recipe, resolve_paths
    from fusellm.training import rehearsal

    rehearsal.rehearse = lambda *_: None  # faults are for the stages
    _BEGAN[0] = time.monotonic()
    _count_loads()
    for name, *settings in faults:
        FAULTS[name](run, *settings)
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", list(changes)), world)
    Pipeline(recipe, run, Silent()).execute(list(parts))


def command(arguments: Sequence[str]) -> None:
    """The command line."""
    from fusellm.cli.main import main

    _BEGAN[0] = time.monotonic()
    sys.argv = ["fusellm", *arguments]
    main()


def recipes(world: Path, run: Path) -> None:
    """Write a run's recipe, as each command does, again and again."""
    from fusellm.pipeline import Pipeline
    from fusellm.progress import Silent
    from fusellm.recipe_file import load_recipe, resolve_paths

    recipe = resolve_paths(load_recipe(world / "recipe.yaml", []), world)
    pipeline = Pipeline(recipe, run, Silent())
    for _ in range(100):
        pipeline._write_recipe()


def small_disk(
    world: Path, run: Path, corpus: Path, changes: Sequence[str], source: str, options: str
) -> None:
    """A source on a file system of its own that is too small, and then is not.

    The file system is a tmpfs that only this process sees. What is read in the end is copied to
    `run` from there.
    """
    import shutil

    _BEGAN[0] = time.monotonic()
    mount = _private_mounts()
    place = run / "disk"
    place.mkdir(parents=True)
    mount(place, options)
    shutil.copytree(corpus, place / "corpus")
    for _ in range(2):  # the second time nothing at all can be written
        try:
            stages(world, place, changes, [f"externalize/{source}"], ())
        except Exception as error:
            SEEN.setdefault("errors", []).append([type(error).__name__, str(error)])
        names = sorted(path.name for path in (place / "externalize" / source).glob("*"))
        SEEN.setdefault("names", []).append(names)
    before = _inodes(place / "externalize" / source)
    SEEN["before"] = len(before)
    mount(place, "size=64m,nr_inodes=4096", remount=True)
    stages(world, place, changes, [f"externalize/{source}"], ())
    after = _inodes(place / "externalize" / source)
    SEEN["kept"] = [name for name in before if after[name] == before[name]]
    shutil.copytree(place / "externalize", run / "externalize")


def _inodes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if not (folder / "manifest.json").exists():
        return found
    for name in json.loads((folder / "manifest.json").read_text())["shards"]:
        stat = (folder / name).stat()
        found[name] = [stat.st_ino, stat.st_mtime_ns]
    return found


def small_disk_of_a_training(
    world: Path, run: Path, done: Path, changes: Sequence[str], options: str
) -> None:
    """The fused model trained on a file system that is too small, and then is not.

    Args:
        done: a run as far as fuse. What is trained in the end is copied to `run`.
    """
    import shutil

    _BEGAN[0] = time.monotonic()
    mount = _private_mounts()
    place = run / "disk"
    place.mkdir(parents=True)
    mount(place, options)
    shutil.copytree(done, place, dirs_exist_ok=True)
    for _ in range(2):  # the second time it is full from the beginning, or nearly
        try:
            stages(world, place, changes, ["train/fused"], ())
        except Exception as error:
            SEEN.setdefault("errors", []).append([type(error).__name__, str(error)])
        SEEN.setdefault("checkpoints", []).append(
            sorted(str(path.relative_to(place)) for path in place.rglob("checkpoint-*"))
        )
    mount(place, "size=256m", remount=True)
    stages(world, place, changes, ["train/fused"], ())
    shutil.copytree(place / "train", run / "train")


def read_only(world: Path, run: Path, changes: Sequence[str], parts: Sequence[str]) -> None:
    """Stages of a run on a file system that cannot be written to."""
    mount = _private_mounts()
    mount(run, "", read_only=True)
    stages(world, run, changes, parts, ())


class NoMountsError(Exception):
    """This machine does not let a process mount for itself."""


def _private_mounts() -> Callable[..., None]:
    """Mounting tmpfs, or a folder once more and read-only, where no other process sees it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private = 0x00020000, 0x10000000, (1 << 18) | (1 << 14)
    flags = new_namespace if os.geteuid() == 0 else new_namespace | new_user

    def checked(result: int) -> None:
        if result != 0:
            raise NoMountsError(os.strerror(ctypes.get_errno()))

    checked(libc.unshare(flags))
    checked(libc.mount(b"none", b"/", None, private, None))

    remounted, bound, without_writing = 32, 1 << 12, 1

    def mount(place: Path, options: str, remount: bool = False, read_only: bool = False) -> None:
        if read_only:
            for how in (bound, bound | remounted | without_writing):
                checked(libc.mount(bytes(place), bytes(place), None, how, None))
            return
        how = remounted if remount else 0
        checked(libc.mount(b"tmpfs", bytes(place), b"tmpfs", how, options.encode()))

    return mount


JOBS: dict[str, Callable[..., None]] = {
    "stages": stages,
    "command": command,
    "recipes": recipes,
    "small_disk": small_disk,
    "small_disk_of_a_training": small_disk_of_a_training,
    "read_only": read_only,
}


def _count_loads() -> None:
    from fusellm.reading import worker

    original = worker.load_model

    def counted(*arguments: Any) -> Any:
        SEEN["loaded"] = SEEN.get("loaded", 0) + 1
        return original(*arguments)

    worker.load_model = counted


def disk_fails(run: Path, at: int | None, number: int, stays: bool) -> None:
    """The call number `at` that writes below the run's folder fails; with None none does.

    Args:
        number: of the error.
        stays: whether all later ones fail as well.
    """
    from fusellm.store.run_folder import NOW, USAGE

    nobody_needs = {*NOW, USAGE, f"{USAGE}.half"}
    calls: list[str] = []
    SEEN["calls"] = calls

    def maybe_fail(call: str, path: Path | str) -> None:
        if not str(path).startswith(str(run)) or Path(path).name in nobody_needs:
            return  # what a run does now, by the clock, and what it has used
        calls.append(f"{call} {Path(path).relative_to(run)}")
        if at is not None and (len(calls) - 1 == at or (stays and len(calls) > at)):
            raise OSError(number, os.strerror(number))

    path_open, os_open = Path.open, os.open
    mkdir, replace, fsync = os.mkdir, os.replace, os.fsync

    def my_open(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa"):
            return path_open(self, mode, *arguments, **named)
        maybe_fail("open", self)
        return _Failing(path_open(self, mode, *arguments, **named), self, maybe_fail)

    def my_os_open(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            maybe_fail("open", path)
        return os_open(path, flags, *arguments, **named)

    def my_mkdir(path: Any, *arguments: Any, **named: Any) -> None:
        if not Path(path).is_dir():
            maybe_fail("mkdir", path)
        mkdir(path, *arguments, **named)

    def my_replace(source: Any, target: Any, **named: Any) -> None:
        maybe_fail("rename", target)
        replace(source, target, **named)

    def my_fsync(descriptor: int) -> None:
        maybe_fail("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    Path.open, os.open = my_open, my_os_open
    os.mkdir, os.replace, os.fsync = my_mkdir, my_replace, my_fsync


class _Failing:
    """A file whose writing may fail half-way."""

    def __init__(self, file: Any, path: Path, maybe_fail: Callable[[str, Path], None]) -> None:
        self._file, self._path, self._maybe_fail = file, path, maybe_fail

    def write(self, data: Any) -> Any:
        self._file.write(data[: len(data) // 2])
        self._maybe_fail("write", self._path)
        return self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Failing":
        self._file.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> Any:
        return self._file.__exit__(*arguments)


def largest_file(run: Path, size: int) -> None:
    """No file may become larger than this, in bytes; what a quota of a process does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class UnexpectedError(Exception):
    """What a fault raises that nothing in the package expects."""


def writing_fails(run: Path, at: int, seconds: float = 0.0) -> None:
    """The writer's thread fails at a shard, counted from 0, after some time."""
    from fusellm.reading import batches
    from fusellm.stages import externalize

    write, hidden = externalize.write_encoded, batches._hidden
    written: list[str] = []
    SEEN["written"], SEEN["batches"] = written, 0

    def my_write(folder: Any, name: str, *arguments: Any) -> None:
        if len(written) == at:
            time.sleep(seconds)
            SEEN["batches_then"] = SEEN["batches"]
            raise UnexpectedError(f"no way to write {name}")
        written.append(name)
        write(folder, name, *arguments)

    def my_hidden(*arguments: Any) -> Any:
        SEEN["batches"] += 1
        return hidden(*arguments)

    externalize.write_encoded, batches._hidden = my_write, my_hidden


def memory_is_out(run: Path, most: int, chance: float, seed: int, message: str | None) -> None:
    """Batches of more than `most` positions, and others by chance, do not fit.

    Args:
        chance: for a batch of several blocks, in the model or in what is made of its states.
        message: of the error; None for a MemoryError.
    """
    import torch

    from fusellm.reading import batches, source_reader
    from fusellm.reading.selection import Selector

    rng = random.Random(seed)
    hidden_states, read_blocks, kept = (
        batches.hidden_states,
        source_reader.read_blocks,
        Selector._kept,
    )
    calls: list[Any] = []  # "shard", or [blocks, tokens, fits]
    SEEN["calls"] = calls

    def fail() -> None:
        calls[-1][2] = False
        if message is None:
            raise MemoryError
        if "Tried" in message or not message:
            raise torch.OutOfMemoryError(message)
        raise RuntimeError(message)

    def my_read(*arguments: Any) -> Any:
        calls.append("shard")
        return read_blocks(*arguments)

    def my_hidden(model: Any, **inputs: Any) -> Any:
        blocks, tokens = inputs["input_ids"].shape
        calls.append([blocks, tokens, True])
        if blocks * tokens > most or (blocks > 1 and rng.random() < chance):
            fail()
        return hidden_states(model, **inputs)

    def my_kept(self: Selector, *arguments: Any) -> Any:
        if calls[-1][0] > 1 and rng.random() < chance / 8:
            fail()
        return kept(self, *arguments)

    batches.hidden_states, source_reader.read_blocks, Selector._kept = my_hidden, my_read, my_kept


def not_finite(run: Path, tokens: int, marker: str, seed: int) -> None:
    """NaN or infinity somewhere in the states of blocks that contain a text.

    Args:
        tokens: of the tokenizer of the source that gives them.
    """
    import torch

    from fusellm.reading import batches, worker

    rng = random.Random(seed)
    marked: set[tuple[int, ...]] = set()
    encode, hidden = worker.encode_blocks, batches._hidden

    def my_encode(encoder: Any, blocks: Any) -> Any:
        found = encode(encoder, blocks)
        for block, encoded in zip(blocks, found, strict=True):
            if marker in block.text and len(encoder.vocabulary) == tokens:
                marked.add(tuple(encoded.ids.tolist()))
        return found

    def my_hidden(model: Any, rows: Any) -> Any:
        states, true_ids = hidden(model, rows)
        start = 0
        for row in rows:
            if tuple(row.tolist()) in marked:
                n = start + rng.randrange(len(row) - 1)
                value = rng.choice([torch.nan, torch.inf, -torch.inf])
                states[n, rng.randrange(states.shape[1])] = value
            start += len(row) - 1
        return states, true_ids

    worker.encode_blocks, batches._hidden = my_encode, my_hidden


def walk_fails(run: Path, tokens: int, marker: str) -> None:
    """A tokenizer, known by how many tokens it has, that changes blocks which contain a text."""
    from dataclasses import replace

    from fusellm.reading import worker

    encode = worker.encode_blocks

    def my_encode(encoder: Any, blocks: Any) -> Any:
        found = encode(encoder, blocks)
        if len(encoder.vocabulary) != tokens:
            return found
        return [
            replace(encoded, ends=None) if marker in block.text else encoded
            for block, encoded in zip(blocks, found, strict=True)
        ]

    worker.encode_blocks = my_encode


FAULTS: dict[str, Callable[..., None]] = {
    "disk_fails": disk_fails,
    "largest_file": largest_file,
    "writing_fails": writing_fails,
    "memory_is_out": memory_is_out,
    "not_finite": not_finite,
    "walk_fails": walk_fails,
}
FULL, QUOTA, BROKEN = errno.ENOSPC, errno.EDQUOT, errno.EIO


def _prepare() -> None:
    """Import and work out all that children need, without starting a thread."""
    import accelerate  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
    )

    import fusellm.cli.main
    import fusellm.pipeline  # noqa: F401
    from fusellm.tokens.encode import Encoder
    from fusellm.zoo.tokenizers import byte_level_bpe

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError, AttributeError):  # a table that a first load makes
        from transformers import conversion_mapping

        conversion_mapping.get_checkpoint_conversion_mapping("gpt_neox")
    Encoder(byte_level_bpe(iter(["compiles the walk"]), 300)).encode(["compiles"], [True])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but in a job
    _answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _prepare()
    serve(sys.stdin.buffer, _answer)
    os._exit(0)  # nothing is left to tidy up
