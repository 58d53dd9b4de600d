"""Several runs side by side on one page: results, curves, where recipes differ, time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusellm.errors import StoreError
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.compare.tables import Cell
from fusellm.evaluation.text.results import DIFFERENCE, Results
from fusellm.models.cards import without_folders
from fusellm.stages.report.charts import Trace, colour_of_series, line_chart
from fusellm.stages.report.page import Key, Panel, environment
from fusellm.stages.report.reading import LOSSES, ReportedRun, read_recipe, read_run
from fusellm.store.files import alone_in, make_folder, write_text
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import CLM, FUSED, RECIPE, require_no_rounds
from fusellm.store.tables import shard_names

_PAGES = {
    FUSED: ("Fused models", "Bits per byte on the held-out documents. Lower is better."),
    CLM: ("CLM baselines", "The same target, trained on the same text without fusion."),
    DIFFERENCE: (
        "Fused − CLM",
        "Below 0 fusion has gained. Each is paired document by document, within its run.",
    ),
}
_CAPTIONS = {"clm_loss": "training, L_CLM", "fusion_loss": "training, L_Fusion"}
_LONGEST_VALUE, _BESIDE_A_CURVE = 60, 12


@dataclass(frozen=True, eq=False)
class RunBeside:
    """One of several runs.

    Attributes:
        title: that tells it from the others.
        held_out: digests of the text that it was measured on; equal for equal text.
    """

    title: str
    read: ReportedRun
    recipe: Mapping[str, Any]
    held_out: tuple[str, ...]
    colour: str

    @property
    def results(self) -> Results:
        """What was measured in it."""
        return Results(self.read.records)


@dataclass(frozen=True)
class RowOfRun:
    """A run's results; None where it has none. `note` says which text they are of."""

    title: str
    note: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class TableOfRuns:
    """What runs have for one model."""

    anchor: str
    title: str
    about: str
    rows: list[RowOfRun]


def write_beside(runs: Sequence[Path], folder: Path) -> None:
    """Write `index.html` and `results.json` of several runs into a folder.

    Raises:
        StoreError: a folder is no finished run, or the page cannot be written.
    """
    read = list(_read(runs))
    tasks = list(dict.fromkeys(task for one in read for task in one.results.tasks))
    body = {one.title: [record.as_dict() for record in one.read.records] for one in read}
    page = (
        environment()
        .get_template("beside.html.jinja")
        .render(
            runs=read,
            tasks=tasks,
            verdict=_verdict(read),
            tables=list(_tables(read, tasks)),
            charts=list(_charts(read)),
            keys=[Key(one.title, one.colour) for one in read],
            differences=list(_differences(read)),
            seconds=list(_seconds(read)),
        )
    )
    if (folder / RECIPE).exists():
        raise StoreError(f"{folder} is a run; give the page a folder of its own")
    make_folder(folder)
    with alone_in(folder):
        write_text(folder / "index.html", page)
        text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
        write_text(folder / "results.json", text)


def _read(runs: Sequence[Path]) -> Iterator[RunBeside]:
    """Runs by their folders' names, or where these are the same by their paths."""
    names = [run.resolve().name for run in runs]
    if len(set(map(Path.resolve, runs))) < len(runs):
        raise StoreError("a run is given twice; name each once")
    for number, run in enumerate(runs):
        require_no_rounds(run)
        recipe = read_recipe(run)
        corpus = StageFolder(run / "corpus")
        held_out = [corpus.shards[name]["sha256"] for name in shard_names(corpus, "held_out-")]
        title = names[number] if names.count(names[number]) == 1 else str(run)
        yield RunBeside(
            title,
            read_run(run),
            recipe if isinstance(recipe, dict) else {},
            tuple(held_out),
            colour_of_series(number),
        )


def _verdict(runs: Sequence[RunBeside]) -> str:
    """Which of the fused models costs least, if all were measured on one text."""
    if len({one.held_out for one in runs}) > 1:
        return "Not all of them were measured on the same text: compare only those that were."
    for task in (MEAN, *runs[0].results.tasks):
        records = {one.title: one.results.get(FUSED, task) for one in runs}
        values = {title: one.value for title, one in records.items() if one is not None}
        if len(values) == len(runs):
            best = min(values, key=lambda title: values[title])
            place = "on the mean over the domains" if task == MEAN else f"on {task}"
            return (
                f"The fused model of {best} costs least {place}, {values[best]:.3f} bits per byte. "
                "Whether that is more than chance, a study says, document by document."
            )
    return "Not all of them have a fused model that was measured."


def _tables(runs: Sequence[RunBeside], tasks: Sequence[str]) -> Iterator[TableOfRuns]:
    texts = list(dict.fromkeys(one.held_out for one in runs))
    for model, (title, about) in _PAGES.items():
        rows = []
        for one in runs:
            by_model = {row.model: row for row in one.results.rows()}
            if model not in by_model:
                continue
            own = dict(zip(one.results.tasks, by_model[model].cells, strict=True))
            note = f"text {texts.index(one.held_out) + 1}" if len(texts) > 1 else ""
            rows.append(RowOfRun(one.title, note, [own.get(task) for task in tasks]))
        if rows:
            yield TableOfRuns(model, title, about, rows)


def _charts(runs: Sequence[RunBeside]) -> Iterator[Panel]:
    logs = {one.title: (one.colour, one.read.logs[FUSED]) for one in runs if FUSED in one.read.logs}
    validation = {
        title: (colour, log.validation.get(MEAN)) for title, (colour, log) in logs.items()
    }
    panels = {("validation, mean", "bits per byte"): validation}
    for loss in LOSSES:
        of_loss = {title: (colour, log.losses.get(loss)) for title, (colour, log) in logs.items()}
        panels[_CAPTIONS[loss], "nats per token"] = of_loss
    for (caption, unit), curves in panels.items():
        traces = [
            Trace(_short(title), colour, curve.tokens, curve.values, dots=unit == "bits per byte")
            for title, (colour, curve) in curves.items()
            if curve is not None and curve.tokens
        ]
        if traces:
            yield Panel(caption, line_chart(f"{caption}, {unit}", unit, traces), unit)


def _short(title: str) -> str:
    """A title that has room beside a curve.

    >>> _short("a-run-with-a-long-name")
    'a-run-with-…'
    """
    return title if len(title) <= _BESIDE_A_CURVE else f"{title[: _BESIDE_A_CURVE - 1]}…"


def _differences(runs: Sequence[RunBeside]) -> Iterator[tuple[str, list[str]]]:
    """Settings in which recipes differ, with each run's value."""
    flat = [dict(_flat(without_folders(dict(one.recipe)))) for one in runs]
    for setting in dict.fromkeys(name for one in flat for name in one):
        values = [_shown(one.get(setting)) for one in flat]
        if setting != "name" and len(set(values)) > 1:
            yield setting, values


def _flat(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{before}.{name}" if before else str(name))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{before}.{number}")
    else:
        yield before, value


def _shown(value: Any) -> str:
    said = "–" if value is None else str(value)
    return said if len(said) <= _LONGEST_VALUE else f"{said[:_LONGEST_VALUE]}…"


def _seconds(runs: Sequence[RunBeside]) -> Iterator[tuple[str, list[float | None]]]:
    for stage in dict.fromkeys(name for one in runs for name in one.read.seconds):
        yield stage, [one.read.seconds.get(stage) for one in runs]
