"""Options and arguments that several commands have."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeOrRun = Annotated[
    Path, typer.Argument(help="A recipe (.yaml) or the folder of a run.", show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]


def folder(given: str) -> Path:
    """The folder that an option names; an empty name, as of a variable that is not set, is none."""
    if not given:
        raise typer.BadParameter("the name of the folder is empty")
    return Path(given)


Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        parser=folder,
        help="The run's folder; by default runs/ and its name.",
    ),
]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set objective.lambda=0.7"),
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Move what was made from other settings aside; make it anew."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with models or tokenizers (of a recipe: with those where it says "
        "trust_remote_code: true); its files are named first. Only if you have read it: it can do "
        "whatever you can.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload the fused model to the Hugging Face hub in the end. A repository that does "
        "not exist yet is made, private.",
    ),
]
Nproc = Annotated[
    int,
    typer.Option(
        "--nproc",
        metavar="N",
        min=1,
        help="Train on N processes of this machine, one a GPU; each takes "
        "per_device_train_batch_size rows at a time. `accelerate launch -m fusellm train` does it "
        "on several machines. With `training: {fsdp: true}` the model is spread over them (FSDP2).",
    ),
]
_engine_option = partial(typer.Option, rich_help_panel="Where sources are read")


EngineName = Literal["local", "ray"]
Engine = Annotated[
    EngineName,
    _engine_option(
        "--engine",
        help="In this process, or by the workers of a Ray cluster; the result is the same. A "
        "cluster that runs is used only if it asks for a token (RAY_AUTH_MODE=token).",
    ),
]
RayAddress = Annotated[
    str | None,
    _engine_option(
        "--ray-address",
        metavar="HOST:PORT|auto",
        help="A Ray cluster that runs; `auto` is the one that this machine belongs to. If not "
        "given: what RAY_ADDRESS says, else one is started on this machine and stopped in the end.",
    ),
]
Workers = Annotated[
    int | None,
    _engine_option(
        "--workers",
        metavar="N",
        min=1,
        help="How many, each with the model loaded; if not given, one a GPU, or one for each 8 "
        "CPUs where there is no GPU.",
    ),
]
WorkerCpus = Annotated[
    int | None,
    _engine_option(
        "--worker-cpus", metavar="N", min=1, help="CPUs of a worker, which are its threads."
    ),
]
WorkerGpus = Annotated[
    float | None,
    _engine_option(
        "--worker-gpus",
        metavar="N",
        min=0,
        help="GPUs of a worker: several for a model with a device_map (if not given, all of a "
        "machine), 0.5 for two workers on one GPU, 0 for none.",
    ),
]
NO_CHANGES: list[str] = []
