"""`fusellm status` and `fusellm clean`: what a run's folder holds, and what it does not need."""

import shutil
from typing import Annotated

import typer
from rich.text import Text

from fusellm.cli.console import STDERR, STDOUT, json_text
from fusellm.cli.draw import table
from fusellm.cli.options import Json, RunFolder


def status(run: RunFolder, as_json: Json = False) -> None:
    """Show how far a run is."""
    from fusellm.store.run_status import status_of

    rows = status_of(run)
    if as_json:
        print(json_text(rows))
        return
    shown = table("stage", "state", ">shards", ">size", ">seconds", title=str(run))
    for row in rows:
        if not row["begun"]:
            shown.add_row(str(row["stage"]), Text("not begun", "dim"), *"–––")
            continue
        state = Text("done", "green") if row["complete"] else Text("unfinished", "yellow")
        if row["step"] is not None:
            of = "" if row["steps"] is None else f" of {row['steps']:,}"
            state = Text(f"saved at step {row['step']:,}{of}", "yellow")
        if not row["in_recipe"]:
            state = Text("not in the recipe", "dim")
        megabytes = f"{row['bytes'] / 1e6:.1f} MB"
        seconds = "–" if row["seconds"] is None else str(row["seconds"])
        shown.add_row(str(row["stage"]), state, str(row["shards"]), megabytes, seconds)
    STDOUT.print(shown)


def clean(
    run: RunFolder,
    stores: Annotated[
        bool, typer.Option("--stores", help="Remove externalize and fuse too; models stay.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Remove the whole run.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what a finished run does not need: what was set aside, and checkpoints."""
    from fusellm.store.run_folder import removable
    from fusellm.store.tables import folder_bytes

    paths = removable(run, stores, everything)
    if not paths:
        STDERR.print("nothing to remove")
        return
    for path in paths:
        STDERR.say(f"{path}  {folder_bytes(path) / 1e6:.1f} MB")
    if yes or typer.confirm("Remove these?"):
        for path in paths:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if everything and not any(run.iterdir()):
            run.rmdir()
