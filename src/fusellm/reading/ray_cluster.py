"""The Ray cluster that sources are read on: found or started, and how many workers it can have."""

import importlib
import io
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple, TextIO, cast

from fusellm.errors import ClusterError
from fusellm.reading.engine import EngineSettings

_CPU_GROUP = 8  # CPUs of a worker where nothing else is said: more make one model little faster
_CONNECT_SECONDS = 10.0
_FIRST_WITH_TOKENS = (2, 52)
_GUESSES = re.compile(r" (Some common causes|There are some potential root causes)")


def require_ray(settings: EngineSettings) -> None:
    """Check what can be checked before a cluster is needed.

    Raises:
        ClusterError: Ray is not installed or too old, and the message has the command that installs
            it; or the address is none that is supported, or no token is asked for there.
    """
    if find_spec("ray") is None:
        raise ClusterError("--engine ray needs the package ray: pip install 'fusellm[ray]'")
    if tuple(int(part) for part in version("ray").split(".")[:2]) < _FIRST_WITH_TOKENS:
        raise ClusterError(
            f"Ray {version('ray')} runs what anybody sends it who reaches its ports; Ray "
            "2.52 is the first that asks for a token: pip install 'fusellm[ray]'"
        )
    address = _address(settings)
    if "://" in address:
        raise ClusterError(
            f"Ray Client ({address}) is not supported; run the command on a machine of the "
            "cluster, with --ray-address auto"
        )

    if address != "local" and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ClusterError(
            f"the Ray cluster at {address} is used only if it asks for a token, or it runs what "
            "anybody sends it who reaches its ports: start it with RAY_AUTH_MODE=token, and set "
            "that here too, with the same token (docs.ray.io, token authentication)"
        )


def set_up_tokens(settings: EngineSettings) -> None:
    """Have a cluster that is started here ask for a token; to be called before Ray is imported.

    The processes of the cluster are children of this one, and have its environment. A second
    cluster of this process has the same token: Ray reads it once.
    """
    if _address(settings) == "local":
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _address(settings: EngineSettings) -> str:
    return settings.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def cluster(settings: EngineSettings) -> Iterator[tuple[Any, bool]]:
    """Be connected to the cluster that is wanted; one within another has the same.

    Gives Ray, and whether the cluster was started for it: it is then shut down in the end.

    Raises:
        ClusterError: Ray is not there, or the cluster cannot be reached or started.
    """
    require_ray(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    set_up_tokens(settings)
    ray = importlib.import_module("ray")
    with connected(ray, settings) as started_here:
        yield ray, started_here


@contextmanager
def connected(ray: Any, settings: EngineSettings) -> Iterator[bool]:
    """Be connected to a cluster; gives whether it was started for it.

    Raises:
        ClusterError: it cannot be reached or started.
    """
    if ray.is_initialized():  # by who uses fusellm as a library, and will shut it down
        yield False
        return
    address = _address(settings)
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "include_dashboard": False}
    try:
        with redirect_stdout(cast(TextIO, _WithoutRay(sys.stdout))), _ending_on_sigterm() as end:
            try:
                _require_listening(address)
                here = {"_node_ip_address": "127.0.0.1"} if address == "local" else {}
                ray.init(address=address, **here, **quiet)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise ClusterError(_why_not_connected(address, error)) from error
            end()
            yield address == "local"
    finally:
        with redirect_stdout(io.StringIO()):  # where it prints what it has held back
            ray.shutdown()  # of a cluster that was found, it ends the connection only


@contextmanager
def _ending_on_sigterm() -> Iterator[Callable[[], object]]:
    """Gives a function that has SIGTERM raise SystemExit; Ray's handler aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    handler = before if callable(before) else lambda number, frame: sys.exit(128 + number)
    try:
        yield lambda: signal.signal(signal.SIGTERM, handler)
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_listening(address: str) -> None:
    """Raises OSError at once where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _why_not_connected(address: str, error: Exception) -> str:
    if address == "local":
        return f"a Ray cluster could not be started on this machine: {one_line(error)}"
    return (
        f"the Ray cluster at {address} was not reached: {one_line(error)}. `ray status` on its "
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
        return sum(_fitting(node, cpus, gpus) for node in nodes)

    if settings.worker_cpus is not None:
        cpus = settings.worker_cpus
    else:  # as many as leave room for the workers that are wanted
        most = most_cpus if settings.workers else min(most_cpus, _CPU_GROUP)
        wanted = min(settings.workers or (room(1) if gpus else 1), room(1))
        cpus = next((n for n in range(most, 0, -1) if room(n) >= wanted), 1)
    if room(cpus) == 0:
        raise ClusterError(
            f"no node of the cluster has room for a worker of {amount(cpus, gpus)}; they have "
            f"{_described(nodes)}. Set --worker-cpus and --worker-gpus to what one has"
        )
    return WorkerSize(settings.workers or room(cpus), cpus, gpus, room(cpus))


def no_room_note(size: WorkerSize, started_here: bool) -> str | None:
    """What the user is told where a cluster has no room for all workers.

    Raises:
        ClusterError: it was started here, so that more room can never come.
    """
    if size.workers <= size.room:
        return None
    each = amount(size.cpus, size.gpus)
    if started_here:
        raise ClusterError(
            f"--workers {size.workers}: this machine has room for {size.room}, of {each} each; set "
            "fewer, or less for each with --worker-cpus and --worker-gpus"
        )
    return (
        f"the cluster has room for {size.room} of {size.workers} workers, of {each} each; the "
        "others begin when it has more"
    )


def _fitting(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    by_cpus = int(node.get("CPU", 0) // cpus)
    if gpus == 0:
        return by_cpus
    node_gpus = node.get("GPU", 0)
    by_gpus = int(node_gpus // gpus) if gpus >= 1 else int(node_gpus) * int(1 / gpus)
    return min(by_cpus, by_gpus)


def _described(nodes: Sequence[Mapping[str, float]]) -> str:
    kinds = Counter(amount(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    return "; ".join(f"{kind} ({count} of them)" for kind, count in kinds.items()) or "nothing"


def amount(cpus: float, gpus: float) -> str:
    """What a worker takes, or a node has."""
    return f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"


def one_line(error: BaseException) -> str:
    """The last line of what Ray says, which has the reason, without its guesses at causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join((lines or [type(error).__name__])[-1].split())
    text = _GUESSES.split(text)[0]
    return text.rstrip(".") if len(text) <= 300 else text[:300] + "…"
