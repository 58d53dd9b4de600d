"""Options that say where sources are read."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fusellm.reading.engine import EngineSettings

_PANEL = "Where sources are read"


class EngineName(StrEnum):
    """What `--engine` takes."""

    LOCAL = "local"
    RAY = "ray"


Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="In this process, or by the workers of a Ray cluster; the result is the same. A "
        "cluster that runs is used only if it asks for a token (RAY_AUTH_MODE=token).",
        rich_help_panel=_PANEL,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT|auto",
        help="A Ray cluster that runs; `auto` is the one that this machine belongs to. If not "
        "given: what RAY_ADDRESS says, else one is started on this machine and stopped in the end.",
        rich_help_panel=_PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        min=1,
        help="How many, each with the model loaded; if not given, one a GPU, or one for each 8 "
        "CPUs where there is no GPU.",
        rich_help_panel=_PANEL,
    ),
]
WorkerCpus = Annotated[
    int | None,
    typer.Option(
        "--worker-cpus",
        metavar="N",
        min=1,
        help="CPUs of a worker, which are its threads.",
        rich_help_panel=_PANEL,
    ),
]
WorkerGpus = Annotated[
    float | None,
    typer.Option(
        "--worker-gpus",
        metavar="N",
        min=0,
        help="GPUs of a worker: several for a model with a device_map (if not given, all of a "
        "machine), 0.5 for two workers on one GPU, 0 for none.",
        rich_help_panel=_PANEL,
    ),
]


def settings_of(
    name: EngineName,
    address: str | None,
    workers: int | None,
    cpus: int | None,
    gpus: float | None,
) -> "EngineSettings":
    """What the options say.

    Raises:
        ClusterError: they do not go together.
    """
    from fusellm.reading.engine import EngineSettings

    return EngineSettings(name.value, address, workers, cpus, gpus)
