"""Bits per byte with intervals, paired by document.

D documents, R resamplings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusellm.fusion.cross_entropy import NATS_PER_BIT

MEAN = "mean"
BITS_PER_BYTE = "bits_per_byte"
_WEIGHTS_AT_ONCE = 1 << 22
_PERCENTILES = (2.5, 97.5)


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
        """Of a difference: -1 if its interval lies below 0, 1 if above, 0 if it includes 0."""
        if self.low is None or self.high is None:
            return None
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def records(
    scores: Scores, resamplings: int, seed: int, differences: Sequence[tuple[str, str]] = ()
) -> list[Record]:
    """Bits per byte of every model in every domain, and of the mean over domains.

    Intervals are percentiles of a bootstrap over documents, domain by domain; all models see the
    same resamplings, so that the difference of two is paired by document.

    Args:
        differences: pairs (a, b) for which a − b is given as model `a-b`.
    """
    names = list(dict.fromkeys(scores.domains))
    labels = np.array(scores.domains)
    point: dict[str, dict[str, float]] = {model: {} for model in scores.nats}
    drawn: dict[str, dict[str, np.ndarray]] = {model: {} for model in scores.nats}
    sizes: dict[str, int] = {}
    for place, domain in enumerate(names):
        chosen = np.nonzero((labels == domain) & (scores.scored_bytes > 0))[0]
        sizes[domain] = len(chosen)
        rng = np.random.default_rng([seed, place])
        scored = scores.scored_bytes[chosen].astype(np.float64)
        columns = np.stack([scored, *(nats[chosen] for nats in scores.nats.values())], axis=1)
        sums = _resampled_sums(columns, resamplings, rng)
        for n, model in enumerate(scores.nats, start=1):
            whole = columns[:, n].sum() / columns[:, 0].sum() / NATS_PER_BIT
            point[model][domain] = float(whole)
            drawn[model][domain] = sums[:, n] / sums[:, 0] / NATS_PER_BIT
    sizes[MEAN] = sum(sizes.values())
    for model in scores.nats:
        point[model][MEAN] = float(np.mean([point[model][domain] for domain in names]))
        drawn[model][MEAN] = np.mean([drawn[model][domain] for domain in names], axis=0)
    for a, b in differences:
        name = f"{a}-{b}"
        point[name] = {task: point[a][task] - point[b][task] for task in point[a]}
        drawn[name] = {task: drawn[a][task] - drawn[b][task] for task in drawn[a]}
    return [
        Record(
            model,
            task,
            BITS_PER_BYTE,
            value,
            float(np.percentile(drawn[model][task], _PERCENTILES[0])),
            float(np.percentile(drawn[model][task], _PERCENTILES[1])),
            sizes[task],
        )
        for model, tasks in point.items()
        for task, value in tasks.items()
    ]


def _resampled_sums(columns: np.ndarray, resamplings: int, rng: np.random.Generator) -> np.ndarray:
    """[resamplings, C] sums of the rows of `columns` [D, C], D drawn with replacement each time."""
    documents = len(columns)
    chances = np.full(documents, 1 / documents)
    at_once = max(1, _WEIGHTS_AT_ONCE // documents)
    return np.concatenate(
        [
            rng.multinomial(documents, chances, min(at_once, resamplings - start)) @ columns
            for start in range(0, resamplings, at_once)
        ]
    )
