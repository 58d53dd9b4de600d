"""What an engine is given: shards to read, and what becomes of them; and how a user picks one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from fusellm.config import Recipe
from fusellm.errors import ClusterError
from fusellm.models.load import Located
from fusellm.progress import Bar
from fusellm.stages.externalize.work import Done
from fusellm.store.blocks import Block
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
class Task:
    """Shards of a source that are to be read.

    Attributes:
        names: of the shards; at least one.
        load: gives the blocks of a shard.
        begin: is told, before anything is written, the device's name and the digest of the
            weights; again where a further device joins.
        write: writes a shard; is called in whatever order they are finished.
        bar: counts blocks.
        say: tells the user a line.
    """

    recipe: Recipe
    located: Located
    encoder: Encoder
    names: Sequence[str]
    load: Callable[[str], list[Block]]
    begin: Callable[[str, str], None]
    write: Callable[[str, Done], None]
    bar: Bar
    say: Callable[[str], None]


Engine = Callable[[Task, EngineSettings], None]
