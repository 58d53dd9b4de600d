"""Models compared over the tasks of a suite, document by document.

Scores are in points: percent where an answer is right or wrong, BLEU, or the task's own unit. D
documents; the samples of one document are one of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from fusellm.errors import EvaluationError
from fusellm.evaluation.compare import statistics
from fusellm.evaluation.compare.bleu import Translations
from fusellm.evaluation.compare.records import Answer, Header, TaskRecord
from fusellm.evaluation.compare.statistics import MEAN, Tested, pass_at_k
from fusellm.evaluation.harness.lm_eval import extra
from fusellm.store.identity import digest

PAIRS = (("fused", "target"), ("fused", "clm"))
RESAMPLINGS = 10_000

PERCENT, BLEU, SCORE = "%", "BLEU", "score"

WHOLE = 100.0
"""Points of a right answer."""

_MOST_TOLD = 4
_LONGEST_TOLD = 80

Key = tuple[str, int, int]
"""Document, sample, and how often both have come before: a task may ask the same thing twice."""

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


@dataclass(frozen=True)
class JoinedTask:
    """One task, answered by several models.

    Attributes:
        header: of one of them; they agree on all that scores depend on, but for the model.
        unit: `%`, `pass@k`, `BLEU`, or `score` for numbers that are not all of 0 to 1.
        values: [D] points of each model, in the order of the documents' digests; their mean is its
            score.
        truncated: documents whose prompt had to be cut, of each model.
        prompts_differ: prompts that were not the same for all models.
    """

    header: Header
    unit: str
    values: Mapping[str, np.ndarray]
    truncated: Mapping[str, int]
    prompts_differ: int

    @property
    def name(self) -> str:
        """The task's name."""
        return self.header.task

    @property
    def documents(self) -> int:
        """D; the samples of one document are one of them."""
        return len(next(iter(self.values.values())))

    def score(self, model: str) -> float:
        """Points of a model over the whole task."""
        return float(self.values[model].mean())


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
            tasks,
            rules,
            _with_missing(suite, tasks, records, [n for n in not_run if n.suite == suite]),
        )
        for suite, tasks in by_suite.items()
    ]


def _compare_suite(
    suite: str,
    records: Mapping[str, Mapping[str, TaskRecord]],
    rules: Rules,
    not_run: Sequence[NotRun],
) -> Comparison:
    """Compare over the tasks of one suite: `records` by task and model."""
    joined = [
        join(with_answers, rules.pass_at)
        for of_task in records.values()
        if (with_answers := {model: r for model, r in of_task.items() if r.answers})
    ]
    present = dict.fromkeys(model for task in joined for model in task.values)
    models = (
        *(model for model in present if model not in _LAST),
        *(model for model in _LAST if model in present),
    )
    pairs = [(a, b) for a, b in rules.pairs if a in present and b in present]
    shared = {pair: [t for t in joined if set(pair) <= t.values.keys()] for pair in pairs}
    tested = {
        pair: {task.name: _tested(task, pair, len(tasks), rules) for task in tasks}
        for pair, tasks in shared.items()
    }
    differences = {pair: _differences(pair, tasks, tested[pair]) for pair, tasks in shared.items()}
    lines = [
        _line(task, models, [of[task.name] for of in differences.values() if task.name in of])
        for task in joined
    ]
    averaged = [t for t in joined if t.unit != SCORE and len(t.values) == len(models)]
    mean = _mean(suite, lines, averaged, tested, rules) if len(averaged) > 1 else None
    return Comparison(
        suite,
        models,
        tuple(lines),
        mean,
        tuple(not_run),
        digest(sorted(task.header.compared_by for task in joined)),
        _common_settings([task.header.protocol for task in joined]),
        tuple(_notes(joined, averaged, models)),
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


def _line(task: JoinedTask, models: Iterable[str], differences: Iterable[Difference]) -> Line:
    measured = [model for model in models if model in task.values]
    return Line(
        task.name,
        task.unit,
        task.documents,
        {model: task.score(model) for model in measured},
        {model: task.truncated[model] for model in measured},
        tuple(differences),
    )


def _differences(
    pair: Pair, tasks: Sequence[JoinedTask], tested: Mapping[str, Tested]
) -> dict[str, Difference]:
    """Of a pair, by task, with p values corrected over the tasks."""
    corrected = statistics.holm([tested[task.name].estimate.p for task in tasks])
    least = statistics.holm([tested[task.name].least_p for task in tasks])
    return {
        task.name: replace(
            _difference(pair, [task.score(model) for model in pair], tested[task.name]),
            corrected_p=p,
            least_p=least_p,
        )
        for task, p, least_p in zip(tasks, corrected, least, strict=True)
    }


def _difference(pair: Pair, scores: Sequence[float], tested: Tested) -> Difference:
    of_a, of_b = scores
    relative = 100 * (of_a - of_b) / of_b if of_b > 0 else None
    p = tested.estimate.p
    low, high = tested.estimate.interval or (None, None)
    return Difference(
        *pair, of_a - of_b, low, high, p, p, tested.least_p, relative, tested.could_show
    )


def _mean(
    suite: str,
    lines: Sequence[Line],
    averaged: Sequence[JoinedTask],
    tested: Mapping[Pair, Mapping[str, Tested]],
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
    for (a, b), of_pair in tested.items():
        parts = [of_pair[name].estimate for name in names]
        of_mean = statistics.compare_means(parts, rules.resamplings, _rng(rules, suite))
        differences.append(_difference((a, b), [scores[a], scores[b]], of_mean))
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
    joined: Sequence[JoinedTask], averaged: Sequence[JoinedTask], models: Sequence[str]
) -> list[str]:
    notes = []
    left_out = [task for task in joined if task not in averaged]
    if left_out and len(joined) > 1:
        whole = f"the mean is over {len(averaged)} of {len(joined)} tasks"
        reasons = "; ".join(
            f"{task.name} is not on a scale of 0 to 100"
            if task.unit == SCORE
            else f"{task.name} was not run for "
            + ", ".join(model for model in models if model not in task.values)
            for task in left_out
        )
        notes.append(f"{whole if len(averaged) > 1 else 'there is no mean'}: {reasons}")
    if any(task.header.protocol.get("chat") for task in joined):
        notes.append("each model is asked by its own chat template, examples as turns")
    notes += [
        f"{task.name}: {task.prompts_differ:,} prompts were not the same for all models"
        for task in joined
        if task.prompts_differ and not task.header.protocol.get("chat")
    ]
    if any(task.unit == BLEU for task in joined):
        version = extra("sacrebleu").__version__
        notes.append(f"BLEU is that of sacrebleu {version} with its defaults")
    return notes


def join(records: Mapping[str, TaskRecord], pass_at: int) -> JoinedTask:
    """Join the records of one task by document and sample.

    Args:
        records: of at least one model, each with at least one answer.
        pass_at: k of pass@k, for a task with several samples of a document.

    Raises:
        EvaluationError: protocols, data, documents or samples differ, or a score is no number.
    """
    first, *others = records
    header = records[first].header
    place = f"{header.suite}/{header.task}"
    for other in others:
        _require_alike(place, (first, header), (other, records[other].header))
    by_key = {model: _by_key(record.answers) for model, record in records.items()}
    for other in others:
        _require_same_documents(place, (first, by_key[first]), (other, by_key[other]))
    answers = {model: [of[key] for key in sorted(of)] for model, of in by_key.items()}
    unit, values = _values(place, header, answers, pass_at)
    return JoinedTask(
        header,
        unit,
        values,
        {model: len({a.document for a in of if a.truncated}) for model, of in answers.items()},
        sum(
            len({answer.prompt for answer in same}) > 1
            for same in zip(*answers.values(), strict=True)
        ),
    )


def _by_key(answers: Iterable[Answer]) -> dict[Key, Answer]:
    seen: Counter[tuple[str, int]] = Counter()
    by_key: dict[Key, Answer] = {}
    for answer in answers:
        place = answer.document, answer.sample
        by_key[*place, seen[place]] = answer
        seen[place] += 1
    return by_key


def _require_alike(place: str, one: tuple[str, Header], other: tuple[str, Header]) -> None:
    (a, header_a), (b, header_b) = one, other
    if header_a.compared_by == header_b.compared_by:
        return
    left, right = (
        dict(_leaves({part: getattr(header, part) for part in ("kind", "protocol", "data")}))
        for header in (header_a, header_b)
    )
    unlike = [
        f"{key} is {_told(left, key)} for {a!r} and {_told(right, key)} for {b!r}"
        for key in sorted(left.keys() | right.keys())
        if _told(left, key, whole=True) != _told(right, key, whole=True)
    ]
    raise EvaluationError(
        f"{place}: scores of different protocols are not compared: {'; '.join(unlike[:_MOST_TOLD])}"
        + (f"; and {len(unlike) - _MOST_TOLD} more" if len(unlike) > _MOST_TOLD else "")
        + "; evaluate both by one protocol on the same data"
    )


def _leaves(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their dotted place; an empty mapping or list is a value."""
    if isinstance(value, Mapping | list | tuple) and len(value):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            yield from _leaves(inner, f"{before}.{key}" if before else str(key))
    else:
        yield before, value


def _told(leaves: Mapping[str, Any], key: str, whole: bool = False) -> str:
    text = repr(leaves[key]) if key in leaves else "missing"
    return text if whole or len(text) <= _LONGEST_TOLD else text[: _LONGEST_TOLD - 1] + "…"


def _require_same_documents(
    place: str, one: tuple[str, Mapping[Key, Answer]], other: tuple[str, Mapping[Key, Answer]]
) -> None:
    (a, of_a), (b, of_b) = one, other
    unlike = [
        f"{len(only):,} answered by {model!r} alone (document {document[:12]}, sample {sample})"
        for model, only in ((a, of_a.keys() - of_b.keys()), (b, of_b.keys() - of_a.keys()))
        if only
        for document, sample, _ in [min(only)]
    ]
    if not unlike:
        unlike = [
            f"another reference for document {key[0][:12]}"
            for key in sorted(of_a)
            if of_a[key].reference != of_b[key].reference
        ][:1]
    if unlike:
        raise EvaluationError(
            f"{place}: {a!r} and {b!r} were not given the same documents: {'; '.join(unlike)}; "
            "evaluate both on the same data, with the same number of samples"
        )


def _values(
    place: str, header: Header, answers: Mapping[str, list[Answer]], pass_at: int
) -> tuple[str, Mapping[str, np.ndarray]]:
    """The unit, and each model's points a document."""
    if header.kind == "bleu":
        return BLEU, {
            model: Translations([a.response for a in of], [a.reference for a in of]).points
            for model, of in answers.items()
        }
    for model, of in answers.items():
        for answer in of:
            right_or_wrong = header.kind == "value" or answer.score in (0, 1)
            if not (isfinite(answer.score) and right_or_wrong):
                raise EvaluationError(
                    f"{place}: {model!r} has a score of {answer.score} on document "
                    f"{answer.document[:12]}, where kind {header.kind!r} has "
                    f"{'a number' if header.kind == 'value' else '0 or 1'}; evaluate it anew"
                )
    if header.kind == "samples":
        return f"pass@{pass_at}", {m: _passed(place, of, pass_at) for m, of in answers.items()}
    scores = {model: np.array([a.score for a in of], np.float64) for model, of in answers.items()}
    if all((values >= 0).all() and (values <= 1).all() for values in scores.values()):
        return PERCENT, {model: WHOLE * values for model, values in scores.items()}
    return SCORE, scores


def _passed(place: str, answers: Iterable[Answer], k: int) -> np.ndarray:
    """[D] pass@k of each document, in percent."""
    samples: dict[str, list[float]] = {}
    for answer in answers:
        samples.setdefault(answer.document, []).append(answer.score)
    try:
        shares = [pass_at_k(len(of), int(sum(of)), k) for of in samples.values()]
    except EvaluationError as error:
        raise EvaluationError(f"{place}: {error}") from error
    return WHOLE * np.array(shares, np.float64)
