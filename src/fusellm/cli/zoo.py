"""`fusellm zoo`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.console import STDERR, STDOUT, Terminal
from fusellm.cli.options import folder

zoo_app = typer.Typer(no_args_is_help=True, help="The small models that come with fusellm.")


@zoo_app.command("train")
def zoo_train(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FOLDER", parser=folder, help="Folder to write the models to."
        ),
    ] = Path("zoo"),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="One of prose, python, cpp; may be repeated.")
    ] = None,
    share: Annotated[
        float, typer.Option("--share", min=0.0, max=1.0, help="Share of the training to do.")
    ] = 1.0,
) -> None:
    """Train the zoo's models from scratch, seeded; about an hour on 2 cores."""
    from fusellm.stages.zoo import make_zoo

    cards = make_zoo(out, only or None, share, Terminal(STDERR))
    for name, bits in cards.items():
        rounded = json.dumps({domain: round(value, 3) for domain, value in bits.items()})
        STDOUT.say(f"{name} {rounded}")
