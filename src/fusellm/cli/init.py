"""`fusellm init`: a copy of recipes/my-run.yaml to start from."""

from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.console import STDERR
from fusellm.errors import RecipeError

_TEMPLATE = Path(__file__).parents[1] / "recipes" / "my-run.yaml"


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("my-run.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file in it, such as {path / 'my-run.yaml'}")
    if path.exists():
        raise RecipeError(f"{path} exists already; name another file or move it away")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent} for {path.name}; make it first")
    path.write_bytes(_TEMPLATE.read_bytes())
    STDERR.say(f"wrote {path}; edit it, then: fusellm check {path}")
