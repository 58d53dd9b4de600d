"""A task's answers by several models, joined by document; refused where they were not alike.

D documents. Points: percent, BLEU, or a number in the task's own unit.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from fusellm.errors import EvaluationError
from fusellm.evaluation.compare.bleu import Translations
from fusellm.evaluation.compare.records import Answer, Header, TaskRecord
from fusellm.evaluation.compare.statistics import pass_at_k

PERCENT, BLEU, SCORE = "%", "BLEU", "score"

WHOLE = 100.0
"""Points of a right answer."""

_MOST_TOLD = 4
_LONGEST_TOLD = 80

Key = tuple[str, int, int]
"""Document, sample, and how often both have come before: a task may ask the same thing twice."""


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
    found: dict[Key, Answer] = {}
    for answer in answers:
        place = answer.document, answer.sample
        found[*place, seen[place]] = answer
        seen[place] += 1
    return found


def _require_alike(place: str, one: tuple[str, Header], other: tuple[str, Header]) -> None:
    (a, mine), (b, theirs) = one, other
    if mine.compared_by == theirs.compared_by:
        return
    parts = ("kind", "protocol", "data")
    left = dict(_leaves({part: getattr(mine, part) for part in parts}))
    right = dict(_leaves({part: getattr(theirs, part) for part in parts}))
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
    (a, mine), (b, theirs) = one, other
    unlike = [
        f"{len(only):,} answered by {model!r} alone (document {document[:12]}, sample {sample})"
        for model, only in ((a, mine.keys() - theirs.keys()), (b, theirs.keys() - mine.keys()))
        if only
        for document, sample, _ in [min(only)]
    ]
    if not unlike:
        unlike = [
            f"another reference for document {key[0][:12]}"
            for key in sorted(mine)
            if mine[key].reference != theirs[key].reference
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
