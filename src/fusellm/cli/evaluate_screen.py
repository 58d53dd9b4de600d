"""What an evaluation found, for people, as JSON, and as a file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from fusellm.errors import StoreError

if TYPE_CHECKING:
    from fusellm.evaluation.compare.tables import Table
    from fusellm.evaluation.measure import SuiteResults
    from fusellm.evaluation.results import EvaluationResults

ENDINGS = (".md", ".csv", ".json")
_WIDE = 10_000


def results_of(
    run: Path, suites: Sequence[str] | None = None, bits_per_byte: bool = True
) -> "EvaluationResults":
    """The results in a run's folder; of all suites that were measured if `suites` is None."""
    from fusellm.stages.evaluate import read_results

    return read_results(run, suites, bits_per_byte)


def as_object(results: "EvaluationResults") -> Any:
    """For JSON: the list of bits per byte if there is nothing else, or an object with both."""
    from fusellm.evaluation.compare.tables import as_json

    records = [record.as_dict() for record in results.records]
    if records and not results.suites:
        return records
    own = {"lm": records} if records else {}
    return own | as_json([one.comparison for one in results.suites], results.published)


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
    """A table whose cells are shown as they are, brackets too."""
    drawn = RichTable(title=title and Text(title), box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(shown.columns):
        drawn.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for row in shown.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def require_savable(paths: Sequence[Path]) -> None:
    """Check before any work that results can be saved in these files.

    Raises:
        StoreError: a name does not end as it must, its folder is not there, or it cannot be
            written.
    """
    from fusellm.store.files import require_writable

    for path in paths:
        if path.suffix not in ENDINGS:
            raise StoreError(
                f"--save {path} is no name for a table: end it in {', '.join(ENDINGS)}"
            )
        if not path.absolute().parent.is_dir():
            raise StoreError(f"--save {path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise StoreError(f"--save {path} is a folder; name a file")
        require_writable(path.absolute().parent)


def save(results: "EvaluationResults", path: Path) -> None:
    """Write results as Markdown, CSV or JSON, as the file's name says."""
    from fusellm.evaluation.compare.tables import csv_text, markdown, markdown_section
    from fusellm.evaluation.text.results import results_table
    from fusellm.store.files import write_text

    comparisons = [one.comparison for one in results.suites]
    if path.suffix == ".json":
        text = json.dumps(as_object(results), ensure_ascii=False, indent=1) + "\n"
    elif path.suffix == ".csv":
        rows = [record.as_dict() for record in results.records]
        text = csv_text(comparisons, results.published, rows)
    else:
        text = markdown(comparisons, results.published)
        if results.records:
            notes = [*filter(None, [results.compared_on]), results.verdict]
            text = f"{markdown_section('lm', results_table(results.records), notes)}\n{text}"
    write_text(path, text)
