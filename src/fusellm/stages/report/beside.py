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
from fusellm.stages.report.charts import SERIES, Trace, colour_of_series, line_chart
from fusellm.stages.report.page import Key, Panel, environment
from fusellm.stages.report.reading import LOSSES, ReportedRun, read_recipe, read_run
from fusellm.store.blocks import digest_of_blocks, read_part
from fusellm.store.files import alone_in, make_folder, write_text
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import CLM, FUSED, RECIPE, SUITES, stage_folders

_PAGES = {
    FUSED: ("Fused models", "Bits per byte on the held-out documents. Lower is better."),
    CLM: ("CLM baselines", "The same target, trained on the same text without fusion."),
    DIFFERENCE: (
        "Fused − CLM",
        "Below 0 fusion has gained. Each is paired document by document, within its run.",
    ),
}
_CAPTIONS = {"clm_loss": "training, L_CLM", "fusion_loss": "training, L_Fusion"}
_LONGEST_VALUE = 60


@dataclass(frozen=True, eq=False)
class RunBeside:
    """One of several runs.

    Attributes:
        title: that tells it from the others.
        recipe: its settings, by the keys that lead to them.
        text: what it was measured on; equal for the same bytes.
        dashed: whether its colour is another run's too.
    """

    title: str
    read: ReportedRun
    recipe: Mapping[str, Any]
    text: tuple[str, str]
    colour: str
    dashed: bool

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
    _require_own(folder)
    read = list(_read(runs))
    tasks = list(dict.fromkeys(task for one in read for task in one.results.tasks))
    body = {one.title: [record.as_dict() for record in one.read.records] for one in read}
    keys = [Key(f"run {n}: {r.title}", r.colour, dashed=r.dashed) for n, r in enumerate(read, 1)]
    page = (
        environment()
        .get_template("beside.html.jinja")
        .render(
            runs=read,
            tasks=tasks,
            verdict=_verdict(read),
            tables=list(_tables(read, tasks)),
            charts=list(_charts(read)),
            keys=keys,
            differences=list(_differences(read)),
            seconds=list(_seconds(read)),
            has_suites=any((run / SUITES).exists() for run in runs),
        )
    )
    make_folder(folder)
    with alone_in(folder):
        write_text(folder / "index.html", page)
        text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
        write_text(folder / "results.json", text)


def _require_own(folder: Path) -> None:
    """Check that the page would stand in no run.

    Raises:
        StoreError: it would, among files that have the same names.
    """
    above = (folder.absolute(), *folder.absolute().parents)
    run = next((path for path in above if (path / RECIPE).exists()), None)
    if run is not None or (folder / MANIFEST).exists():
        raise StoreError(f"{run or folder} is a run; give the page a folder of its own")


def _read(runs: Sequence[Path]) -> Iterator[RunBeside]:
    if len(set(map(Path.resolve, runs))) < len(runs):
        raise StoreError("a run is given twice; name each once")
    for number, (run, title) in enumerate(zip(runs, _titles(runs), strict=True)):
        list(stage_folders(run))  # a folder that is no run, or has rounds, is told
        recipe, read = read_recipe(run), read_run(run, alone=False)
        blocks = read_part(StageFolder(run / "corpus"), "held_out")
        measured = {key: read.notes.get(key) for key in ("bytes", "blocks_left_out")}
        text = digest_of_blocks(blocks), json.dumps(measured, sort_keys=True, default=str)
        flat = dict(_flat(recipe)) if isinstance(recipe, dict) else {}
        colour, dashed = colour_of_series(number), number >= SERIES
        yield RunBeside(title, read, flat, text, colour, dashed)


def _titles(runs: Sequence[Path]) -> list[str]:
    """What tells runs apart: as few of the last parts of their paths as do."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(own[-count:]) for own in parts]
        if len(set(titles)) == len(runs):
            break
    return [title.encode("utf-8", "replace").decode() for title in titles]


def _verdict(runs: Sequence[RunBeside]) -> str:
    """Which of the fused models costs least, if all were measured on one text."""
    if len({one.text for one in runs}) > 1:
        return (
            "Not all of them were measured on the same bytes, by their text or by what all models "
            "of a run can read: compare only those that were."
        )
    for task in (MEAN, *runs[0].results.tasks):
        records = {one.title: one.results.get(FUSED, task) for one in runs}
        values = {title: one.value for title, one in records.items() if one is not None}
        if len(values) == len(runs):
            least = min(values.values())
            best = [title for title, value in values.items() if value == least]
            place = "on the mean over the domains" if task == MEAN else f"on {task}"
            models = "model" if len(best) == 1 else "models"
            cost = "costs" if len(best) == 1 else "cost"
            return (
                f"The fused {models} of {' and '.join(best)} {cost} least {place}, {least:.3f} "
                "bits per byte. Whether that is more than chance, a study says, document by "
                "document."
            )
    return "Not all of them have a fused model that was measured."


def _tables(runs: Sequence[RunBeside], tasks: Sequence[str]) -> Iterator[TableOfRuns]:
    texts = list(dict.fromkeys(one.text for one in runs))
    for model, (title, about) in _PAGES.items():
        rows = []
        for one in runs:
            by_model = {row.model: row for row in one.results.rows()}
            if model not in by_model:
                continue
            own = dict(zip(one.results.tasks, by_model[model].cells, strict=True))
            note = f"text {texts.index(one.text) + 1}" if len(texts) > 1 else ""
            rows.append(RowOfRun(one.title, note, [own.get(task) for task in tasks]))
        if rows:
            yield TableOfRuns(model, title, about, rows)


def _charts(runs: Sequence[RunBeside]) -> Iterator[Panel]:
    """Curves, each by its run's number: there is no room for names beside them."""
    logs = {
        number: (one, one.read.logs[FUSED])
        for number, one in enumerate(runs, 1)
        if FUSED in one.read.logs
    }
    bits, nats = "bits per byte", "nats per token"
    panels = [
        ("validation, mean", bits, {n: log.validation.get(MEAN) for n, (_, log) in logs.items()})
    ]
    for loss in LOSSES:
        curves = {n: log.losses.get(loss) for n, (_, log) in logs.items()}
        panels.append((_CAPTIONS[loss], nats, curves))
    for caption, unit, curves in panels:
        traces = [
            Trace(f"run {n}", run.colour, curve.tokens, curve.values, run.dashed, unit == bits)
            for n, curve in curves.items()
            for run in [logs[n][0]]
            if curve is not None and curve.tokens
        ]
        if traces:
            yield Panel(caption, line_chart(f"{caption}, {unit}", unit, traces), unit)


def _differences(runs: Sequence[RunBeside]) -> Iterator[tuple[str, list[str]]]:
    """Settings in which recipes differ, with each run's value, without folders if that tells."""
    for setting in dict.fromkeys(name for one in runs for name in one.recipe):
        values = [one.recipe.get(setting) for one in runs]
        if setting == "name" or len(set(map(repr, values))) == 1:
            continue
        shown = [_shown(without_folders(value)) for value in values]
        if len(set(shown)) < len(set(map(repr, values))):
            shown = [_shown(value, from_end=True) for value in values]
        yield setting, shown


def _flat(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{before}.{name}" if before else str(name))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{before}.{number}")
    else:
        yield before, value


def _shown(value: Any, from_end: bool = False) -> str:
    said = "–" if value is None else str(value)
    if len(said) <= _LONGEST_VALUE:
        return said
    return f"…{said[-_LONGEST_VALUE:]}" if from_end else f"{said[:_LONGEST_VALUE]}…"


def _seconds(runs: Sequence[RunBeside]) -> Iterator[tuple[str, list[float | None]]]:
    for stage in dict.fromkeys(name for one in runs for name in one.read.seconds):
        yield stage, [one.read.seconds.get(stage) for one in runs]
