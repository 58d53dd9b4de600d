"""What an evaluation found, as tables in the width that there is."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from fusellm.cli import draw

if TYPE_CHECKING:
    from fusellm.evaluation.compare.tables import Table
    from fusellm.evaluation.measure import SuiteResults
    from fusellm.evaluation.results import EvaluationResults

_WIDE = 10_000


def show(results: "EvaluationResults", console: Console) -> None:
    """Print the tables, each with what its reader needs to know."""
    if results.records:
        from fusellm.evaluation.text.results import results_table

        title = "Held-out bits per byte (lower is better), 95 % intervals"
        console.print(_table(results_table(results.records), title))
        if results.compared_on is not None:
            console.print(Text(results.compared_on, style="dim"))
        console.print(Text(results.verdict))
    for one in results.suites:
        for part in _suite(one, console):
            console.print(part)


def show_rounds(rounds: "Sequence[EvaluationResults]", console: Console) -> None:
    """Print what came of each round, on the same held-out text."""
    shown = draw.table("round", ">target before", ">CLM", ">fused", title="Over the rounds")
    for number, results in enumerate(rounds, start=1):
        values = {one.model: one.value for one in results.records if one.task == "mean"}
        told = (values.get(model) for model in ("target", "clm", "fused"))
        shown.add_row(str(number), *("–" if one is None else f"{one:.4f}" for one in told))
    console.print(shown)


def _suite(one: "SuiteResults", console: Console) -> Iterator[RenderableType]:
    from fusellm.evaluation.compare.published import MODELS, SOURCE
    from fusellm.evaluation.compare.tables import footer, published_table, table, verdict
    from fusellm.evaluation.suites.catalogue import named

    comparison = one.comparison
    suite = named(comparison.suite)
    yield Text(f"\n{comparison.suite}{f': {suite.about}' if suite else ''}", style="bold")
    models = len(comparison.models)
    if comparison.tasks:
        shown = table(comparison)
        last = len(shown.columns) - 1
        parts = [*range(1, models + 1), last], range(models + 1, last)
        yield from _in_width(shown, parts, console)
    yield Text("\n".join(footer(comparison)), style="dim")
    yield Text(verdict(comparison))
    reference = published_table(comparison.suite) if one.published else None
    if reference is not None:
        yield Text(f"\nPublished by the paper's authors ({SOURCE}):")
        models, last = len(MODELS), len(reference.columns) - 1
        yield from _in_width(
            reference, (range(1, models + 1), range(models + 1, last + 1)), console
        )


def _in_width(
    shown: "Table", parts: Iterable[Sequence[int]], console: Console
) -> Iterator[RichTable]:
    """A table whole if the terminal has room, else in several.

    Args:
        parts: numbers of the columns besides the first that are to stand together.
    """
    from fusellm.evaluation.compare.tables import Table

    def of(numbers: Sequence[int]) -> RichTable:
        columns = [shown.columns[n] for n in numbers]
        return _table(Table(columns, [[row[n] for n in numbers] for row in shown.rows]))

    whole = of(range(len(shown.columns)))
    if _width(whole, console) <= console.width:
        yield whole
        return
    for part in parts:
        numbers = [0]
        for n in part:
            if len(numbers) > 1 and _width(of([*numbers, n]), console) > console.width:
                yield of(numbers)
                numbers = [0]
            numbers.append(n)
        if len(numbers) > 1:
            yield of(numbers)


def _width(shown: RichTable, console: Console) -> int:
    """In characters, where there is room for all."""
    return Measurement.get(console, console.options.update(max_width=_WIDE), shown).maximum


def _table(shown: "Table", title: str | None = None) -> RichTable:
    """A table whose first column is of names."""
    names, *columns = shown.columns
    right = (Column(column, justify="right", overflow="fold") for column in columns)
    drawn = draw.table(Column(names, overflow="fold"), *right, title=title)
    for row in shown.rows:
        drawn.add_row(*row)
    return drawn
