"""Whether a difference between two models is more than chance, and which could have been shown.

Everything is paired: both models answered the same documents. What is tested is that they are
equally good in this sense: in every document either could as well have got the other's score, so
that differences are symmetric about 0. Then every choice of signs for the D differences is equally
likely, whatever their sizes, and a test that compares their sum with its 2^D values under all signs
holds its level with any D, exactly. McNemar's exact test is this test where scores are right or
wrong. (A mean of 0 of differences that lean to one side is less than symmetry; there the level is
approached with D. No test holds it for all of them with few: Bahadur and Savage 1956.)

The same test says which differences x are not rejected, the 95 % interval: that of d − x. Flipping
the signs of a subset B raises the sum of d − x if and only if the mean of d over B is below x. So
the means over all B, and nothing else, give p (at x = 0) and the interval (Hartigan 1969). They
are drawn where there are too many. Sums of d over sums of other numbers w, such as bytes, are
tested by d − x w in the same way: by their ratios over B.

D documents, R subsets, C columns. Scores and differences are in the caller's unit; p values are of
two sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, comb, log2, sqrt
from statistics import NormalDist

import numpy as np

from fusellm.errors import EvaluationError
from fusellm.evaluation.harness.lm_eval import extra

MEAN = "mean"
"""What the mean over tasks or domains is called among them."""
LEVEL = 0.05
POWER = 0.8

_BEYOND = 10
"""Draws beyond each limit of any test; with fewer, p would be too rough."""
_SPARE = 3
"""Documents that differ beyond those that a test needs at all; below, Student's does not serve."""
_ROUNDING = 1e-9
_UNLIKELY = 1e-12
_MOST_SPREADS = 10.0
"""Of a mean over the spread of the differences: with it, none could be missed."""
_CELLS_AT_ONCE = 1 << 22


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that of k samples, drawn without return from those of a problem, at least one passes.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), equation 1:
    1 − C(n − c, k) / C(n, k).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 2, 3), pass_at_k(4, 1, 2)
    (0.25, 1.0, 0.5)

    Raises:
        EvaluationError: there are fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise EvaluationError(
            f"pass@{k} needs at least {max(k, 1)} samples of each problem, and there are {samples}"
        )
    return 1 - comb(samples - passed, k) / comb(samples, k)


def mcnemar(wins: int, losses: int) -> float:
    """p of McNemar's exact test: how odd `wins` and `losses` are if both were equally likely.

    Documents that both models got right, or both wrong, say nothing.

    >>> mcnemar(5, 0), mcnemar(3, 3), mcnemar(0, 0)
    (0.0625, 1.0, 1.0)
    """
    if wins + losses == 0:
        return 1.0
    return float(extra("scipy.stats").binomtest(wins, wins + losses, 0.5).pvalue)


@dataclass(frozen=True)
class Estimate:
    """A number over documents, with p of its being 0 and the interval that agrees with it.

    Attributes:
        value: over all documents.
        error: its standard error.
        drawn: [R] the same over subsets of the documents.
        known_p: p, where it is known without draws.
    """

    value: float
    error: float
    drawn: np.ndarray
    known_p: float | None = None

    @property
    def p(self) -> float:
        """p of 0, never 0 itself: the empty subset changes no sign, and counts for either side.

        >>> Estimate(1.0, 0.0, np.ones(63)).p, Estimate(0.0, 0.0, np.zeros(63)).p
        (0.03125, 1.0)
        """
        if self.known_p is not None:
            return self.known_p
        sides = int((self.drawn <= 0).sum()), int((self.drawn >= 0).sum())
        return min(1.0, 2 * (1 + min(sides)) / (1 + len(self.drawn)))

    @property
    def bounded(self) -> bool:
        """Whether any p is below 5 %: with 5 documents it is at least 1/16."""
        return LEVEL * (1 + len(self.drawn)) >= 2

    @property
    def interval(self) -> tuple[float, float] | None:
        """All x of p above 5 %; None if every x is one.

        >>> Estimate(3.0, 0.0, np.arange(1.0, 64.0)).interval
        (1.0, 63.0)
        """
        if not self.bounded:
            return None
        beyond = int(LEVEL * (1 + len(self.drawn)) / 2)
        ordered = np.sort(self.drawn)
        low, high = float(ordered[beyond - 1]), float(ordered[-beyond])
        if self.known_p is None:
            return low, high
        # Draws have an error, by which they must not contradict what is known of 0.
        if self.known_p > LEVEL:
            return min(low, 0.0), max(high, 0.0)
        if self.value > 0:
            return max(low, float(ordered[ordered > 0][0])), high
        return low, min(high, float(ordered[ordered < 0][-1]))


def estimates(
    columns: np.ndarray, weights: np.ndarray, draws: int, rng: np.random.Generator
) -> list[Estimate]:
    """Each column's sum over that of the weights; all columns see the same subsets.

    Args:
        columns: [D, C] float64, D > 0; −columns gives exactly the negative.
        weights: [D] above 0; ones for means.
        draws: R, for more documents than have so few subsets.
    """
    sums = _subset_sums(np.column_stack([weights, columns]), draws, rng)
    sums = sums[sums[:, 0] > 0]  # without the empty subset
    of_columns = sums[:, 1:]
    of_columns[np.abs(of_columns) < _ROUNDING * np.abs(columns).max(axis=0)] = 0.0
    whole = weights.sum()
    values = columns.sum(axis=0) / whole
    left = columns - weights[:, None] * values
    errors = np.sqrt((left**2).sum(axis=0) * len(left) / max(1, len(left) - 1)) / whole
    drawn = np.ascontiguousarray(of_columns.T) / sums[:, 0]
    return [
        Estimate(float(value), float(error), of_column)
        for value, error, of_column in zip(values, errors, drawn, strict=True)
    ]


def _subset_sums(columns: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[R, C] sums over subsets of the rows of [D, C]: over all of them, or over so many drawn."""
    documents = len(columns)
    if 2**documents - 1 <= draws:
        every = np.arange(2**documents)[:, None] >> np.arange(documents) & 1
        return np.asarray(every @ columns)
    at_once = max(1, _CELLS_AT_ONCE // documents)
    sums = []
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        bits = np.frombuffer(rng.bytes(rows * documents // 8 + 1), np.uint8)
        members = np.unpackbits(bits, count=rows * documents).reshape(rows, documents)
        sums.append(members.astype(np.float64) @ columns)
    return np.concatenate(sums)


def mean_of(parts: Sequence[Estimate], draws: int, rng: np.random.Generator) -> Estimate:
    """The mean of numbers over documents of their own, each counting the same.

    Its subsets are one of each part's. Where one part has too few documents for an interval of its
    own, the mean has none.
    """
    bounded = all(part.bounded for part in parts)
    drawn = [rng.choice(part.drawn, draws if bounded else 0) for part in parts]
    return Estimate(
        float(np.mean([part.value for part in parts])),
        sqrt(sum(part.error**2 for part in parts)) / len(parts),
        np.mean(drawn, axis=0),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for having asked several questions at once (Holm 1979), in their order.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    most = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = most
    return corrected


def least_p(documents: int) -> float:
    """The p of the clearest outcome that so many documents can have: all for one model.

    >>> least_p(5), least_p(6), least_p(0)
    (0.0625, 0.03125, 1.0)
    """
    return min(1.0, 2.0 ** (1 - documents))


def smallest_shown(documents: int, discordant: int, level: float = LEVEL) -> float | None:
    """The least true difference that McNemar's test shows in 4 of 5 such samples.

    The share of documents on which the two models differ is taken as the observed one, or as the
    difference itself where that is larger. Exact, over all numbers of documents that may differ.

    Args:
        documents: in the sample.
        discordant: those that one model got right and the other wrong.
        level: of the test: 5 % over the number of tasks, where one of them differs (Holm).

    Returns:
        A share of the documents; None where even the largest difference would not be shown.

    >>> round(100 * smallest_shown(3270, 327), 1), smallest_shown(5, 2)
    (1.6, None)
    """

    def missing(difference: float) -> float:
        differ = max(discordant / documents, difference)
        numbers, chances = _numbers(documents, differ)
        too_few = binomial.isf(level / 2, numbers, 0.5)
        shown = binomial.sf(too_few, numbers, (1 + difference / differ) / 2 if differ else 0.5)
        return float(chances @ shown) - POWER

    binomial = extra("scipy.stats").binom
    if documents == 0 or missing(1.0) < 0:
        return None
    return float(extra("scipy.optimize").brentq(missing, 0.0, 1.0, xtol=1e-6))


def smallest_mean_shown(differences: np.ndarray, level: float = LEVEL) -> float | None:
    """The least true mean of such differences that is shown in 4 of 5 such samples.

    As `smallest_shown`, with as many documents that differ as here, or as such a test needs. Their
    differences are taken as normal, of the observed spread: the test of signs is nearly Student's.

    Args:
        differences: [D].

    Returns:
        None where there are too few documents, or too few that differ to know by how much.
    """
    differing = differences[differences != 0]
    needed = max(len(differing), ceil(1 - log2(level)) + _SPARE)
    if len(differing) < 2 or needed > len(differences):
        return None
    stats = extra("scipy.stats")
    numbers, chances = _numbers(len(differences), needed / len(differences))
    enough = 2.0 ** (1 - numbers) <= level
    numbers, chances = numbers[enough], chances[enough]
    limits = stats.t.isf(level / 2, numbers - 1)

    def missing(spreads: float) -> float:
        shown = stats.nct.sf(limits, numbers - 1, spreads * np.sqrt(numbers))
        return float(chances @ shown) - POWER

    if missing(_MOST_SPREADS) < 0:
        return None
    spreads = extra("scipy.optimize").brentq(missing, 0.0, _MOST_SPREADS)
    return float(needed / len(differences) * spreads * differing.std(ddof=1)) or None


def _numbers(documents: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """How many of the documents may differ if this share does, and the chance of each number."""
    binomial = extra("scipy.stats").binom
    least, most = binomial.ppf([_UNLIKELY, 1 - _UNLIKELY], documents, share)
    numbers = np.arange(max(0, least), most + 1)
    return numbers, binomial.pmf(numbers, documents, share)


def draws_for(tasks: int) -> int:
    """R that tells p of one of so many tasks well enough for Holm's rule.

    >>> draws_for(27)
    10800
    """
    return ceil(2 * _BEYOND * tasks / LEVEL)


@dataclass(frozen=True)
class Tested:
    """What is known of a difference.

    Attributes:
        least_p: of the clearest outcome that such documents can have.
        could_show: the least true difference that would be shown in 4 of 5 such samples; None if
            none, or if too little is known.
    """

    estimate: Estimate
    least_p: float
    could_show: float | None


def compare(
    a: np.ndarray,
    b: np.ndarray,
    draws: int,
    rng: np.random.Generator,
    tasks: int = 1,
    right: float | None = None,
) -> Tested:
    """The mean of a − b.

    Args:
        a, b: [D] of the same documents, D > 0.
        draws: R at least; more where there are so many tasks that p must be known better.
        tasks: that are tested together, by Holm's rule. One that differs among others that do not
            is shown by its first step, at 5 % over their number: so is `could_show`.
        right: score of a right answer, if scores may be right or wrong.
    """
    draws = max(draws, draws_for(tasks))
    (estimate,) = estimates((a - b)[:, None], np.ones(len(a)), draws, rng)
    level, least = LEVEL / tasks, least_p(len(a))
    if right is None or not np.isin([a, b], (0, right)).all():
        return Tested(estimate, least, smallest_mean_shown(a - b, level))
    wins, losses = int((a > b).sum()), int((a < b).sum())
    share = smallest_shown(len(a), wins + losses, level)
    return Tested(
        replace(estimate, known_p=mcnemar(wins, losses)),
        least,
        None if share is None else right * share,
    )


def compare_means(parts: Sequence[Estimate], draws: int, rng: np.random.Generator) -> Tested:
    """The mean of differences over documents of their own: one question, whatever their number."""
    estimate = mean_of(parts, draws, rng)
    normal = NormalDist()
    errors = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)
    least = 2 / (1 + len(estimate.drawn))
    return Tested(estimate, min(1.0, least), errors * estimate.error or None)
