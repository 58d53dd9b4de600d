"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

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
    typer.Option("--redo", help="Move stages made from other settings aside and make them anew."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the models whose recipe says trust_remote_code: true; its "
        "files are named first. Only if you have read it: it can do whatever you can.",
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
NO_CHANGES: list[str] = []
