"""`fusellm plan`: what a run will take, on one screen."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fusellm.cli import options
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.draw import SITUATIONS, right, table
from fusellm.recipe_file import folder_of_run, open_recipe
from fusellm.text_table import duration, size

if TYPE_CHECKING:
    from fusellm.store.planned import MemoryParts, PlannedPair, RunPlan


def plan(
    recipe: options.RecipeOrRun,
    out: options.Out = None,
    changes: options.Set = options.NO_CHANGES,
    nproc: options.Nproc = 1,
    shapes: Annotated[
        bool,
        typer.Option(
            "--shapes",
            help="Load no weights and try nothing: parameters, operations and memory by the "
            "models' configurations, for another machine than this one.",
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Say what a run will take, before any large work: time, disk, memory, operations.

    Each stage does a little of its work by its own code, a minute or two in all, and is timed: some
    blocks are read by every source and fused, and both trainings take some steps. So it is also
    seen whether the sources know more of this text than the target, without which fusion has
    nothing to give. Suites are not planned. The report puts the plan beside what the run then took.
    """
    given = open_recipe(recipe, changes)
    from fusellm.run import Run

    folder, progress = out or folder_of_run(recipe, given), Terminal(STDERR)
    run = Run(given, folder, progress=progress, trust_remote_code=trust_remote_code)
    made = run.plan(processes=nproc, shapes_only=shapes)
    if as_json:
        print(json_text(made.as_dict()))
        return
    STDOUT.show(*_screen(made))


def _screen(plan: "RunPlan") -> Iterator[Table | Text]:
    yield _stages(plan)
    text = ", ".join(f"{part.replace('_', '-')} {_bytes(most)}" for part, most in plan.text.items())
    counted = "as it is cut" if plan.is_cut else "by the recipe's budgets"
    yield Text(f"Text: {text}, {counted}. While it trains {_bytes(plan.checkpoints)} more on disk.")
    yield Text("\nMemory of each device, by shapes", _TITLE)
    yield _memory(plan)
    if plan.pairs:
        said = "% of the target's positions by situation, and bits per byte saved"
        yield Text(f"\nTried: {said}", _TITLE)
        yield _pairs(plan)
    for caution in plan.cautions:
        yield Text.assemble(("▲ ", "yellow"), caution)


def _stages(plan: "RunPlan") -> Table:
    tried = plan.seconds is not None
    columns = ["tokens", "operations", "on disk", *(["time", "memory"] if tried else [])]
    shown = table(
        "stage", *map(right, columns), title=f"{plan.recipe}, on {plan.hardware}", show_footer=False
    )
    for stage in plan.stages:
        cells = [_count(stage.tokens), _count(stage.operations), _bytes(stage.bytes)]
        if tried:
            cells += [_time(stage.seconds), _bytes(stage.memory)]
        shown.add_row(stage.name, *cells)
    operations = sum(stage.operations or 0 for stage in plan.stages)
    whole = ["", _count(operations), _bytes(plan.bytes)]
    if tried:
        whole += [f"{_time(plan.seconds)}{'' if plan.is_whole else ' +'}", ""]
    shown.add_section()
    shown.add_row(Text("all", "bold"), *(Text(cell, "bold") for cell in whole))
    return shown


_TITLE = "bold italic"  # as tables have them, which would break one that is wider than they are
_PARTS = ("weights", "gradients", "optimizer", "activations", "objective")


def _memory(plan: "RunPlan") -> Table:
    name_column = Column("", no_wrap=True)
    columns = map(right, (*_PARTS, "most"))
    shown = table(name_column, *columns, padding=(0, 1, 0, 0))
    for name, parts in plan.memory.items():
        label = f"{name}, over {parts.sharded}" if parts.sharded > 1 else name
        shown.add_row(label, *(_bytes(_part(parts, one)) for one in _PARTS), _bytes(parts.total))
    return shown


def _part(parts: "MemoryParts", name: str) -> float | None:
    own: float = getattr(parts, name)
    return own or None


def _pairs(plan: "RunPlan") -> Table:
    cases = [right(case, header_style=look.style) for case, look in SITUATIONS.items()]
    names = (Column(one, no_wrap=True) for one in ("source", "text"))
    shown = table(*names, *cases, right("saved"), padding=(0, 1, 0, 0))
    for name, pair in plan.pairs.items():
        label = name
        for domain, shares in pair.situations.items():
            cells = [f"{100 * shares[case]:.1f}" for case in SITUATIONS]
            shown.add_row(label, domain, *cells, _better(pair, domain))
            label = ""
    return shown


def _better(pair: "PlannedPair", domain: str) -> Text:
    better = pair.better_by.get(domain)
    if better is None:
        return Text("–")
    interval = pair.interval.get(domain)
    said = f"{better:+.2f}" if interval is None else f"{better:+.2f} ±{_half(interval):.2f}"
    return Text(said, "green" if better > 0 else "red")


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def _count(amount: float | None) -> str:
    """A number for people, to three digits.

    >>> _count(1_234_567.0), _count(None)
    ('1.23 M', '–')
    """
    if amount is None:
        return "–"
    power = 0
    while amount >= 999.5 and power + 1 < len(_UNITS):
        amount, power = amount / 1000, power + 1
    return f"{amount:.3g} {_UNITS[power]}".strip()


def _bytes(amount: float | None) -> str:
    return "–" if amount is None else size(amount)


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)
