"""What the records of an evaluation say: a table, and one sentence."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from fusellm.config import RESERVED_NAMES
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.compare.tables import IN_WORDS, Cell, Table, number, span, title_of
from fusellm.evaluation.text.intervals import BITS_PER_BYTE, Record
from fusellm.text_table import counted

COLUMNS = tuple(field.name for field in fields(Record))
DIFFERENCE = "fused-clm"

_DIGITS, _DIGITS_OF_DIFFERENCES = 3, 4


@dataclass(frozen=True)
class Row:
    """One model's results, in the order of the tasks; None where it has none."""

    model: str
    title: str
    cells: list[Cell | None]


class Results:
    """The records in bits per byte (lower is better), by model and task."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._by_place = {(r.model, r.task): r for r in records if r.metric == BITS_PER_BYTE}
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
        return counted(numbers, "documents")

    def rows(self) -> list[Row]:
        """One row a model, sources first; the difference fused − CLM, if any, is the last."""
        least = {
            task: min((r.value for m in self.models if (r := self.get(m, task))), default=None)
            for task in self.tasks
        }
        titles = {model: title_of(model) for model in self.models}
        if self.has_difference:
            titles[DIFFERENCE] = title_of(*DIFFERENCE.split("-"))
        return [
            Row(
                model,
                title,
                [
                    _cell(self.get(model, task), None if model == DIFFERENCE else least[task])
                    for task in self.tasks
                ],
            )
            for model, title in titles.items()
        ]

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
        sources = [r for name in self.sources if (r := self.get(name, fused.task))]
        target = self.get("target", fused.task)
        own = f"{_value(fused)} bits per byte"
        if not sources:
            return True, f"has {own}"
        best = min(sources, key=lambda record: record.value)
        good = fused.value < best.value
        other = best.model if len(sources) == 1 else f"{best.model}, the best of them,"
        relation = "is better" if good else "is not better"
        sentence = f"{relation} than every source ({own}; {other} has {_value(best)})"
        if target is not None and not fused.value < target.value:
            but = ", but not" if good else ", nor"
            sentence += f"{but} better than the target before training ({_value(target)})"
            good = False
        return good, sentence

    def _against_clm(self, task: str, good: bool) -> str:
        record = self.get(DIFFERENCE, task)
        if record is None:
            return "; it has not been compared with a CLM baseline"
        if record.sign is None:
            return "; its difference to the CLM baseline has no interval to judge by"
        joint = ", and" if good == (record.sign > 0) else ", but"
        relation = f"is {IN_WORDS[record.sign]} than the CLM baseline"
        if not record.sign:
            relation = "no difference from the CLM baseline is shown"
        return (
            f"{joint} {relation} (fused − CLM: {_value(record)}, 95 % interval {_interval(record)})"
        )


def results_table(records: Iterable[Record]) -> Table:
    """The records in bits per byte as text: models down, tasks across, `*` at a column's best."""
    results = Results(records)
    rows = [[row.title, *(str(cell or "–") for cell in row.cells)] for row in results.rows()]
    return Table(["bits per byte", *results.tasks], rows)


def verdict(records: Iterable[Record]) -> str:
    """One sentence on whether fusion helped; the one at the head of the report."""
    return Results(records).verdict()


def _digits(record: Record) -> int:
    return _DIGITS_OF_DIFFERENCES if record.model == DIFFERENCE else _DIGITS


def _value(record: Record) -> str:
    return number(record.value, _digits(record))


def _interval(record: Record) -> str:
    is_above = record.model != DIFFERENCE and (record.low or 0) >= 0
    return span(record.low, record.high, _digits(record), "–" if is_above else " to ")


def _cell(record: Record | None, least: float | None) -> Cell | None:
    if record is None:
        return None
    words = ""
    if record.model == DIFFERENCE:
        words = "no interval" if record.sign is None else IN_WORDS[record.sign]
    return Cell(_value(record), _interval(record), record.value == least, words)
