"""`fusellm status` and `fusellm clean`: what a run's folder holds, and what it does not need."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from fusellm.cli.console import STDERR, STDOUT, json_text
from fusellm.cli.draw import table
from fusellm.cli.options import Json, RunFolder

if TYPE_CHECKING:
    from fusellm.store.now import Now

_Look = tuple[Path, list[dict[str, Any]], "Now | None"]
"""A run, its stages, and what it is doing."""
_LOOKS = 1.0, 15.0  # seconds from one to the next, on a terminal and elsewhere


def status(
    run: RunFolder,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Go on showing it, until the run is done or Ctrl-C."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how far a run is, and what it is doing now.

    From another terminal, --watch follows a run: its stage, how fast it goes and how long it will
    take, the last loss, and memory. Of a run with rounds each round is shown.
    """
    if as_json and not watch:
        from fusellm.store.run_status import status_of

        print(json_text(status_of(run)))
    elif not watch:
        _show(run, as_json)
    elif as_json or not STDOUT.is_terminal:
        while _show(run, as_json):
            time.sleep(_LOOKS[1])
    else:
        with Live(console=STDOUT, auto_refresh=False) as live:
            while _draw(run, live):
                time.sleep(_LOOKS[0])


def _draw(run: Path, live: Live) -> bool:
    """Show a run anew; whether it is not done yet."""
    told = list(_looked_at(run))
    live.update(Group(*(part for one in told for part in _screen(*one))), refresh=True)
    return _goes_on(run, told)


def _show(run: Path, as_json: bool) -> bool:
    """Print a run; whether it is not done yet."""
    told = list(_looked_at(run))
    if as_json:
        of_each = [
            {"run": str(place), "stages": rows, "now": None if now is None else asdict(now)}
            for place, rows, now in told
        ]
        print(json_text(of_each), flush=True)
    else:
        STDOUT.show(*(part for one in told for part in _screen(*one)))
    return _goes_on(run, told)


def _goes_on(run: Path, told: Sequence[_Look]) -> bool:
    """Whether something is left to do, and whoever was doing it is not known to have gone."""
    from fusellm.store.run_folder import planned_rounds

    whole = all(row["complete"] for _, rows, _ in told for row in rows if row["in_recipe"])
    if whole and len(told) >= planned_rounds(run):
        return False
    heard = [now.is_running for _, _, now in told if now is not None]
    return not heard or any(running is not False for running in heard)


def _looked_at(run: Path) -> Iterator[_Look]:
    from fusellm.store.now import now_of
    from fusellm.store.run_folder import rounds_in
    from fusellm.store.run_status import status_of

    for place in rounds_in(run) or [run]:
        yield place, status_of(place), now_of(place)


def _screen(
    run: Path, rows: Sequence[dict[str, Any]], now: "Now | None"
) -> Iterator[RenderableType]:
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
    yield shown
    if now is not None and not all(row["complete"] for row in rows if row["in_recipe"]):
        yield Text(_in_words(now), "cyan" if now.is_running else "dim")


def _in_words(now: "Now") -> str:
    """What is being done, or was when it was last heard of."""
    done = f"{now.done:,.0f}{f' of {now.total:,.0f}' if now.total else ''} {now.unit}"
    parts = [f"{now.what}: {done}"]
    if now.rate is not None:
        parts.append(f"{now.rate:,.1f} {now.unit}/s")
    if now.left is not None:
        parts.append(f"{_span(now.left)} left")
    parts += [now.note] if now.note else []
    parts.append(f"{now.memory / 1e9:.1f} GB of memory")
    if now.gpu is not None:
        parts.append(f"{now.gpu / 1e9:.1f} GB of the GPU")
    told, ago = ", ".join(parts), _span(max(time.time() - now.updated, 0))
    if now.is_running is False:
        return f"not running; when last heard of, {ago} ago: {told}"
    where = "" if now.is_running else f" on {now.host}"
    return f"now{where} ({ago} ago): {told}"


def _span(seconds: float) -> str:
    """A time in words.

    >>> _span(59.6), _span(3600), _span(7290)
    ('1 min', '1 h', '2 h 2 min')
    """
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return " ".join([f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0))


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
