"""A comparison as a table for the terminal, as Markdown, as CSV and as JSON."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from fusellm.evaluation.compare.comparison import Comparison, Difference, Line, NotRun
from fusellm.evaluation.compare.published import MODELS, PUBLISHED, SOURCE
from fusellm.evaluation.compare.statistics import LEVEL
from fusellm.text_table import counted

_TITLES = {"target": "target before training", "clm": "CLM baseline"}
_SHORT = {"clm": "CLM"}
IN_WORDS = {-1: "worse", 0: "no difference shown", 1: "better"}
_BEGINS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
_DIGITS, _DIGITS_OF_SCORES = 2, 4
_DIGEST = 12

CSV_COLUMNS = (
    *("suite", "task", "model", "metric", "value", "low", "high", "p", "corrected_p", "sign"),
    *("relative_percent", "could_show", "n", "truncated"),
)


@dataclass(frozen=True)
class Table:
    """Cells as plain text of one or two lines; the first column is of names."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Cell:
    """One result: its texts, whether it is the best one, and what a difference means."""

    value: str
    interval: str = ""
    best: bool = False
    words: str = ""

    def __str__(self) -> str:
        interval = f" ({self.interval})" if self.interval else ""
        return f"{self.value}{interval}{self.words and f' {self.words}'}{' *' * self.best}"


def table(comparison: Comparison) -> Table:
    """Tasks down, models and differences across; `*` at a row's best score."""
    units = {line.unit for line in comparison.lines}
    one_unit = len(units) == 1
    differences = pairs_of(comparison)
    head = f"{comparison.suite}, {units.pop()}" if one_unit else comparison.suite
    return Table(
        [
            _printable(head),
            *(_printable(title_of(model)) for model in comparison.models),
            *(_printable(title_of(a, b)) for a, b in differences),
            "documents",
        ],
        [
            [
                _printable(line.task if one_unit else f"{line.task}, {line.unit}"),
                *(_score(line, model) for model in comparison.models),
                *(_difference(line, pair) for pair in differences),
                f"{line.n:,}",
            ]
            for line in comparison.lines
        ],
    )


def published_table(suite: str) -> Table | None:
    """The paper's figures for a suite, if it has any."""
    if suite not in PUBLISHED:
        return None
    return Table(
        [f"{suite}, published", *MODELS, "fused − target", "fused − CLM"],
        [
            [
                task,
                *map(number, points),
                *(
                    f"{number(points[-1] - of)}, {_percent(100 * (points[-1] / of - 1))}"
                    for of in points[2:4]
                ),
            ]
            for task, points in PUBLISHED[suite].items()
        ],
    )


def footer(comparison: Comparison) -> list[str]:
    """What a reader needs beside the table: a sentence each, plain text."""
    settings = ", ".join(f"{key} {value}" for key, value in comparison.settings.items())
    documents, tasks = sum(line.n for line in comparison.tasks), len(comparison.tasks)
    cut = {
        model: sum(line.truncated.get(model, 0) for line in comparison.tasks)
        for model in comparison.models
    }
    cut_words = ", ".join(f"{model} {count:,}" for model, count in cut.items() if count)
    notes = [
        f"Protocol {comparison.protocol[:_DIGEST]}{f': {settings}' if settings else ''}.",
        f"{counted(f'{documents:,}', 'documents')} in {counted(f'{tasks:,}', 'tasks')}.",
        f"Documents whose prompt was cut to fit the context: {cut_words or 'none'}.",
    ]
    if pairs_of(comparison):
        notes.append(
            "Differences are paired by document; a 95 % interval is of the line alone. Better and "
            "worse are judged at the 5 % level, after Holm's correction over the tasks. (≥ x would "
            "be): the least true difference that is so shown in 4 of 5 samples like this one, if "
            "no other task differs."
        )
    if comparison.not_run:
        notes.append(f"Not run: {'; '.join(_not_run(comparison.not_run))}.")
    notes += [f"{note[:1].upper()}{note[1:]}." for note in comparison.notes]
    return [_printable(line) for line in notes]


def verdict(comparison: Comparison) -> str:
    """One sentence on what the differences show, on the mean if there is one."""
    if not comparison.lines:
        return f"Nothing of {comparison.suite} was run."
    line = comparison.lines[-1]
    place = f"the mean over {comparison.suite}" if line is comparison.mean else line.task
    if comparison.mean is None and len(comparison.tasks) > 1:
        return f"{comparison.suite} has no mean to judge by."
    if not line.differences:
        return f"On {place}, there are no two models to compare."
    told = "; ".join(
        f"{title_of(one.a, one.b)} is {_in_words(one, _digits(line))}".replace("\n", ": ")
        for one in line.differences
    )
    return _printable(f"On {place}, {told}.")


def markdown(comparisons: Iterable[Comparison], published: bool = False) -> str:
    """A section for each suite: table and notes.

    Args:
        published: whether the paper's figures follow, where it has some.
    """
    parts = []
    for comparison in comparisons:
        shown = table(comparison) if comparison.tasks else None
        parts.append(markdown_section(comparison.suite, shown, footer(comparison)))
        reference = published_table(comparison.suite) if published else None
        if reference:
            parts.append(markdown_table(reference))
            parts.append(f"Published by the paper's authors: {_escaped(SOURCE)}.\n")
    return "\n".join(parts)


def markdown_section(suite: str, shown: Table | None, notes: Iterable[str]) -> str:
    """A suite's table and notes below its name."""
    listed = "".join(f"- {_escaped(note)}\n" for note in notes)
    parts = [f"## {_escaped(suite)}\n", *([markdown_table(shown)] if shown else []), listed]
    return "\n".join(parts)


def markdown_table(shown: Table) -> str:
    """A table as Markdown; two lines of a cell are parted by `<br>`."""
    ruler = ["---", *("---:" for _ in shown.columns[1:])]
    escaped = [
        ["<br>".join(_escaped(line) for line in cell.split("\n")) for cell in row]
        for row in (shown.columns, *shown.rows)
    ]
    lines = [escaped[0], ruler, *escaped[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(
    comparisons: Iterable[Comparison],
    published: bool = False,
    bits_per_byte: Iterable[Mapping[str, Any]] = (),
) -> str:
    """One row for each score and each difference, numbers unrounded; columns `CSV_COLUMNS`.

    Text that a spreadsheet would take for a formula is preceded by an apostrophe.

    Args:
        bits_per_byte: records of them, which come first, as the suite `lm`.
    """
    written = io.StringIO()
    writer = csv.DictWriter(written, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    rows = chain(
        ({"suite": "lm", **record} for record in bits_per_byte),
        *(flat_rows(comparison, published) for comparison in comparisons),
    )
    for row in rows:
        writer.writerow(
            {key: _safe(one) if isinstance(one, str) else one for key, one in row.items()}
        )
    return written.getvalue()


def flat_rows(comparison: Comparison, published: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each score and each difference, numbers unrounded; keys are of `CSV_COLUMNS`."""
    suite = {"suite": comparison.suite}
    for line in comparison.lines:
        place = suite | {"task": line.task, "metric": line.unit, "n": line.n}
        for model, value in line.scores.items():
            yield place | {"model": model, "value": value, "truncated": line.truncated[model]}
        for one in line.differences:
            told = {key: value for key, value in asdict(one).items() if key in CSV_COLUMNS}
            yield (
                place
                | told
                | {"model": one.name, "sign": one.sign, "relative_percent": one.relative}
            )
    for task, points in PUBLISHED.get(comparison.suite, {}).items() if published else ():
        for model, value in zip(MODELS, points, strict=True):
            yield suite | {"task": task, "model": model, "metric": "published", "value": value}


def as_json(comparisons: Iterable[Comparison], published: bool = False) -> dict[str, Any]:
    """Plain values, for JSON."""
    comparisons = list(comparisons)
    document: dict[str, Any] = {"suites": [_plain(comparison) for comparison in comparisons]}
    if published:
        document["published"] = {
            "source": SOURCE,
            "suites": {
                suite: {
                    task: dict(zip(MODELS, points, strict=True))
                    for task, points in PUBLISHED[suite].items()
                }
                for suite in (comparison.suite for comparison in comparisons)
                if suite in PUBLISHED
            },
        }
    return document


def number(value: float, digits: int = _DIGITS) -> str:
    """A value with a true minus sign, and never a negative zero.

    >>> number(-1.3), number(-0.001), number(41.754)
    ('−1.30', '0.00', '41.75')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def span(low: float | None, high: float | None, digits: int = _DIGITS, joint: str = " to ") -> str:
    """An interval's ends; empty where there is none."""
    return "" if low is None or high is None else joint.join(number(v, digits) for v in (low, high))


def with_interval(one: Difference, digits: int = _DIGITS) -> str:
    """A difference and, if it has one, its interval."""
    return str(Cell(number(one.value, digits), span(one.low, one.high, digits)))


def pairs_of(comparison: Comparison) -> list[tuple[str, str]]:
    """The (a, b) of all differences a − b, in their order."""
    return list(dict.fromkeys(one.pair for ln in comparison.lines for one in ln.differences))


def title_of(model: str, other: str = "") -> str:
    """A model's name as a reader is shown it, or that of a difference.

    >>> title_of("clm"), title_of("fused", "clm")
    ('CLM baseline', 'fused − CLM')
    """
    if other:
        return f"{_SHORT.get(model, model)} − {_SHORT.get(other, other)}"
    return _TITLES.get(model, model)


def _plain(comparison: Comparison) -> dict[str, Any]:
    plain = asdict(comparison)
    lines = [*plain["tasks"], *([plain["mean"]] if plain["mean"] else [])]
    for line, of_line in zip(comparison.lines, lines, strict=True):
        for one, of_one in zip(line.differences, of_line["differences"], strict=True):
            of_one["sign"] = one.sign
    return plain


def _digits(line: Line) -> int:
    return _DIGITS if line.in_points else _DIGITS_OF_SCORES


def _score(line: Line, model: str) -> str:
    if model not in line.scores:
        return "–"
    best = len(set(line.scores.values())) > 1 and line.scores[model] == max(line.scores.values())
    return str(Cell(number(line.scores[model], _digits(line)), best=best))


def _difference(line: Line, pair: tuple[str, str]) -> str:
    return next(
        (_in_words(one, _digits(line)) for one in line.differences if one.pair == pair), "–"
    )


def _in_words(one: Difference, digits: int) -> str:
    """The difference with its interval and relative gain, and on a second line what it shows."""
    relative = "" if one.relative is None else f", {_percent(one.relative)}"
    return f"{with_interval(one, digits)}{relative}\n{_shown(one, digits)}"


def _shown(one: Difference, digits: int) -> str:
    if one.sign:
        return IN_WORDS[one.sign]
    if one.least_p > LEVEL:
        return "too few documents to show any difference"
    after = " after correction" if one.p <= LEVEL else ""
    least = "" if one.could_show is None else f" (≥ {number(one.could_show, digits - 1)} would be)"
    return f"{IN_WORDS[0]}{after}{least}"


def _percent(value: float) -> str:
    """A relative gain with its sign, as the paper prints it."""
    text = number(value)
    return f"{'' if text.startswith('−') else '+'}{text} %"


def _not_run(entries: Sequence[NotRun]) -> list[str]:
    """Tasks together that were not run for one reason."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        tasks.setdefault((entry.model, entry.reason), []).append(entry.task)
    return [
        f"{', '.join(of)} ({f'{model}: ' if model else ''}{reason})"
        for (model, reason), of in tasks.items()
    ]


def _printable(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too.

    >>> print(_escaped("a|b *c* word_sorting _d_"))
    a\\|b \\*c\\* word_sorting \\_d\\_
    """
    return _MARKDOWN.sub(lambda sign: "\\" + sign[0], _printable(text))


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(_BEGINS_A_FORMULA) else text


def compared_on(notes: Mapping[str, Any]) -> str | None:
    """How much of the held-out text bits per byte are over; None where notes do not say.

    >>> compared_on({"blocks": 60, "blocks_left_out": 51, "blocks_changed": {"small": 51}})
    'Compared on 9 of 60 held-out blocks; blocks that a model cannot read: small 51.'
    """
    if "blocks" not in notes:
        return None
    blocks, changed = notes["blocks"], notes["blocks_changed"]
    said = f"Compared on {blocks - notes['blocks_left_out']:,} of {blocks:,} held-out blocks"
    each = ", ".join(f"{name} {count:,}" for name, count in changed.items())
    return f"{said}; blocks that a model cannot read: {each}." if each else f"{said}."
