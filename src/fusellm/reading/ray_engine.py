"""Reading a source on a Ray cluster: shards are the work items, each worker keeps a model loaded.

This process, the driver, sends blocks of text and writes the shards that come back. Workers need
fusellm and the model, and no files that they share with the driver.

Ray sends Python objects as pickles, so whoever a cluster listens to can run code in it. One that is
started here listens on the loopback device and asks for a token; of others a token is required.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fusellm.errors import ClusterError, FusellmError
from fusellm.reading.engine import (
    EngineSettings,
    Event,
    Events,
    ModelLoaded,
    ReadingTask,
    ReadShard,
    Told,
)
from fusellm.reading.ray_cluster import (
    WorkerSize,
    amount,
    cluster,
    no_room_note,
    one_line,
    size_of_workers,
)
from fusellm.reading.ray_worker import IN_FLIGHT, Ready, RemoteWorker, orders_of

_MOST_LOSSES = 3
_SAY_AFTER_SECONDS = 60.0
_LISTEN_EVERY_SECONDS = 1.0
_CURE = (
    "Finished shards are kept. Where memory ran out: fewer --workers, or a smaller "
    "externalize.batch_tokens; the same command goes on from here, also with --engine local"
)


def read_on_ray(task: ReadingTask, settings: EngineSettings) -> Events:
    """The engine `ray`: shards are read on a cluster, and written by who asks for them.

    A cluster that was started for it is shut down in the end, whatever happens; of any other one
    only the workers are stopped.

    Raises:
        ClusterError: Ray or the cluster is not there, has no room, is not of the same software,
            or its workers are lost again and again.
        FusellmError: what a worker raises as the engine `local` would.
    """
    with cluster(settings) as (ray, started_here):
        size = size_of_workers(
            [node["Resources"] for node in ray.nodes() if node["Alive"]],
            settings,
            task.located.settings.device_map is not None,
        )
        if (note := no_room_note(size, started_here)) is not None:
            yield Told(note)
        crew = _Crew(ray, task, size)
        try:
            yield from crew.work()
        finally:
            crew.dismiss()


@dataclass(eq=False)
class _Place:
    """A worker, and the one that comes in its place when it is lost."""

    actor: Any
    asked: dict[Any, str | None] = field(default_factory=dict)
    """What was asked of it and is not answered: names of shards; None is `load`."""
    ready: Ready | None = None
    losses: int = 0
    """In a row, with no shard finished between."""


class _Crew:
    """The workers of a task."""

    def __init__(self, ray: Any, task: ReadingTask, size: WorkerSize) -> None:
        self._ray, self._task, self._size = ray, task, size
        self._actors = ray.remote(RemoteWorker).options(
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

    def work(self) -> Iterator[Event]:
        """Have all shards read."""
        count = min(self._size.workers, len(self._left))
        self._places = [_Place(None) for _ in range(count)]
        for place in self._places:
            self._hire(place)
        last, began = len(self._left), time.monotonic()
        while last:
            self._hand_out()
            refs = {ref: place for place in self._places for ref in place.asked}
            ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=_LISTEN_EVERY_SECONDS)
            yield 0  # whoever asks may stop: what was read could not be written
            if not ready and not self._devices and time.monotonic() - began >= _SAY_AFTER_SECONDS:
                began = float("inf")
                yield Told(
                    "no worker is ready yet: the cluster has no room at present for "
                    f"{amount(self._size.cpus, self._size.gpus)}, or the model takes long to load"
                )
            for ref in ready:
                for event in self._answered(refs[ref], ref):
                    last -= isinstance(event, ReadShard)
                    yield event

    def dismiss(self) -> None:
        """Stop all workers, at once."""
        for place in self._places:
            self._stop(place)

    def _hire(self, place: _Place) -> None:
        place.actor, place.ready = self._actors.remote(), None
        place.asked = {place.actor.load.remote(self._orders): None}

    def _stop(self, place: _Place) -> None:
        if place.actor is not None:
            with suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.kill(place.actor, no_restart=True)

    def _hand_out(self) -> None:
        """Give shards to those who have least to do; towards the end each gets fewer."""
        while self._left:
            able = [place for place in self._places if place.ready is not None]
            if not able:
                return
            place = min(able, key=lambda place: len(place.asked))
            unfinished = len(self._left) + sum(len(place.asked) for place in able)
            most = min(IN_FLIGHT, -(-unfinished // len(self._places)))
            if len(place.asked) >= most:
                return
            name = self._left.popleft()
            place.asked[place.actor.read.remote(self._task.blocks(name))] = name

    def _answered(self, place: _Place, ref: Any) -> Iterator[Event]:
        """Take an answer, and tell what it says."""
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            yield self._failed(place, error)
            return
        name = place.asked.pop(ref)
        if name is not None:
            place.losses = 0
            yield ReadShard(name, lambda: answer)
            yield answer.shard.blocks
            return
        place.ready = answer
        if answer.device not in self._devices:
            self._devices.add(answer.device)
            yield ModelLoaded(", ".join(sorted(self._devices)), answer.weights_sha256)

    def _failed(self, place: _Place, error: Any) -> Told:
        """Raise a worker's error as it was raised there, or have its work done by another one."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, FusellmError):
            raise cause from None
        if getattr(error, "actor_init_failed", False) or "failed to import on the" in str(error):
            raise ClusterError(
                f"a machine of the cluster cannot import fusellm: {one_line(error)}. Install the "
                "same version there, with its dependencies"
            ) from error
        if isinstance(error, self._ray.exceptions.RayTaskError):
            raise cause or error from error
        return self._lost(place, one_line(error))

    def _lost(self, place: _Place, reason: str) -> Told:
        """Have what a lost worker was asked done by another one.

        Raises:
            ClusterError: too many have been lost.
        """
        self._stop(place)
        where = f" on {place.ready.node}" if place.ready else ""
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
        return Told(f"a worker{where} is lost, and its work is done by another one: {reason}")
