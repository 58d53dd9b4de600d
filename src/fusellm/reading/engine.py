"""What an engine is given and what it tells: shards to read, shards read; how a user picks one."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from fusellm.config import Recipe
from fusellm.errors import ClusterError
from fusellm.models.load import Located
from fusellm.reading.worker import Done
from fusellm.store.blocks import Block, read_shard
from fusellm.store.manifest import StageFolder
from fusellm.tokens.encode import Encoder

_OPTIONS = {
    "address": "--ray-address",
    "workers": "--workers",
    "worker_cpus": "--worker-cpus",
    "worker_gpus": "--worker-gpus",
}


@dataclass(frozen=True)
class EngineSettings:
    """Where sources are read; what is read does not depend on it.

    Attributes:
        name: `local`, in this process, or `ray`, on a Ray cluster. The others are for `ray` only.
        address: of a cluster that runs, as `host:port` of its head, or `auto` for the one that
            this machine belongs to; None for what RAY_ADDRESS says, else one that is started here.
        workers: how many, each with a model of its own; None for as many as there is room for.
        worker_cpus: CPUs of a worker, which are its torch threads; None for what suits the nodes.
        worker_gpus: GPUs of a worker, or a fraction that several share; None for one, for all of a
            node with a `device_map`, and for none where the cluster has none.
    """

    name: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None
    worker_cpus: int | None = None
    worker_gpus: float | None = None

    def __post_init__(self) -> None:
        """Raises ClusterError where settings do not go together."""
        given = [f.name for f in fields(self)[1:] if getattr(self, f.name) is not None]
        if self.name == "local" and given:
            options = ", ".join(_OPTIONS[name] for name in given)
            raise ClusterError(f"{options}: only for --engine ray; add that, or leave it away")
        gpus = self.worker_gpus or 0
        if gpus > 1 and gpus != int(gpus):
            raise ClusterError(
                f"--worker-gpus {gpus:g} must be a whole number, or less than 1 for workers that "
                "share a GPU"
            )


LOCAL = EngineSettings()


@dataclass(frozen=True)
class ReadingTask:
    """Shards of a corpus that a source is to read.

    Attributes:
        corpus: its folder, complete.
        names: of the shards; at least one.
    """

    recipe: Recipe
    located: Located
    encoder: Encoder
    corpus: StageFolder
    names: Sequence[str]

    def blocks(self, name: str) -> list[Block]:
        """The blocks of a shard."""
        return read_shard(self.corpus, name)


@dataclass(frozen=True)
class ModelLoaded:
    """The model is loaded: comes before anything is read, and again where a device joins.

    Attributes:
        devices: names of all that read.
        weights_sha256: digest of the weights.
    """

    devices: str
    weights_sha256: str


@dataclass(frozen=True)
class Told:
    """Something that the user should know."""

    line: str


@dataclass(frozen=True)
class ReadShard:
    """A shard has been read. They come in whatever order they are finished.

    Attributes:
        encode: gives its bytes, for a thread that writes while the model reads on.
    """

    name: str
    encode: Callable[[], Done]


Event = ModelLoaded | int | Told | ReadShard
"""What an engine tells; a number says that so many blocks more have been read."""
Events = Generator[Event, None, None]
Engine = Callable[[ReadingTask, EngineSettings], Events]
"""Reads a task's shards somewhere, and tells what happens. Closed, it stops at once."""
