"""Whether a difference between two models is more than chance, and which could have been shown.

Everything is paired: both models answered the same documents. D documents, R resamplings. Scores
and differences are in the caller's unit; p values are of two sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

import numpy as np

from fusellm.errors import EvaluationError
from fusellm.evaluation.extra import extra

LEVEL = 0.05
POWER = 0.8
BLEU_RESAMPLINGS = 1_000
"""Of sacrebleu's test, which holds all of them in memory at once; its own default."""

_PERCENTILES = (50 * LEVEL, 100 - 50 * LEVEL)
_ROUNDING = 1e-9
_UNLIKELY = 1e-12
_ORDERS = 4
_FEW_VALUES = 64
_DRAWS_AT_ONCE = 1 << 21


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


def resampled_means(values: np.ndarray, resamplings: int, rng: np.random.Generator) -> np.ndarray:
    """[R] means of documents that are drawn with replacement, as many as there are.

    Where values are few, as those of a binary task, documents of equal value are drawn together,
    in the order in which values first come: so −values gives exactly the negative.

    Args:
        values: [D] float64, D > 0, one for each document, or for each problem of several samples.
    """
    different, first, counts = np.unique(values, return_index=True, return_counts=True)
    if len(different) > _FEW_VALUES:
        return _resampled_sums(values[:, None], resamplings, rng)[:, 0] / len(values)
    order = np.argsort(first)
    drawn = rng.multinomial(len(values), counts[order] / len(values), resamplings)
    return np.asarray(drawn @ different[order] / len(values))


def _resampled_sums(columns: np.ndarray, resamplings: int, rng: np.random.Generator) -> np.ndarray:
    """[R, C] sums of the rows of `columns` [D, C] float64, D drawn with replacement each time."""
    documents = len(columns)
    at_once = max(1, _DRAWS_AT_ONCE // documents)
    sums = []
    for start in range(0, resamplings, at_once):
        rows = min(at_once, resamplings - start)
        drawn = rng.integers(documents, size=(rows, documents))
        drawn += documents * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * documents)
        sums.append(weights.reshape(rows, documents).astype(np.float64) @ columns)
    return np.concatenate(sums)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap. Too narrow where few documents differ."""
    low, high = np.percentile(drawn, _PERCENTILES)
    return float(low), float(high)


def bootstrap_p(drawn: np.ndarray) -> float:
    """p of a difference whose bootstrap is `drawn`: below 0.05 where its interval excludes 0.

    Never 0: the observed difference is counted as one draw.

    >>> bootstrap_p(np.zeros(99)), bootstrap_p(np.ones(99))
    (1.0, 0.02)
    """
    sides = (drawn <= _ROUNDING).sum(), (drawn >= -_ROUNDING).sum()
    return min(1.0, 2 * (1 + int(min(sides))) / (1 + len(drawn)))


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


def smallest_shown(documents: int, discordant: int) -> float | None:
    """The least true difference that McNemar's test shows in 4 of 5 such samples, at 5 %.

    The share of documents on which the two models differ is taken as the observed one, or as the
    difference itself where that is larger. Exact, over all numbers of documents that may differ.

    Args:
        documents: in the sample.
        discordant: those that one model got right and the other wrong.

    Returns:
        A share of the documents; None where even the largest difference would not be shown.

    >>> round(100 * smallest_shown(3270, 327), 1), smallest_shown(5, 2)
    (1.6, None)
    """

    def missing(difference: float) -> float:
        return _power(documents, discordant / documents, difference) - POWER

    if documents == 0 or missing(1.0) < 0:
        return None
    return float(extra("scipy.optimize").brentq(missing, 0.0, 1.0, xtol=1e-6))


def _power(documents: int, discordance: float, difference: float) -> float:
    """How often McNemar's test shows a true difference, in the right direction."""
    binomial = extra("scipy.stats").binom
    discordance = max(discordance, difference)
    if discordance == 0:
        return 0.0
    least, most = binomial.ppf([_UNLIKELY, 1 - _UNLIKELY], documents, discordance)
    differing = np.arange(least, most + 1)
    too_few = binomial.isf(LEVEL / 2, differing, 0.5)
    shown = binomial.sf(too_few, differing, (1 + difference / discordance) / 2)
    return float(binomial.pmf(differing, documents, discordance) @ shown)


def smallest_shown_by(drawn: np.ndarray) -> float | None:
    """The least true difference that a bootstrap like `drawn` shows in 4 of 5 samples, at 5 %.

    By the normal distribution, from the spread of the draws; None if they have none.
    """
    spread = float(drawn.std())
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * spread or None


class Translations:
    """A corpus of translations by one model, as the counts that BLEU is made of.

    BLEU is sacrebleu's with its defaults; one reference to a document.

    Raises:
        EvaluationError: sacrebleu is not installed.
    """

    def __init__(self, responses: Sequence[str], references: Sequence[str]) -> None:
        metric = extra("sacrebleu.metrics").BLEU
        of_one = metric(effective_order=True)
        found = [of_one.sentence_score(r, [t]) for r, t in zip(responses, references, strict=True)]
        self.responses, self.references = list(responses), list(references)
        self.counts = np.array(
            [[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found],
            dtype=np.float64,
        ).reshape(len(found), 2 * _ORDERS + 2)
        self._of_counts = metric.compute_bleu
        self._smoothing = metric().smooth_method

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def bleu(self) -> float:
        """BLEU of the corpus, 0 to 100."""
        return float(self.of_sums(self.counts.sum(axis=0)[None])[0])

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        """[R] BLEU of [R, 10] summed counts."""
        return np.array(
            [
                self._of_counts(
                    row[:_ORDERS],
                    row[_ORDERS : 2 * _ORDERS],
                    *row[2 * _ORDERS :],
                    smooth_method=self._smoothing,
                ).score
                for row in sums.astype(np.int64).tolist()
            ]
        )


def resampled_bleu(
    a: Translations, b: Translations, resamplings: int, rng: np.random.Generator
) -> np.ndarray:
    """[R] BLEU of a − BLEU of b, over the same documents drawn with replacement."""
    sums = _resampled_sums(np.concatenate([a.counts, b.counts], axis=1), resamplings, rng)
    columns = a.counts.shape[1]
    return np.asarray(a.of_sums(sums[:, :columns]) - b.of_sums(sums[:, columns:]))


def bleu_p(a: Translations, b: Translations) -> float:
    """p of sacrebleu's paired bootstrap test (Koehn 2004), doubled.

    sacrebleu's own p is of one side: of two equally good systems it calls 9.5 % different at
    0.05, and doubled 5 % (200 simulated pairs). It also calls a system different from itself.
    """
    if np.array_equal(a.counts, b.counts):
        return 1.0
    test = extra("sacrebleu.significance").PairedTest(
        [("b", b.responses), ("a", a.responses)],
        {"BLEU": extra("sacrebleu.metrics").BLEU()},
        [a.references],
        test_type="bs",
        n_samples=BLEU_RESAMPLINGS,
    )
    _, results = test()
    return min(1.0, 2 * float(results["BLEU"][1].p_value))


@dataclass(frozen=True)
class Tested:
    """What is known of a difference.

    Attributes:
        drawn: [R] its bootstrap.
        p: of no difference.
        could_show: the least true difference that would have been shown in 4 of 5 such samples.
    """

    drawn: np.ndarray
    p: float
    could_show: float | None


def compare_scores(
    a: np.ndarray, b: np.ndarray, resamplings: int, rng: np.random.Generator, right: float = 1.0
) -> Tested:
    """The mean of a − b: McNemar's exact test if all scores are 0 or `right`, else the bootstrap.

    Args:
        a, b: [D] of the same documents, D > 0.
    """
    drawn = resampled_means(a - b, resamplings, rng)
    if not np.isin([a, b], (0, right)).all():
        return Tested(drawn, bootstrap_p(drawn), smallest_shown_by(drawn))
    wins, losses = int((a > b).sum()), int((a < b).sum())
    share = smallest_shown(len(a), wins + losses)
    return Tested(drawn, mcnemar(wins, losses), None if share is None else right * share)


def compare_translations(
    a: Translations, b: Translations, resamplings: int, rng: np.random.Generator
) -> Tested:
    """BLEU of a − BLEU of b, of the same documents."""
    drawn = resampled_bleu(a, b, resamplings, rng)
    return Tested(drawn, bleu_p(a, b), smallest_shown_by(drawn))
