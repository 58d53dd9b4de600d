"""What the records of an evaluation say: a table, and one sentence."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fusellm.config import RESERVED_NAMES
from fusellm.errors import StoreError
from fusellm.evaluation.compare import tables
from fusellm.evaluation.compare.comparison import Comparison
from fusellm.evaluation.compare.tables import Table, title_of, title_of_model
from fusellm.evaluation.text.intervals import BITS_PER_BYTE, MEAN, Record

COLUMNS = tuple(field.name for field in fields(Record))
DIFFERENCE = "fused-clm"

_IN_WORDS = {-1: "better", 0: "no difference shown", 1: "worse"}


@dataclass(frozen=True)
class Cell:
    """One result: its texts, whether it is its column's best, and what a difference means."""

    value: str
    interval: str = ""
    best: bool = False
    words: str = ""


@dataclass(frozen=True)
class Row:
    """One model's results, in the order of the tasks; None where it has none."""

    model: str
    title: str
    cells: list[Cell | None]


class Results:
    """The records in bits per byte (lower is better), by model and task."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        parsed = [_parse(record) for record in records]
        self._by_place = {(r.model, r.task): r for r in parsed if r.metric == BITS_PER_BYTE}
        models = dict.fromkeys(model for model, _ in self._by_place)
        tasks = dict.fromkeys(task for _, task in self._by_place)
        self.sources = [model for model in models if model not in RESERVED_NAMES]
        self.models = self.sources + [
            model for model in ("target", "clm", "fused") if model in models
        ]
        self.tasks = [MEAN] * (MEAN in tasks) + [task for task in tasks if task != MEAN]
        self.has_difference = DIFFERENCE in models

    def get(self, model: str, task: str) -> Record | None:
        """The record of a model on a task, if there is one."""
        return self._by_place.get((model, task))

    def documents(self, task: str) -> str:
        """Over how many documents the task's intervals are."""
        counts = sorted({r.n for (_, name), r in self._by_place.items() if name == task})
        numbers = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        return f"{numbers} document{'' if counts == [1] else 's'}"

    def rows(self) -> list[Row]:
        """One row a model, sources first; the difference fused − CLM, if any, is the last."""
        least = {
            task: min((r.value for m in self.models if (r := self.get(m, task))), default=None)
            for task in self.tasks
        }
        rows = []
        for model in self.models:
            cells = [_cell(self.get(model, task), 3, least[task]) for task in self.tasks]
            rows.append(Row(model, title_of_model(model), cells))
        if self.has_difference:
            cells = [_cell(self.get(DIFFERENCE, task), 4, None) for task in self.tasks]
            rows.append(Row(DIFFERENCE, title_of(*DIFFERENCE.split("-")), cells))
        return rows

    def verdict(self) -> str:
        """One sentence: fused against the sources by value, against CLM by the interval."""
        task = MEAN if MEAN in self.tasks else self.tasks[0] if len(self.tasks) == 1 else None
        if task is None:
            return "The records have no mean over the domains to judge by."
        fused = self.get("fused", task)
        if fused is None:
            return "The records have no result of a fused model."
        place = "On the mean over the domains" if task == MEAN else f"On {task}"
        good, sentence = self._against_sources(fused)
        return f"{place}, the fused model {sentence}{self._against_clm(task, good)}."

    def _against_sources(self, fused: Record) -> tuple[bool, str]:
        own = f"{number(fused.value)} bits per byte"
        found = [r for name in self.sources if (r := self.get(name, fused.task))]
        target = self.get("target", fused.task)
        if not found:
            return True, f"has {own}"
        best = min(found, key=lambda record: record.value)
        good = fused.value < best.value
        relation = "is better than every source" if good else "is not better than every source"
        other = best.model if len(found) == 1 else f"{best.model}, the best of them,"
        sentence = f"{relation} ({own}; {other} has {number(best.value)})"
        if target is not None and not fused.value < target.value:
            good = False
            sentence += (
                f", nor better than the target before training ({number(target.value)})"
                if fused.value >= best.value
                else f", but not better than the target before training ({number(target.value)})"
            )
        return good, sentence

    def _against_clm(self, task: str, good: bool) -> str:
        record = self.get(DIFFERENCE, task)
        if record is None:
            return "; it has not been compared with a CLM baseline"
        sign = record.sign
        if sign is None:
            return "; its difference to the CLM baseline has no interval to judge by"
        joint = ", and" if good == (sign < 0) else ", but"
        relation = {
            -1: "is better than the CLM baseline",
            0: "no difference from the CLM baseline is shown",
            1: "is worse than the CLM baseline",
        }[sign]
        return (
            f"{joint} {relation} (fused − CLM: {number(record.value, 4)}, "
            f"95 % interval {_interval(record, 4)})"
        )


def suite_records(comparison: Comparison) -> list[dict[str, Any]]:
    """A suite's scores and differences as records, their task being `<suite>/<task>`."""
    found = []
    for line in comparison.lines:
        scores = [Record(m, "", "", value, None, None, 0) for m, value in line.scores.items()]
        differences = [
            Record(one.name, "", "", one.value, one.low, one.high, 0) for one in line.differences
        ]
        found += [
            replace(
                record, task=f"{comparison.suite}/{line.task}", metric=line.unit, n=line.n
            ).as_dict()
            for record in (*scores, *differences)
        ]
    return found


def results_table(records: Iterable[Mapping[str, Any]]) -> Table:
    """The records in bits per byte as text: models down, tasks across, `*` at a column's best.

    Raises:
        StoreError: a record lacks a field.
    """
    results = Results(records)
    rows = [[row.title, *(_plain(cell) for cell in row.cells)] for row in results.rows()]
    return Table(["bits per byte", *results.tasks], rows)


def verdict(records: Iterable[Mapping[str, Any]]) -> str:
    """One sentence on whether fusion helped; the one at the head of the report."""
    return Results(records).verdict()


def number(value: float, digits: int = 3) -> str:
    """Bits per byte, or a share, as text."""
    return tables.number(value, digits)


def _interval(record: Record, digits: int) -> str:
    if record.low is None or record.high is None:
        return ""
    joint = "–" if record.low >= 0 and record.model != DIFFERENCE else " to "
    return f"{number(record.low, digits)}{joint}{number(record.high, digits)}"


def _cell(record: Record | None, digits: int, least: float | None) -> Cell | None:
    if record is None:
        return None
    words = ""
    if record.model == DIFFERENCE:
        words = "no interval" if record.sign is None else _IN_WORDS[record.sign]
    value = number(record.value, digits)
    return Cell(value, _interval(record, digits), record.value == least, words)


def _plain(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    interval = f" ({cell.interval})" if cell.interval else ""
    words = f" {cell.words}" if cell.words else ""
    return f"{cell.value}{interval}{words}{' *' if cell.best else ''}"


def _parse(record: Mapping[str, Any]) -> Record:
    try:
        return Record(
            model=str(record["model"]),
            task=str(record["task"]),
            metric=str(record["metric"]),
            value=float(record["value"]),
            low=_finite(record["low"]),
            high=_finite(record["high"]),
            n=int(record["n"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"a result has no usable {', '.join(COLUMNS)}: {record!r} ({error!r}); "
            "`fusellm evaluate RUN --redo` measures again"
        ) from None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
