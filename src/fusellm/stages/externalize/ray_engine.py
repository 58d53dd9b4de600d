"""Reading a source on a Ray cluster: shards are the work items, each worker keeps a model loaded.

This process, the driver, sends blocks of text and writes the shards that come back. Workers need
fusellm and the model, and no files that they share with the driver.

Ray sends Python objects as pickles, so whoever can reach a cluster can run code in it: use one
that you trust, in a network that you trust.
"""

import importlib
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, TextIO, cast

from fusellm.errors import ClusterError, FusellmError
from fusellm.stages.externalize.ray_worker import IN_FLIGHT, Loaded, Reader, orders_of
from fusellm.stages.externalize.task import EngineSettings, Task

_MOST_LOSSES = 3
_CPU_GROUP = 8  # CPUs of a worker where nothing else is said: more make one model little faster
_SAY_AFTER_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_GUESSES = re.compile(r" (Some common causes|There are some potential root causes)")


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        ClusterError: it is not; the message has the command that installs it.
    """
    if find_spec("ray") is None:
        raise ClusterError("--engine ray needs the package ray: pip install 'fusellm[ray]'")


def read_on_ray(task: Task, settings: EngineSettings) -> None:
    """The engine `ray`: read shards on a cluster, and write them here as they are finished.

    A cluster that was started for it is shut down in the end, whatever happens; of any other one
    only the workers are stopped.

    Raises:
        ClusterError: Ray or the cluster is not there, has no room, is not of the same software,
            or its workers are lost again and again.
        FusellmError: what a worker raises as the engine `local` would, and what `task.write`
            raises; what has been written stays.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    with _connected(ray, settings) as started_here:
        size = size_of_workers(
            [node["Resources"] for node in ray.nodes() if node["Alive"]],
            settings,
            task.located.settings.device_map is not None,
        )
        if size.workers > size.room:
            _say_no_room(task, size, started_here)
        crew = _Crew(ray, task, size)
        try:
            crew.work()
        finally:
            crew.dismiss()


@contextmanager
def _connected(ray: Any, settings: EngineSettings) -> Iterator[bool]:
    """Be connected to a cluster; gives whether it was started for it.

    Raises:
        ClusterError: it cannot be reached or started.
    """
    if ray.is_initialized():  # by who uses fusellm as a library, and will shut it down
        yield False
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "include_dashboard": False}
    try:
        with redirect_stdout(cast(TextIO, _WithoutRay(sys.stdout))):
            try:
                _require_listening(address)
                ray.init(address=address, **quiet)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise ClusterError(_why_not_connected(address, error)) from error
            with _orderly_sigterm():
                yield address == "local"
    finally:
        with redirect_stdout(io.StringIO()):  # where it prints what it has held back
            ray.shutdown()  # of a cluster that was found, it ends the connection only


@contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """Have SIGTERM raise SystemExit; the handler that Ray has set aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _require_listening(address: str) -> None:
    """Raises OSError at once where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _why_not_connected(address: str, error: Exception) -> str:
    if address == "local":
        return f"a Ray cluster could not be started on this machine: {_one_line(error)}"
    return (
        f"the Ray cluster at {address} was not reached: {_one_line(error)}. `ray status` on its "
        "head shows whether it runs; without --ray-address and RAY_ADDRESS, one is started here"
    )


class _WithoutRay:
    """A stream without what Ray prints of lost workers, which is in our messages too."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if threading.current_thread().name == "ray_listen_error_messages":
            return len(text)
        return int(self._stream.write(text))


class WorkerSize(NamedTuple):
    """How many workers, what each takes, and how many the cluster has room for."""

    workers: int
    cpus: int
    gpus: float
    room: int


def size_of_workers(
    nodes: Sequence[Mapping[str, float]], settings: EngineSettings, spread: bool
) -> WorkerSize:
    """What workers a cluster can have.

    Args:
        nodes: resources of each, as Ray names them.
        spread: whether the model is spread over several GPUs.

    Raises:
        ClusterError: no node has room for one.

    >>> size_of_workers([{"CPU": 1}, {"CPU": 16, "GPU": 2}], EngineSettings("ray"), spread=False)
    WorkerSize(workers=2, cpus=8, gpus=1, room=2)
    """
    most_gpus = max((node.get("GPU", 0) for node in nodes), default=0)
    most_cpus = int(max((node.get("CPU", 0) for node in nodes), default=0))
    gpus = settings.worker_gpus
    if gpus is None:
        gpus = int(most_gpus) if spread else int(most_gpus >= 1)

    def room(cpus: int) -> int:
        fitting = (_fitting(node, cpus, gpus) for node in nodes)
        return sum(fitting)

    if settings.worker_cpus is not None:
        cpus = settings.worker_cpus
    else:  # as many as leave room for the workers that are wanted
        most = most_cpus if settings.workers else min(most_cpus, _CPU_GROUP)
        wanted = settings.workers or (room(1) if gpus else 1)
        cpus = next((n for n in range(most, 0, -1) if room(n) >= max(wanted, 1)), 1)
    if room(cpus) == 0:
        raise ClusterError(
            f"no node of the cluster has room for a worker of {_amount(cpus, gpus)}; they have "
            f"{_described(nodes)}. Set --worker-cpus and --worker-gpus to what one has"
        )
    return WorkerSize(settings.workers or room(cpus), cpus, gpus, room(cpus))


def _fitting(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    by_cpus = int(node.get("CPU", 0) // cpus)
    if gpus == 0:
        return by_cpus
    found = node.get("GPU", 0)
    by_gpus = int(found // gpus) if gpus >= 1 else int(found) * int(1 / gpus)
    return min(by_cpus, by_gpus)


def _described(nodes: Sequence[Mapping[str, float]]) -> str:
    kinds = Counter(_amount(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    return "; ".join(f"{kind} ({count} of them)" for kind, count in kinds.items()) or "nothing"


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"


def _say_no_room(task: Task, size: WorkerSize, started_here: bool) -> None:
    """Raises ClusterError where more room can never come."""
    each = _amount(size.cpus, size.gpus)
    if started_here:
        raise ClusterError(
            f"--workers {size.workers}: this machine has room for {size.room}, of {each} each; set "
            "fewer, or less for each with --worker-cpus and --worker-gpus"
        )
    task.say(
        f"the cluster has room for {size.room} of {size.workers} workers, of {each} each; the "
        "others begin when it has more"
    )


@dataclass(eq=False)
class _Place:
    """A worker, and the one that comes in its place when it is lost."""

    actor: Any
    asked: dict[Any, str | None] = field(default_factory=dict)
    """What was asked of it and is not answered: names of shards; None is `load`."""
    loaded: Loaded | None = None
    losses: int = 0
    """In a row, with no shard finished between."""


class _Crew:
    """The workers of a task."""

    def __init__(self, ray: Any, task: Task, size: WorkerSize) -> None:
        self._ray, self._task, self._size = ray, task, size
        self._actors = ray.remote(Reader).options(
            num_cpus=size.cpus,
            num_gpus=size.gpus,
            max_concurrency=IN_FLIGHT,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._orders = orders_of(task, size.cpus, size.gpus)
        self._left = deque(task.names)
        self._taken_down: Counter[str] = Counter()
        self._devices: set[str] = set()
        self._places: list[_Place] = []

    def work(self) -> None:
        """Have all shards read and written."""
        count = min(self._size.workers, len(self._left))
        self._places = [_Place(None) for _ in range(count)]
        for place in self._places:
            self._hire(place)
        last, began = len(self._left), time.monotonic()
        while last:
            self._hand_out()
            refs = {ref: place for place in self._places for ref in place.asked}
            ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=_SAY_AFTER_SECONDS)
            if not ready and not self._devices and time.monotonic() - began >= _SAY_AFTER_SECONDS:
                began = float("inf")
                self._task.say(
                    "no worker is ready yet: the cluster has no room at present for "
                    f"{_amount(self._size.cpus, self._size.gpus)}, or the model takes long to load"
                )
            for ref in ready:
                last -= self._answered(refs[ref], ref)

    def dismiss(self) -> None:
        """Stop all workers, at once."""
        for place in self._places:
            self._stop(place)

    def _hire(self, place: _Place) -> None:
        place.actor, place.loaded = self._actors.remote(), None
        place.asked = {place.actor.load.remote(self._orders): None}

    def _stop(self, place: _Place) -> None:
        if place.actor is not None:
            with suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.kill(place.actor, no_restart=True)

    def _hand_out(self) -> None:
        """Give shards to those who have least to do; towards the end each gets fewer."""
        while self._left:
            able = [place for place in self._places if place.loaded is not None]
            if not able:
                return
            place = min(able, key=lambda place: len(place.asked))
            unfinished = len(self._left) + sum(len(place.asked) for place in able)
            most = min(IN_FLIGHT, -(-unfinished // len(self._places)))
            if len(place.asked) >= most:
                return
            name = self._left.popleft()
            place.asked[place.actor.read.remote(self._task.load(name))] = name

    def _answered(self, place: _Place, ref: Any) -> int:
        """Take an answer. Returns how many shards it finished."""
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._failed(place, error)
            return 0
        name = place.asked.pop(ref)
        if name is None:
            self._joined(place, answer)
            return 0
        self._task.write(name, answer)
        self._task.bar.advance(answer.shard.blocks)
        place.losses = 0
        return 1

    def _failed(self, place: _Place, error: Any) -> None:
        """Raise a worker's error as it was raised there, or have its work done by another one."""
        if getattr(error, "actor_init_failed", False) or "failed to import" in str(error):
            raise ClusterError(
                f"a machine of the cluster cannot import fusellm: {_one_line(error)}. Install the "
                "same version there, with its dependencies"
            ) from error
        if isinstance(error, self._ray.exceptions.RayTaskError):
            raise error.cause from (None if isinstance(error.cause, FusellmError) else error)
        self._lost(place, _one_line(error))

    def _joined(self, place: _Place, loaded: Loaded) -> None:
        place.loaded = loaded
        if loaded.device not in self._devices:
            self._devices.add(loaded.device)
            self._task.begin(", ".join(sorted(self._devices)), loaded.weights_sha256)

    def _lost(self, place: _Place, reason: str) -> None:
        """Have what a lost worker was asked done by another one.

        Raises:
            ClusterError: too many have been lost.
        """
        self._stop(place)
        where = f" on {place.loaded.node}" if place.loaded else ""
        shards = [name for name in place.asked.values() if name is not None]
        place.losses += 1
        self._left.extendleft(reversed(shards))
        self._taken_down.update(shards)
        worst = [name for name in shards if self._taken_down[name] >= _MOST_LOSSES]
        if worst:
            raise ClusterError(
                f"{_MOST_LOSSES} workers were lost while they read {' or '.join(worst)}, the last "
                f"one{where}: {reason}. {_CURE}"
            )
        if place.losses < _MOST_LOSSES:
            self._hire(place)
        else:
            self._places.remove(place)
        if not self._places:
            raise ClusterError(
                f"workers are lost again and again, the last one{where}: {reason}. {_CURE}"
            )
        self._task.say(f"a worker{where} is lost, and its work is done by another one: {reason}")


_CURE = (
    "Finished shards are kept. Where memory ran out: fewer --workers, or a smaller "
    "externalize.batch_tokens; the same command goes on from here, also with --engine local"
)


def _one_line(error: BaseException) -> str:
    """The last line of what Ray says, which has the reason, without its guesses at causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join((lines or [type(error).__name__])[-1].split())
    text = _GUESSES.split(text)[0]
    return text.rstrip(".") if len(text) <= 300 else text[:300] + "…"
