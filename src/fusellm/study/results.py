"""What a study found: bits per byte with intervals, over seeds, and paired differences."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusellm.evaluation.compare.statistics import MEAN, Estimate, holm
from fusellm.evaluation.text.intervals import Scores, estimates_of
from fusellm.stages.evaluate import over_common_bytes
from fusellm.store.blocks import Block
from fusellm.study.compute import Compute
from fusellm.study.plan import Study, Unit
from fusellm.study.trainings import TrainingOutcome


@dataclass(frozen=True)
class Trained:
    """A trained model of a study.

    Attributes:
        nats: of each held-out block's bytes.
    """

    unit: Unit
    nats: Sequence[np.ndarray]
    outcome: TrainingOutcome
    compute: Compute


@dataclass(frozen=True)
class Answers:
    """What was measured.

    Attributes:
        blocks: of held-out text.
        untrained: nats of sources and target, by name.
        trained: of each arm, a model a seed.
        rates: the learning rate that each arm took.
        tried: of arms that searched one, bits per byte of the validation part by rate.
    """

    study: Study
    blocks: Sequence[Block]
    untrained: Mapping[str, Sequence[np.ndarray]]
    trained: Mapping[str, Sequence[Trained]]
    rates: Mapping[str, float | None]
    tried: Mapping[str, Mapping[float | None, float]]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval over documents, where it has one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ArmDifference:
    """One arm's bits per byte less another's, paired by document, the mean over their seeds.

    Attributes:
        by_task: by domain, and their mean.
        by_seed: of the mean over domains.
        p: of its being 0 on the mean; None for too few documents.
        corrected: p by Holm's rule over all comparisons of the study.
    """

    arm: str
    other: str
    by_task: Mapping[str, Interval]
    by_seed: Sequence[float]
    p: float | None
    corrected: float | None


@dataclass(frozen=True)
class ArmResult:
    """What is known of an arm.

    Attributes:
        by_task: bits per byte by domain, and their mean; the mean over its seeds.
        by_seed: of the mean over domains.
        deviation: of these; None for one seed.
        tokens, steps: of a merge, those of its parts together; of an ensemble, those of the arm
            in its target's place.
        curve: [(tokens, bits per byte of the validation part, mean over seeds)]; none of a merge
            and an ensemble.
        tokens_to_reference: after how many tokens the curve is first at the reference's last value
            or below; None if never.
    """

    rate: float | None
    by_task: Mapping[str, Interval]
    by_seed: Sequence[float]
    deviation: float | None
    tokens: int
    steps: int
    compute: Compute
    curve: Sequence[tuple[int, float]]
    tokens_to_reference: int | None


@dataclass(frozen=True)
class StudyResults:
    """All of it.

    Attributes:
        documents: of held-out text, by domain and in all.
        untrained: bits per byte of sources and target.
    """

    name: str
    reference: str
    seeds: Sequence[int]
    documents: Mapping[str, int]
    untrained: Mapping[str, Mapping[str, Interval]]
    arms: Mapping[str, ArmResult]
    differences: Sequence[ArmDifference]
    tried: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def results_of(answers: Answers) -> StudyResults:
    """Numbers from what was measured.

    Over bytes that all models scored. The nats of an arm in a document are the mean over its seeds:
    intervals are over documents, and how much the seed matters is `deviation`.
    """
    study = answers.study
    rows = dict(answers.untrained)
    for arm, models in answers.trained.items():
        rows |= {_of_seed(arm, model.unit.seed): model.nats for model in models}
    scores = over_common_bytes(answers.blocks, rows)
    nats = dict(scores.nats)
    for arm, models in answers.trained.items():
        of_seeds = [nats[_of_seed(arm, model.unit.seed)] for model in models]
        nats[_of_all(arm)] = np.mean(of_seeds, axis=0)
    seeds = study.settings.seeds
    pairs = _compared(study)
    asked = [(_of_all(a), _of_all(b)) for a, b in pairs]
    asked += [(_of_seed(a, s), _of_seed(b, s)) for a, b in pairs for s in seeds]
    evaluation = study.base.evaluation
    scored = Scores(scores.domains, scores.scored_bytes, nats)
    by_task, documents = estimates_of(scored, evaluation.resamplings, study.base.seed, asked)
    tasks = [MEAN, *(task for task in by_task if task != MEAN)]

    def values(model: str) -> dict[str, Interval]:
        return {task: _value(by_task[task][model]) for task in tasks}

    whole = by_task[MEAN]
    goal = _curve(answers.trained[study.settings.reference])[-1][1]
    arms = {
        arm: _arm(
            answers, arm, values(_of_all(arm)), [whole[_of_seed(arm, s)].value for s in seeds], goal
        )
        for arm in study.chosen
    }
    p_values = [_p(whole[f"{_of_all(a)}-{_of_all(b)}"]) for a, b in pairs]
    known = holm([p for p in p_values if p is not None])
    corrected = iter(known)
    differences = [
        ArmDifference(
            a,
            b,
            values(f"{_of_all(a)}-{_of_all(b)}"),
            [whole[f"{_of_seed(a, s)}-{_of_seed(b, s)}"].value for s in seeds],
            p,
            None if p is None else next(corrected),
        )
        for (a, b), p in zip(pairs, p_values, strict=True)
    ]
    return StudyResults(
        study.settings.name,
        study.settings.reference,
        seeds,
        {task: documents[task] for task in tasks},
        {name: values(name) for name in answers.untrained},
        arms,
        differences,
        {a: {f"{rate:g}": v for rate, v in by.items()} for a, by in answers.tried.items()},
    )


def _compared(study: Study) -> list[tuple[str, str]]:
    """Pairs of arms, each once: with the reference, and those that the study names."""
    pairs = [(arm, study.settings.reference) for arm in study.chosen]
    pairs += [(a, b) for a, b in study.settings.compare if {a, b} <= set(study.chosen)]
    return [(a, b) for a, b in dict.fromkeys(pairs) if a != b]


def _of_all(arm: str) -> str:
    return f"{arm} all"  # a space: an arm may be called a-b, as the difference of two others is


def _of_seed(arm: str, seed: int) -> str:
    return f"{arm} seed {seed}"  # a space, which no arm's name has


def _value(estimate: Estimate) -> Interval:
    low, high = estimate.interval or (None, None)
    return Interval(estimate.value, low, high)


def _p(estimate: Estimate) -> float | None:
    return estimate.p if estimate.bounded else None


def _curve(models: Sequence[Trained]) -> list[tuple[int, float]]:
    """The mean over seeds; all validate after the same steps, whose tokens differ a little."""
    curves = [model.outcome.curve for model in models]
    return [
        (round(statistics.mean(n for n, _ in points)), statistics.mean(v for _, v in points))
        for points in zip(*curves, strict=False)
    ]


def _arm(
    answers: Answers,
    arm: str,
    by_task: Mapping[str, Interval],
    by_seed: Sequence[float],
    goal: float,
) -> ArmResult:
    models, curve = answers.trained[arm], _curve(answers.trained[arm])
    computes = [model.compute for model in models]
    return ArmResult(
        answers.rates[arm],
        by_task,
        by_seed,
        statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        round(statistics.mean(model.outcome.tokens for model in models)),
        round(statistics.mean(model.outcome.steps for model in models)),
        Compute(
            round(statistics.mean(c.reading for c in computes)),
            round(statistics.mean(c.training for c in computes)),
        ),
        curve,
        next((tokens for tokens, value in curve if value <= goal), None),
    )
