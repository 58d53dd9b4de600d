"""Models compared over the tasks of a suite, document by document.

Scores are in points: percent where an answer is right or wrong, BLEU, or the task's own unit. D
documents; the samples of one document are one of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusellm.errors import EvaluationError
from fusellm.evaluation.compare import statistics
from fusellm.evaluation.compare.joined import BLEU, SCORE, WHOLE, JoinedTask, join
from fusellm.evaluation.compare.records import TaskRecord
from fusellm.evaluation.compare.statistics import MEAN, Tested
from fusellm.evaluation.harness.lm_eval import extra
from fusellm.store.identity import digest

PAIRS = (("fused", "target"), ("fused", "clm"))
RESAMPLINGS = 10_000

_LAST = ("target", "clm", "fused")
_LONGEST_SETTING = 40

Pair = tuple[str, str]


@dataclass(frozen=True)
class NotRun:
    """A task without scores, of one model or (`model` empty) of all, and why."""

    suite: str
    task: str
    reason: str
    model: str = ""


@dataclass(frozen=True)
class Difference:
    """Score of a − score of b, paired by document.

    Attributes:
        value: in points.
        low, high: of its 95 % interval, which has 0 in it where p is above 0.05; not corrected for
            the number of tasks. None if there are too few documents for any.
        p: chance of a difference at least as large between models that are equally good.
        corrected_p: p by Holm over the tasks of the suite; the mean's is its p, being one question.
        least_p: the least corrected p that so many documents, in so many tasks, could have given.
        relative: in percent of b's score, as the paper prints gains; None if b's is not above 0.
        could_show: the least true difference, in points, that is shown in 4 of 5 such samples if no
            other task of the suite differs; None if none, or if too little is known to say.
    """

    a: str
    b: str
    value: float
    low: float | None
    high: float | None
    p: float
    corrected_p: float
    least_p: float
    relative: float | None
    could_show: float | None

    @property
    def pair(self) -> Pair:
        """(a, b)."""
        return self.a, self.b

    @property
    def name(self) -> str:
        """`a-b`."""
        return f"{self.a}-{self.b}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), where there are both."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def sign(self) -> int:
        """1 if a is better, −1 if worse, 0 if no difference is shown."""
        if self.corrected_p > statistics.LEVEL:
            return 0
        return 1 if self.value > 0 else -1


@dataclass(frozen=True)
class Line:
    """One task, or the unweighted mean over tasks.

    Attributes:
        unit: `%`, `pass@k`, `BLEU`, or `score` for numbers that are not of 0 to 1.
        n: documents.
        scores: in points, of each model that ran the task.
        truncated: documents whose prompt had to be cut, of each such model.
    """

    task: str
    unit: str
    n: int
    scores: Mapping[str, float]
    truncated: Mapping[str, int]
    differences: tuple[Difference, ...]

    @property
    def in_points(self) -> bool:
        """Whether scores are of 0 to 100."""
        return self.unit != SCORE


@dataclass(frozen=True)
class Comparison:
    """The models over one suite.

    Attributes:
        models: sources first; then target, clm and fused, where they are.
        mean: over the tasks that all models ran; None where there are not two.
        protocol: digest of all that decides whether scores can be compared.
        settings: short settings of the protocol that all tasks have in common.
        notes: what a reader must know of the numbers, a sentence each.
    """

    suite: str
    models: tuple[str, ...]
    tasks: tuple[Line, ...]
    mean: Line | None
    not_run: tuple[NotRun, ...]
    protocol: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """The tasks, and their mean if there is one."""
        return self.tasks if self.mean is None else (*self.tasks, self.mean)


@dataclass(frozen=True)
class Rules:
    """How models are compared.

    Attributes:
        pairs: (a, b) for which a − b is given, where both models are there.
        resamplings: subsets of documents that are drawn for every test and interval.
        pass_at: k of pass@k, for tasks with several samples of a document.
    """

    pairs: Sequence[Pair] = PAIRS
    resamplings: int = RESAMPLINGS
    seed: int = 0
    pass_at: int = 1


def compare(
    records: Mapping[str, Iterable[TaskRecord]],
    rules: Rules | None = None,
    not_run: Iterable[NotRun] = (),
) -> list[Comparison]:
    """One comparison for each suite, in the order in which suites first come.

    Args:
        records: of each model, by the name that it has in the table.
        not_run: what could not be run, and why. A task that only some models have is added to it,
            and left out of means; it is never a 0.

    Raises:
        EvaluationError: models were measured by different protocols, on different data or on
            different documents; a score is no number; or the extra `eval` is not installed.
    """
    rules = rules or Rules()
    not_run = list(not_run)
    by_suite: dict[str, dict[str, dict[str, TaskRecord]]] = {}
    for model, of_model in records.items():
        for record in of_model:
            header = record.header
            tasks = by_suite.setdefault(header.suite, {}).setdefault(header.task, {})
            if model in tasks:
                raise EvaluationError(
                    f"{header.suite}/{header.task}: {model!r} has two records; remove one"
                )
            tasks[model] = record
    for entry in not_run:
        by_suite.setdefault(entry.suite, {})
    return [
        _compare_suite(
            suite,
            found,
            rules,
            _with_missing(suite, found, records, [n for n in not_run if n.suite == suite]),
        )
        for suite, found in by_suite.items()
    ]


def _compare_suite(
    suite: str,
    records: Mapping[str, Mapping[str, TaskRecord]],
    rules: Rules,
    not_run: Sequence[NotRun],
) -> Comparison:
    """Compare over the tasks of one suite: `records` by task and model."""
    found = [
        join(with_answers, rules.pass_at)
        for of_task in records.values()
        if (with_answers := {model: r for model, r in of_task.items() if r.answers})
    ]
    present = dict.fromkeys(model for task in found for model in task.values)
    models = (
        *(model for model in present if model not in _LAST),
        *(model for model in _LAST if model in present),
    )
    pairs = [(a, b) for a, b in rules.pairs if a in present and b in present]
    shared = {pair: [t for t in found if set(pair) <= t.values.keys()] for pair in pairs}
    tested = {
        (task.name, pair): _tested(task, pair, len(tasks), rules)
        for pair, tasks in shared.items()
        for task in tasks
    }
    lines = _corrected([_line(task, models, pairs, tested) for task in found], pairs)
    averaged = [t for t in found if t.unit != SCORE and len(t.values) == len(models)]
    mean = _mean(suite, lines, averaged, pairs, tested, rules) if len(averaged) > 1 else None
    return Comparison(
        suite,
        models,
        tuple(lines),
        mean,
        tuple(not_run),
        digest(sorted(task.header.compared_by for task in found)),
        _common_settings([task.header.protocol for task in found]),
        tuple(_notes(found, averaged, models)),
    )


def _with_missing(
    suite: str,
    records: Mapping[str, Mapping[str, TaskRecord]],
    models: Iterable[str],
    known: Sequence[NotRun],
) -> list[NotRun]:
    """What is known not to have been run, and every other task that a model has no answers to."""
    told = {(entry.task, entry.model) for entry in known}
    return [
        *known,
        *(
            NotRun(suite, task, "no answers" if model in of_task else "no record", model)
            for task, of_task in records.items()
            for model in models
            if not (model in of_task and of_task[model].answers)
            and not told & {(task, model), (task, "")}
        ),
    ]


def _tested(task: JoinedTask, pair: Pair, tasks: int, rules: Rules) -> Tested:
    """A pair on one of so many tasks; every pair sees the same subsets of documents."""
    a, b = (task.values[model] for model in pair)
    rng = _rng(rules, f"{task.header.suite}/{task.name}")
    right = {SCORE: 1.0, BLEU: None}.get(task.unit, WHOLE)
    return statistics.compare(a, b, rules.resamplings, rng, tasks, right)


def _rng(rules: Rules, place: str) -> np.random.Generator:
    return np.random.default_rng([rules.seed, *place.encode()])


def _line(
    task: JoinedTask,
    models: Iterable[str],
    pairs: Iterable[Pair],
    tested: Mapping[tuple[str, Pair], Tested],
) -> Line:
    return Line(
        task.name,
        task.unit,
        task.documents,
        {model: task.score(model) for model in models if model in task.values},
        {model: task.truncated[model] for model in models if model in task.values},
        tuple(
            _difference(pair, [task.score(model) for model in pair], tested[task.name, pair])
            for pair in pairs
            if (task.name, pair) in tested
        ),
    )


def _difference(pair: Pair, scores: Sequence[float], tested: Tested) -> Difference:
    of_a, of_b = scores
    relative = 100 * (of_a - of_b) / of_b if of_b > 0 else None
    p = tested.estimate.p
    low, high = tested.estimate.interval or (None, None)
    return Difference(
        *pair, of_a - of_b, low, high, p, p, tested.least_p, relative, tested.could_show
    )


def _corrected(lines: Sequence[Line], pairs: Iterable[Pair]) -> list[Line]:
    """The lines with p values corrected over the tasks, pair by pair."""
    corrected: dict[tuple[str, Pair], Difference] = {}
    for pair in pairs:
        found = {ln.task: one for ln in lines for one in ln.differences if one.pair == pair}
        p_values = statistics.holm([one.p for one in found.values()])
        least = statistics.holm([one.least_p for one in found.values()])
        for (task, one), p, least_p in zip(found.items(), p_values, least, strict=True):
            corrected[task, pair] = replace(one, corrected_p=p, least_p=least_p)
    return [
        replace(line, differences=tuple(corrected[line.task, one.pair] for one in line.differences))
        for line in lines
    ]


def _mean(
    suite: str,
    lines: Sequence[Line],
    averaged: Sequence[JoinedTask],
    pairs: Iterable[Pair],
    tested: Mapping[tuple[str, Pair], Tested],
    rules: Rules,
) -> Line:
    """Every task counts the same; its documents are drawn within it."""
    names = [task.name for task in averaged]
    units = {task.unit for task in averaged}
    used = [line for line in lines if line.task in names]
    scores = {
        model: float(np.mean([line.scores[model] for line in used])) for model in used[0].scores
    }
    differences = []
    for a, b in pairs:
        parts = [tested[name, (a, b)].estimate for name in names]
        found = statistics.compare_means(parts, rules.resamplings, _rng(rules, suite))
        differences.append(_difference((a, b), [scores[a], scores[b]], found))
    return Line(
        MEAN,
        units.pop() if len(units) == 1 else "points",
        sum(line.n for line in used),
        scores,
        {model: sum(line.truncated[model] for line in used) for model in scores},
        tuple(differences),
    )


def _common_settings(protocols: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Short settings of equal value in all of them."""
    first, *others = protocols or [{}]
    return {
        key: value
        for key, value in first.items()
        if isinstance(value, str | int | float)
        and len(str(value)) <= _LONGEST_SETTING
        and all(key in other and other[key] == value for other in others)
    }


def _notes(
    found: Sequence[JoinedTask], averaged: Sequence[JoinedTask], models: Sequence[str]
) -> list[str]:
    notes = []
    left_out = [task for task in found if task not in averaged]
    if left_out and len(found) > 1:
        whole = f"the mean is over {len(averaged)} of {len(found)} tasks"
        reasons = "; ".join(
            f"{task.name} is not on a scale of 0 to 100"
            if task.unit == SCORE
            else f"{task.name} was not run for "
            + ", ".join(model for model in models if model not in task.values)
            for task in left_out
        )
        notes.append(f"{whole if len(averaged) > 1 else 'there is no mean'}: {reasons}")
    notes += [
        f"{task.name}: {task.prompts_differ:,} prompts were not the same for all models"
        for task in found
        if task.prompts_differ
    ]
    if any(task.unit == BLEU for task in found):
        version = extra("sacrebleu").__version__
        notes.append(f"BLEU is that of sacrebleu {version} with its defaults")
    return notes
