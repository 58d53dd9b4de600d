"""Bits per byte with intervals, paired by document. D documents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusellm.evaluation.compare.statistics import MEAN, Estimate, estimates, mean_of
from fusellm.fusion.cross_entropy import NATS_PER_BIT

BITS_PER_BYTE = "bits_per_byte"


@dataclass(frozen=True)
class Scores:
    """Sums per document, over bytes that all compared models scored.

    Attributes:
        domains: [D] domain of each document.
        scored_bytes: [D] int64.
        nats: [D] float64 of each model.
    """

    domains: Sequence[str]
    scored_bytes: np.ndarray
    nats: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Record:
    """One number of the results, with its 95 % interval over n documents, where it has one."""

    model: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int | None:
        """Of a difference: 1 if its interval lies below 0, which is better, -1 if above, or 0."""
        if self.low is None or self.high is None:
            return None
        return int(self.high < 0) - int(self.low > 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def records(
    scores: Scores, resamplings: int, seed: int, differences: Sequence[tuple[str, str]] = ()
) -> list[Record]:
    """Bits per byte of every model in every domain, and of the mean over domains.

    A difference of two models is of their nats in the same documents, over the bytes of these. A
    domain of fewer than 6 documents has no interval, nor then has the mean.

    Args:
        resamplings: subsets of documents that are drawn for intervals.
        differences: pairs (a, b) for which a − b is given as model `a-b`.
    """
    by_task, sizes = estimates_of(scores, resamplings, seed, differences)
    return [
        _record(model, task, of_model[model], sizes[task])
        for model in next(iter(by_task.values()))
        for task, of_model in by_task.items()
    ]


def estimates_of(
    scores: Scores, resamplings: int, seed: int, differences: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """What `records` tells of, with p of each difference.

    Returns:
        (by domain, the mean over domains last, by model; documents of each)
    """
    labels = np.array(scores.domains)
    nats = dict(scores.nats) | {f"{a}-{b}": scores.nats[a] - scores.nats[b] for a, b in differences}
    columns: dict[str, list[Estimate]] = {}
    sizes: dict[str, int] = {}
    for place, domain in enumerate(dict.fromkeys(scores.domains)):
        chosen = (labels == domain) & (scores.scored_bytes > 0)
        sizes[domain] = int(chosen.sum())
        bits = np.stack([of_model[chosen] for of_model in nats.values()], axis=1) / NATS_PER_BIT
        rng = np.random.default_rng([seed, place])
        columns[domain] = estimates(bits, scores.scored_bytes[chosen], resamplings, rng)
    columns[MEAN] = [
        mean_of(parts, resamplings, np.random.default_rng([seed, len(sizes)]))
        for parts in zip(*columns.values(), strict=True)
    ]
    sizes[MEAN] = sum(sizes.values())
    by_task = {task: dict(zip(nats, column, strict=True)) for task, column in columns.items()}
    return by_task, sizes


def _record(model: str, task: str, estimate: Estimate, n: int) -> Record:
    low, high = estimate.interval or (None, None)
    return Record(model, task, BITS_PER_BYTE, estimate.value, low, high, n)
