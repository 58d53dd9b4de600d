"""The report's one page: what is shown of a run, and the template filled with it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusellm.alignment.positions import MEANINGS
from fusellm.config import RESERVED_NAMES
from fusellm.evaluation.compare.published import SOURCE
from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.compare.tables import (
    Table,
    compared_on,
    footer,
    number,
    pairs_of,
    published_table,
    table,
    title_of,
    verdict,
)
from fusellm.evaluation.measure import SuiteResults
from fusellm.evaluation.suites.catalogue import named
from fusellm.evaluation.text.results import Results
from fusellm.stages.report.charts import (
    StackedBar,
    Trace,
    amount,
    bar_chart,
    colour_of_series,
    colour_of_situation,
    differences_chart,
    line_chart,
    percent,
)
from fusellm.stages.report.reading import Curve, DomainCounts, Log, ReportedRun
from fusellm.store.continuations import ContinuedTexts
from fusellm.store.externalized import TARGET
from fusellm.store.run_folder import CLM, FUSED
from fusellm.text_table import duration, size

_NO_SOURCE = "no source"
_EXAMPLE_CHARACTERS = 160
_TEXT_CHARACTERS = 700

_STYLES = {"fused": ("fused", False), "clm": ("CLM", True)}
_LOSSES = {"clm_loss": "training, L_CLM", "fusion_loss": "training, L_Fusion"}


@dataclass(frozen=True)
class Panel:
    """One chart with its caption."""

    caption: str
    svg: str
    unit: str = ""


@dataclass(frozen=True)
class Key:
    """One entry of a legend; `meaning` may be empty."""

    name: str
    colour: str
    meaning: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class SuiteSection:
    """A suite as it is shown; a cell's second line says what a difference shows."""

    name: str
    about: str
    verdict: str
    tables: list[Table]
    charts: list[Panel]
    notes: list[str]


@dataclass(frozen=True)
class ShownBeginning:
    """A beginning, and what stands behind it: in truth, and by each model."""

    domain: str
    beginning: str
    cells: list["ShownText"]


@dataclass(frozen=True)
class ShownText:
    """One continuation; `kind` is that of a CSS class, `missing` why there is none."""

    title: str
    kind: str
    text: str
    missing: str | None = None


def render(run: ReportedRun) -> str:
    """The page as HTML; everything that comes from the run is escaped.

    Returns:
        A document that needs no other file, no network and no script.
    """
    results = Results(run.records)
    colours = {name: colour_of_series(index) for index, name in enumerate(run.sources)}
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            run=run,
            verdict=_unbroken(results.verdict()),
            tasks=[(task, results.documents(task)) for task in results.tasks],
            rows=results.rows(),
            compared=compared_on(run.notes),
            notes=list(_flat({k: v for k, v in run.notes.items() if not k.startswith("blocks")})),
            suites=[_section(one) for one in run.suites],
            samples=_samples(run.continuations),
            training=_training_panels(run.logs),
            validation=_domain_panels(run.logs),
            trained=[Key(_STYLES[k][0], k, dashed=_STYLES[k][1]) for k in run.logs],
            wins=_wins_chart(run.domains, colours),
            wins_keys=[Key(s, colour) for s, colour in colours.items()] + [Key(_NO_SOURCE, "none")],
            situations=_situation_panels(run.domains, run.sources),
            situation_keys=[
                Key(name, colour_of_situation(name), f"{meaning}.".replace("'", "’"))
                for name, meaning in MEANINGS.items()
            ],
        )
    )


def environment(folder: Path = Path(__file__).parent) -> Environment:
    """Templates of pages, in a folder; what comes from a run is escaped in all of them."""
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "duration": duration, "excerpt": _excerpt, "size": size}
    made.filters["lines"] = _lines
    return made


def _samples(continuations: ContinuedTexts | None) -> list[ShownBeginning]:
    """Beginnings with all models side by side, the target before training first, fused last."""
    if continuations is None:
        return []
    models = continuations.models
    own = [name for name in (CLM, FUSED) if name in models]
    sources = [name for name in models if name not in RESERVED_NAMES]
    names = [*([TARGET] if TARGET in models else []), *sources, *own]
    samples = []
    for n, beginning in enumerate(continuations.beginnings):
        cells = [ShownText("the document itself", "truth", beginning.truth)]
        for name in names:
            one = models[name].texts[n]
            missing = one.missing if one.text else one.missing or "it ends here"
            kind = FUSED if name == FUSED else ""
            cells.append(ShownText(title_of(name), kind, one.text, missing))
        samples.append(ShownBeginning(beginning.domain, beginning.shown, cells))
    return samples


def _section(one: SuiteResults) -> SuiteSection:
    comparison = one.comparison
    suite = named(comparison.suite)
    charts = [
        Panel(title_of(*pair), svg, "points")
        for pair in pairs_of(comparison)
        if (svg := differences_chart(comparison, pair))
    ]
    reference = published_table(comparison.suite) if one.published else None
    shown = [table(comparison)] if comparison.tasks else []
    return SuiteSection(
        comparison.suite,
        f"{suite.about[:1].upper()}{suite.about[1:]}." if suite else "A task of lm_eval.",
        _unbroken(verdict(comparison)),
        [*shown, *([reference] if reference else [])],
        charts,
        [*footer(comparison), *([f"Published figures: {SOURCE}."] if reference else [])],
    )


def _training_panels(logs: Mapping[str, Log]) -> list[Panel]:
    """The mean of the validation, then the losses."""
    panels = _validation(logs, "validation, mean", MEAN)
    for loss, caption in _LOSSES.items():
        curves = {kind: log.losses.get(loss) for kind, log in logs.items()}
        panels += _panel(caption, "nats per token", curves)
    return panels


def _domain_panels(logs: Mapping[str, Log]) -> list[Panel]:
    """The validation of each domain; none where the mean of one domain says the same."""
    tasks = list(dict.fromkeys(task for log in logs.values() for task in log.validation))
    if MEAN in tasks and len(tasks) == 2:
        return []
    return [panel for task in tasks if task != MEAN for panel in _validation(logs, task, task)]


def _validation(logs: Mapping[str, Log], caption: str, task: str) -> list[Panel]:
    curves = {kind: log.validation.get(task) for kind, log in logs.items()}
    return _panel(caption, "bits per byte", curves, dots=True)


def _panel(
    caption: str, unit: str, curves: Mapping[str, Curve | None], dots: bool = False
) -> list[Panel]:
    traces = []
    for kind, curve in curves.items():
        if curve is not None and curve.tokens:
            name, dashed = _STYLES[kind]
            traces.append(Trace(name, kind, curve.tokens, curve.values, dashed, dots))
    if not traces:
        return []
    # `fused` is drawn last, over the baseline.
    return [Panel(caption, line_chart(f"{caption}, {unit}", unit, traces[::-1]), unit)]


def _wins_chart(domains: Mapping[str, DomainCounts], colours: Mapping[str, str]) -> str:
    bars = [
        StackedBar(
            name,
            f"{amount(domain.positions)} positions",
            {**domain.wins, _NO_SOURCE: domain.without_source},
        )
        for name, domain in domains.items()
    ]
    label = "Share of target positions that each source won, per domain"
    return bar_chart(label, bars, {**colours, _NO_SOURCE: "none"}) if bars else ""


def _situation_panels(domains: Mapping[str, DomainCounts], sources: Iterable[str]) -> list[Panel]:
    colours = {situation: colour_of_situation(situation) for situation in MEANINGS}
    panels = []
    for source in sources:
        bars = []
        for name, domain in domains.items():
            if source in domain.sources:
                counts = domain.sources[source].situations
                total = sum(counts.values())
                aligned = 1 - counts.get("unaligned", 0) / total if total else 0.0
                bars.append(StackedBar(name, f"{percent(aligned)} aligned", counts))
        if bars:
            label = f"Situations of token alignment of {source}"
            panels.append(Panel(source, bar_chart(label, bars, colours)))
    return panels


def _unbroken(text: str) -> str:
    """The text with no line end inside `fused − CLM` or `95 %`."""
    return text.replace(" − ", "\u00a0−\u00a0").replace(" %", "\u00a0%")


def _excerpt(text: str) -> str:
    """The beginning of a text on one line, whatever signs it has."""
    flat = text.replace("\n", "⏎").replace("\t", "⇥")
    flat = "".join(sign if sign.isprintable() else "�" for sign in flat)
    return flat if len(flat) <= _EXAMPLE_CHARACTERS else flat[: _EXAMPLE_CHARACTERS - 1] + "…"


def _lines(text: str) -> str:
    """The beginning of a text with its lines, and what cannot be seen as its escape.

    >>> _lines("a\\n\\tb\\x1b[0m\\u202e")
    'a\\n\\tb\\\\x1b[0m\\\\u202e'
    """
    cut = text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 1] + "…"
    return "".join(
        sign if sign in "\n\t" or sign.isprintable() else ascii(sign)[1:-1] for sign in cut
    )


def _flat(notes: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in notes.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, f"{value:,}"
        else:
            yield name, str(value)
