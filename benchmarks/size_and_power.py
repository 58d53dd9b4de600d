"""Whether tests of paired scores keep their level, and show what they are said to show.

    python benchmarks/size_and_power.py [--quick] [--json]

By simulation, with the tests that tables are made with, at the 5 % level.

    size_largest        largest share of samples of two equally good models in which a difference is
                        shown, over 10, 20 and 164 documents: scores that are symmetric, with long
                        tails, as of F1 (many of 0 and of 1), and skewed (log-normal); that differ
                        in all documents, in 20 %, in 5 %
    size_mean           the same of the mean over five tasks of 10, 10, 20, 20 and 164 documents
    size_leaning_D      beyond what is tested: differences whose mean is 0 but which lean to one
                        side, being exponential. With few documents no test can hold its level for
                        all such; here is by how much this one fails
    power_least,        how often the printed difference (≥ x would be) is shown where one task has
    power_most          it and the others none, in suites of 1, 5 and 27 tasks: right or wrong
                        answers to 250 and 164 documents; other scores of 164 and 40 documents, of
                        164 of which 20 % differ, and as of F1
    contradictions      samples whose p and interval do not say the same of 0
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from figures import command_line, show
from fusellm.evaluation.compare import statistics
from fusellm.evaluation.compare.statistics import LEVEL, Estimate

DOCUMENTS = (10, 20, 164)
SHARES = (1.0, 0.2, 0.05)
TASKS = (1, 5, 27)
TASKS_OF_A_MEAN = (10, 10, 20, 20, 164)

_DRAWS = 2_000
_AT_ONCE = 500
_PRINTED = 51
"""Samples; the median of what is printed for them is tried."""
_OTHERS = 500
"""Samples from which the tasks that do not differ are taken."""

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

SCORES: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "long-tailed": lambda rng, shape: rng.standard_t(3, shape),
    "f1": lambda rng, shape: np.clip(rng.normal(0.4, 0.6, shape), 0, 1),
    "skewed": lambda rng, shape: rng.lognormal(0, 1, shape),
}
"""[D, samples] scores of either model."""


def leaning(documents: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """[D, samples] differences of mean 0: few large ones above it, many small ones below."""
    return rng.exponential(size=(documents, samples)) - 1


def symmetric(
    draw: Draw, share: float, documents: int, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """[D, samples] differences of two equally good models, 0 but for a share of the documents."""
    shape = documents, samples
    return (draw(rng, shape) - draw(rng, shape)) * (rng.random(shape) < share)


def tested(differences: np.ndarray, draws: int, rng: np.random.Generator) -> list[Estimate]:
    """One for each of the samples [D, samples]; all see the same subsets of documents."""
    return statistics.estimates(differences, np.ones(len(differences)), draws, rng)


def batches(samples: int) -> Iterator[int]:
    """Sizes of the parts in which so many samples are drawn."""
    for start in range(0, samples, _AT_ONCE):
        yield min(_AT_ONCE, samples - start)


def size(
    differences: Callable[[int, np.random.Generator], np.ndarray], samples: int
) -> tuple[float, int]:
    """Share of samples in which a difference is shown, and contradictions in the last of them.

    Args:
        differences: [D, samples] of so many samples.
    """
    rng = np.random.default_rng(0)
    shown: list[bool] = []
    found: list[Estimate] = []
    for count in batches(samples):
        found = tested(differences(count, rng), _DRAWS, rng)
        shown += [one.p <= LEVEL for one in found]
    ends = [one.interval or (-np.inf, np.inf) for one in found]
    outside = [not low <= 0 <= high for low, high in ends]
    return float(np.mean(shown)), int(np.not_equal(outside, shown[-len(found) :]).sum())


def size_of_mean(samples: int) -> float:
    """Share of null suites whose mean over tasks is shown to differ."""
    rng = np.random.default_rng(0)
    shown = []
    for count in batches(samples):
        of_tasks = [
            tested(symmetric(SCORES["normal"], 1.0, documents, count, rng), _DRAWS, rng)
            for documents in TASKS_OF_A_MEAN
        ]
        means = [statistics.mean_of(parts, _DRAWS, rng) for parts in zip(*of_tasks, strict=True)]
        shown += [one.p <= LEVEL for one in means]
    return float(np.mean(shown))


@dataclass(frozen=True)
class Design:
    """A task: D documents, a share of which differ, by right or wrong (`draw` None) or scores."""

    documents: int
    share: float
    draw: Draw | None = None

    def null(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """[D] scores of two equally good models."""
        if self.draw is not None:
            sample = symmetric(self.draw, self.share, self.documents, 1, rng)[:, 0]
            return sample, np.zeros(self.documents)
        a = rng.integers(2, size=self.documents).astype(float)
        return a, np.where(np.arange(self.documents) < self.share * self.documents, 1 - a, a)

    def p_values(
        self, difference: float, samples: int, draws: int, rng: np.random.Generator
    ) -> np.ndarray:
        """[samples] p where the true difference is this one; 1 where it is shown upside down."""
        if self.draw is None:
            share = max(self.share, difference)
            won, lost = (share + difference) / 2, (share - difference) / 2
            counts = rng.multinomial(self.documents, [won, lost, 1 - share], samples).tolist()
            p = functools.cache(statistics.mcnemar)
            return np.array([p(won, lost) if won > lost else 1.0 for won, lost, _ in counts])
        p_values = []
        for count in batches(samples):
            sample = symmetric(self.draw, self.share, self.documents, count, rng)
            differs = sample != 0
            sample[differs] += difference / differs.mean()
            found = tested(sample, draws, rng)
            p_values += [one.p if one.value > 0 else 1.0 for one in found]
        return np.array(p_values)


DESIGNS = {
    "right 250": Design(250, 0.2),
    "right 164": Design(164, 0.1),
    "scores 164": Design(164, 1.0, SCORES["normal"]),
    "scores 40": Design(40, 1.0, SCORES["normal"]),
    "scores 164 few": Design(164, 0.2, SCORES["normal"]),
    "f1 164": Design(164, 1.0, SCORES["f1"]),
}


def power(design: Design, tasks: int, samples: int) -> float:
    """How often the printed difference is shown by Holm's rule, no other of the tasks differing."""
    rng = np.random.default_rng(tasks)
    right = 1.0 if design.draw is None else None
    printed = [
        statistics.compare(*design.null(rng), _DRAWS, rng, tasks, right).could_show
        for _ in range(_PRINTED)
    ]
    difference = float(np.median([one for one in printed if one is not None]))
    draws = max(_DRAWS, statistics.draws_for(tasks))
    others = design.p_values(0.0, _OTHERS, draws, rng)
    corrected = [
        statistics.holm([p, *rng.choice(others, tasks - 1)])[0]
        for p in design.p_values(difference, samples, draws, rng)
    ]
    return float(np.mean(np.array(corrected) <= LEVEL))


def measure(samples: int) -> dict[str, float]:
    """All figures: so many samples for each size and each power."""
    started = time.perf_counter()
    sizes = {
        f"size {name} {share:.0%} {documents}": size(
            functools.partial(symmetric, draw, share, documents), samples
        )
        for name, draw in SCORES.items()
        for share in SHARES
        for documents in DOCUMENTS
    }
    figures = {name: shown for name, (shown, _) in sizes.items()}
    powers = {
        f"power {name} {tasks}": power(design, tasks, samples)
        for name, design in DESIGNS.items()
        for tasks in TASKS
    }
    return {
        **figures,
        **powers,
        "size_largest": max(figures.values()),
        "size_mean": size_of_mean(samples // 2),
        **{
            f"size_leaning_{documents}": size(functools.partial(leaning, documents), samples)[0]
            for documents in DOCUMENTS
        },
        "power_least": min(powers.values()),
        "power_most": max(powers.values()),
        "contradictions": sum(found for _, found in sizes.values()),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Print the figures."""
    arguments = command_line(__doc__).parse_args()
    show(measure(4_000 if arguments.quick else 12_000), arguments.json)


if __name__ == "__main__":
    main()
