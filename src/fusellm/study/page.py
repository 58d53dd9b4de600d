"""A study's page, in Markdown: what was compared, the tables, and how each row is repeated."""

from collections.abc import Iterator, Mapping, Sequence

from fusellm.evaluation.compare.statistics import LEVEL, MEAN
from fusellm.study.plan import Study
from fusellm.study.results import ArmDifference, ArmResult, Interval, StudyResults

_POWERS = {12: "10¹²", 15: "10¹⁵", 18: "10¹⁸", 21: "10²¹", 24: "10²⁴"}
_SHOWN_FASTER = 1.05


def study_page(study: Study, results: StudyResults) -> str:
    """All that a study found, for people; it has no timings, so that it is the same each time."""
    sections = [
        ("", _head(study, results)),
        ("Bits per byte of held-out text", _measured(results)),
        (f"Differences from {results.reference}, and others", _differences(results)),
        ("What it cost", _costs(results)),
        ("While it was trained", _curves(results)),
        *([("Learning rates", _rates(results))] if results.tried else []),
        ("How to repeat a row", _commands(study)),
    ]
    return "\n".join(
        "\n".join([*([f"## {title}", ""] if title else []), *lines, ""])
        for title, lines in sections
    )


def verdict(difference: ArmDifference) -> str:
    """What the mean over domains says of one arm beside another.

    >>> value = {"mean": Interval(-0.02, -0.03, -0.01)}
    >>> verdict(ArmDifference("fused", "clm", value, [-0.02], 0.001, 0.004))
    'better'
    >>> verdict(ArmDifference("fused", "clm", value, [-0.02], 0.04, 0.08))
    'no difference shown'
    """
    if difference.corrected is None:
        return "too few documents"
    if difference.corrected > LEVEL:
        return "no difference shown"
    return "better" if difference.by_task[MEAN].value < 0 else "worse"


def _head(study: Study, results: StudyResults) -> Iterator[str]:
    base = study.base
    sources = ", ".join(f"{_code(s.name)} ({_code(s.model)})" for s in base.sources)
    documents = ", ".join(
        f"{count} of {task}" for task, count in results.documents.items() if task != MEAN
    )
    yield f"# Study {_code(results.name)}"
    yield ""
    yield f"- Target {_code(base.target.model)}; sources {sources}."
    yield f"- Held-out documents: {documents}. Lower bits per byte are better."
    yield f"- Seeds of the trainings: {', '.join(map(str, results.seeds))}."
    yield (
        "- Intervals are of 95 %, over documents, of the mean over seeds; ± is the standard "
        "deviation over seeds. All models are measured over the same bytes."
    )


def _measured(results: StudyResults) -> list[str]:
    tasks = list(results.documents)
    rows = [
        [_code(f"{name} (as it is)" if name == "target" else f"source {name}"), "", *_cells(by)]
        for name, by in results.untrained.items()
    ]
    for name, arm in results.arms.items():
        spread = "" if arm.deviation is None else f"± {arm.deviation:.4f}"
        rows.append([_code(name), spread, *_cells(arm.by_task)])
    return _table(["", "over seeds", *tasks], rows)


def _cells(by_task: Mapping[str, Interval]) -> list[str]:
    return [interval(value) for value in by_task.values()]


def _differences(results: StudyResults) -> list[str]:
    tasks = list(results.documents)
    rows = [
        [
            f"{_code(one.arm)} − {_code(one.other)}",
            *_cells(one.by_task),
            ", ".join(_signed(value) for value in one.by_seed),
            "" if one.corrected is None else f"{one.corrected:.4f}",
            verdict(one),
        ]
        for one in results.differences
    ]
    told = (
        "Paired by document. p is of the mean, corrected by Holm's rule over all "
        f"{len(results.differences)} comparisons."
    )
    return [told, "", *_table(["", *tasks, "mean by seed", "p", ""], rows)]


def _costs(results: StudyResults) -> list[str]:
    most = max(arm.compute.total for arm in results.arms.values())
    power = max((p for p in _POWERS if most >= 10**p), default=min(_POWERS))
    rows = []
    for name, arm in results.arms.items():
        spent = arm.compute.training, arm.compute.reading, arm.compute.total
        known = arm.curve and name != results.reference
        reached = _reached(arm, results) if known else ""
        cells = [f"{operations / 10**power:.2f}" for operations in spent]
        rows.append([_code(name), f"{arm.tokens:,}", f"{arm.steps:,}", *cells, reached])
    goal = f"tokens to {results.reference}'s last validation"
    told = (
        f"{_POWERS[power]} floating-point operations: 2 for each parameter and token that is read, "
        "6 for each that is trained on. A merge has what its parts have cost, an ensemble what the "
        "arm in its target's place has; what it computes when it is used is not counted."
    )
    head = ["", "tokens", "steps", "training", "reading sources", "together", goal]
    return [told, "", *_table(head, rows)]


def _reached(arm: ArmResult, results: StudyResults) -> str:
    if arm.tokens_to_reference is None:
        return "never"
    times = results.arms[results.reference].curve[-1][0] / max(arm.tokens_to_reference, 1)
    fewer = f" ({times:.1f} times fewer)" if times > _SHOWN_FASTER else ""
    return f"{arm.tokens_to_reference:,}{fewer}"


def _curves(results: StudyResults) -> list[str]:
    rows = [
        [_code(name), " → ".join(f"{value:.4f} ({tokens:,})" for tokens, value in arm.curve)]
        for name, arm in results.arms.items()
        if arm.curve
    ]
    return _table(["", "bits per byte of validation text (after so many tokens)"], rows)


def _rates(results: StudyResults) -> list[str]:
    rates = list(dict.fromkeys(rate for by_rate in results.tried.values() for rate in by_rate))
    rows = []
    for name, by_rate in results.tried.items():
        least = min(by_rate.values())
        cells = {rate: f"{value:.4f}" for rate, value in by_rate.items()}
        cells |= {rate: f"**{cells[rate]}**" for rate, value in by_rate.items() if value == least}
        rows.append([_code(name), *(cells.get(rate, "") for rate in rates)])
    told = "Bits per byte of validation text, with the first seed; the least is taken."
    return [told, "", *_table(["", *rates], rows)]


def _commands(study: Study) -> list[str]:
    file = study.file.name
    return [f"    fusellm study {file} --arm {name}" for name in study.chosen]


def interval(value: Interval) -> str:
    """A value with its interval.

    >>> interval(Interval(1.5, 1.25, 1.75))
    '1.5000 (1.2500 to 1.7500)'
    """
    if value.low is None or value.high is None:
        return _signed(value.value)
    return f"{_signed(value.value)} ({_signed(value.low)} to {_signed(value.high)})"


def _signed(value: float) -> str:
    return f"{value:.4f}".replace("-", "−")


def _code(text: str) -> str:
    """A name that its author chose, as it is: nothing of it is read as Markdown."""
    return f"`{text.replace('`', '')}`".replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
