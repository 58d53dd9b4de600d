"""Statistics of paired scores: by hand, against scipy and sacrebleu, and by simulation."""

import sys
from itertools import combinations, pairwise, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm.errors import EvaluationError
from fusellm.evaluation.compare.bleu import Translations
from fusellm.evaluation.compare.statistics import (
    LEVEL,
    Estimate,
    compare,
    compare_means,
    estimates,
    holm,
    least_p,
    mcnemar,
    mean_of,
    pass_at_k,
    smallest_mean_shown,
    smallest_shown,
)

REASON = "needs the extra: pip install 'fusellm[eval]'"
scipy_stats = pytest.importorskip("scipy.stats", reason=REASON)
sacrebleu = pytest.importorskip("sacrebleu", reason=REASON)
significance = pytest.importorskip("sacrebleu.significance", reason=REASON)

quick = settings(max_examples=60, deadline=None, derandomize=True)
WORDS = [f"w{i}" for i in range(50)]


def noisy(sentences: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """Translations of which a share of the words is wrong."""
    return [
        " ".join(w if rng.random() > share else WORDS[rng.integers(50)] for w in s.split())
        for s in sentences
    ]


def corpus(documents: int, seed: int) -> tuple[list[str], np.random.Generator]:
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in rng.integers(50, size=12)) for _ in range(documents)], rng


# McNemar


def test_mcnemar_by_hand() -> None:
    """5 against 15: twice the chance of at most 5 heads in 20."""
    by_hand = 2 * sum(comb(20, k) for k in range(6)) / 2**20
    assert by_hand == pytest.approx(0.0413895, abs=1e-7)
    assert mcnemar(5, 15) == pytest.approx(by_hand)
    assert mcnemar(0, 6) == pytest.approx(2 / 64)


@quick
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_twice_the_smaller_tail(wins: int, losses: int) -> None:
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(wins, losses) == mcnemar(losses, wins)


# The test of signs, and its interval


def estimate(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Estimate:
    """Of the mean of some differences [D]."""
    (found,) = estimates(values[:, None], np.ones(len(values)), draws, np.random.default_rng(seed))
    return found


def p_of_signs(values: np.ndarray) -> float:
    """By its definition: the share of all choices of signs with as large a sum, on either side."""
    sums = np.array(list(product([1, -1], repeat=len(values)))) @ values
    sides = (sums >= values.sum() - 1e-9).mean(), (sums <= values.sum() + 1e-9).mean()
    return float(min(1.0, 2 * min(sides)))


some_values = st.lists(st.integers(-9, 9), min_size=1, max_size=9).map(np.array)


@quick
@given(some_values)
def test_p_is_that_of_all_signs(values: np.ndarray) -> None:
    assert estimate(values / 7).p == pytest.approx(p_of_signs(values / 7))


@quick
@given(st.lists(st.integers(-9, 9), min_size=6, max_size=9).map(np.array))
def test_the_interval_is_what_the_same_test_does_not_reject(values: np.ndarray) -> None:
    low, high = estimate(values / 7).interval or (np.nan, np.nan)
    step = 1e-6
    for inside, outside in ((low, low - step), (high, high + step)):
        assert p_of_signs(values / 7 - inside) > LEVEL
        assert p_of_signs(values / 7 - outside) <= LEVEL


def test_p_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    values = np.round(rng.normal(0.25, 1, 60), 1)
    theirs = scipy_stats.permutation_test(
        (values, np.zeros(60)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=rng,
    )
    assert 0.02 < theirs.pvalue < 0.2
    assert estimate(values, 20_000).p == pytest.approx(theirs.pvalue, abs=0.008)


def test_intervals_of_normal_differences_are_students() -> None:
    values = np.random.default_rng(5).normal(size=40)
    ours, theirs = estimate(values, 20_000), scipy_stats.ttest_1samp(values, 0)
    assert ours.error == pytest.approx(theirs._standard_error)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.015)
    assert ours.interval == pytest.approx(theirs.confidence_interval(), abs=0.06 * ours.error)


def test_a_ratio_is_tested_by_its_own_signs() -> None:
    """Σ y / Σ w is not rejected as x where the signs of y − x w do not reject 0."""
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 50, 8).astype(float)
    y = weights * rng.normal(0.3, 0.5, 8)
    (found,) = estimates(y[:, None], weights, 1000, rng)
    assert found.value == pytest.approx(y.sum() / weights.sum())
    assert found.p == pytest.approx(p_of_signs(y))
    low, high = found.interval or (np.nan, np.nan)
    for end, out in ((low, -1e-6), (high, 1e-6)):
        assert p_of_signs(y - weights * end) > LEVEL >= p_of_signs(y - weights * (end + out))


@pytest.mark.parametrize("documents", [4, 6, 12, 40, 300])
@pytest.mark.parametrize("kind", ["right or wrong", "few values", "many values"])
def test_p_and_interval_say_the_same(kind: str, documents: int) -> None:
    rng = np.random.default_rng(documents)
    said = []
    for shift in np.linspace(-0.5, 0.5, 11):
        if kind == "right or wrong":
            a, b = rng.random(documents) < 0.5 + shift, rng.random(documents) < 0.5
        else:
            a, b = rng.normal(shift, 1, documents), rng.normal(0, 1, documents)
        if kind == "few values":
            a, b = np.round(a), np.round(b)
        found = compare(a * 1.0, b * 1.0, 200, rng, right=1.0).estimate
        low, high = found.interval or (-np.inf, np.inf)
        assert (found.p > LEVEL) == (low <= 0 <= high)
        said.append(found.p > LEVEL)
    assert any(said)
    assert documents < 12 or not all(said)


def test_draws_do_not_contradict_an_exact_p() -> None:
    """Where p is known, the interval's end is on its side of 0 whatever was drawn."""
    drawn = np.linspace(-1, 9, 99)
    for known in (0.049, 0.051):
        for sign in (1, -1):
            found = Estimate(4.0 * sign, 1.0, sign * (drawn + 0.8), known)
            low, high = found.interval or (np.nan, np.nan)
            assert (low <= 0 <= high) == (known > LEVEL)


def test_tests_hold_their_level_and_intervals_cover() -> None:
    """400 samples of two models of 40 and 45 percent, and of two that are equally good."""
    rng = np.random.default_rng(0)
    hard = rng.random((300, 400))
    a, b, same = (hard + rng.normal(0, 0.1, (300, 400)) < share for share in (0.45, 0.40, 0.40))
    found = estimates(1.0 * a - b, np.ones(300), 1000, rng)
    ends = [one.interval or (np.nan, np.nan) for one in found]
    assert 0.92 <= np.mean([low <= 0.05 <= high for low, high in ends]) <= 0.98
    counts = zip((same & ~b).sum(axis=0), (b & ~same).sum(axis=0), strict=True)
    p = [mcnemar(int(wins), int(losses)) for wins, losses in counts]
    assert 0.005 <= np.mean(np.array(p) <= LEVEL) <= 0.06


@pytest.mark.parametrize(("documents", "share"), [(10, 1.0), (20, 1.0), (164, 0.05)])
def test_scores_of_equally_good_models_are_rarely_told_apart(documents: int, share: float) -> None:
    """Skewed scores, few documents, few that differ: where a bootstrap rejects 7 to 11 %."""
    rng = np.random.default_rng(1)
    scores = rng.lognormal(0, 1, (2, documents, 3000))
    differences = (scores[0] - scores[1]) * (rng.random((documents, 3000)) < share)
    found = estimates(differences, np.ones(documents), 1000, rng)
    assert np.mean([one.p <= LEVEL for one in found]) <= 0.06


@quick
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), min_size=2, max_size=200), st.data())
def test_the_negative_has_the_negative_draws(values: list[float], data: st.DataObject) -> None:
    a = np.array(values)
    b = np.array(data.draw(st.permutations(values)))
    there, back = (compare(x, y, 200, np.random.default_rng(1)) for x, y in ((a, b), (b, a)))
    np.testing.assert_array_equal(there.estimate.drawn, -back.estimate.drawn)
    assert there.estimate.p == back.estimate.p
    assert there.could_show == back.could_show


def test_equal_scores_differ_by_nothing() -> None:
    a = np.random.default_rng(0).random(100)
    tested = compare(a, a, 500, np.random.default_rng(0))
    assert tested.estimate.interval == (0, 0)
    assert tested.estimate.p == 1
    assert tested.could_show is None
    right = (a > 0.5).astype(float)
    assert compare(right, right, 500, np.random.default_rng(0), right=1.0).estimate.p == 1


def test_five_documents_can_show_nothing() -> None:
    for documents, bounded in ((1, False), (5, False), (6, True)):
        found = estimate(np.arange(1.0, documents + 1))
        assert (found.interval is not None) == bounded
        assert found.p == least_p(documents)
        assert (found.p <= LEVEL) == bounded


def test_many_tasks_have_as_many_draws_as_their_correction_needs() -> None:
    """With 100 draws p is at least 0.02, which is above 0.05 / 27."""
    better = np.random.default_rng(0).normal(1, 1, 100)
    found = compare(better, np.zeros(100), 100, np.random.default_rng(0), tasks=27).estimate
    assert 27 * found.p <= LEVEL


# Means of tasks


def test_the_mean_of_one_task_is_that_task() -> None:
    one = estimate(np.random.default_rng(1).normal(0.3, 1, 50), 10_000)
    mean = mean_of([one], 10_000, np.random.default_rng(0))
    assert (mean.value, mean.error) == (one.value, one.error)
    assert mean.p == pytest.approx(one.p, abs=0.02)
    assert mean.interval == pytest.approx(one.interval, abs=0.1 * one.error)


def test_a_task_of_too_few_documents_leaves_the_mean_without_an_interval() -> None:
    many, few = estimate(np.ones(50)), estimate(np.ones(5))
    assert mean_of([many, many], 500, np.random.default_rng(0)).p <= LEVEL
    tested = compare_means([many, few], 500, np.random.default_rng(0))
    assert (tested.estimate.value, tested.estimate.p, tested.least_p) == (1, 1, 1)
    assert tested.estimate.interval is None


# Holm


def test_holm_by_hand() -> None:
    """0.005·4, 0.01·3, 0.03·2, and 0.04·1 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, of_holm in zip(p_values, corrected, strict=True):
        assert p <= of_holm <= min(1, len(p_values) * p) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
    assert min(corrected) == pytest.approx(min(1, len(p_values) * min(p_values)))


# What a sample could have shown


@pytest.mark.parametrize(
    ("documents", "discordance", "points"),
    [
        (6511, 0.20, 1.6),  # BBH
        (2376, 0.08, 1.6),  # ARC-easy
        (1172, 0.10, 2.6),  # ARC-challenge
        (3270, 0.10, 1.6),  # BoolQ
        (10042, 0.05, 0.6),  # HellaSwag
        (500, 0.10, 4.0),  # OpenBookQA
    ],
)
def test_what_the_papers_benchmarks_can_show(
    documents: int, discordance: float, points: float
) -> None:
    """The normal approximation's figures, of which the exact test needs a little more."""
    share = smallest_shown(documents, round(documents * discordance))
    assert share is not None
    assert 100 * share == pytest.approx(points, abs=0.1)
    approximate = 2.8016 * (discordance / documents) ** 0.5
    assert approximate < share < 1.04 * approximate


@pytest.mark.parametrize(("documents", "discordant"), [(250, 50), (250, 0), (40, 9), (164, 12)])
def test_it_is_shown_in_four_of_five_samples(documents: int, discordant: int) -> None:
    share = smallest_shown(documents, discordant)
    assert share is not None
    rng = np.random.default_rng(4)
    discordance = max(discordant / documents, share)
    wins_share = (discordance + share) / 2
    counts = rng.multinomial(
        documents, [wins_share, discordance - wins_share, 1 - discordance], 4000
    )
    shown = np.mean([mcnemar(int(w), int(loss)) <= 0.05 and w > loss for w, loss, _ in counts])
    assert shown == pytest.approx(0.8, abs=0.03)


def test_a_tiny_sample_can_show_nothing() -> None:
    """With 5 documents the least p is 1/16."""
    assert smallest_shown(5, 3) is None
    assert smallest_shown(0, 0) is None
    all_six = 0.8 ** (1 / 6)  # the chance of each that all are won in 4 of 5 samples
    assert smallest_shown(6, 6) == pytest.approx(2 * all_six - 1, abs=1e-5)


def test_more_documents_show_less() -> None:
    shown = [smallest_shown(n, n // 5) for n in (20, 50, 100, 500, 5000)]
    assert all(a is not None and b is not None and a > b for a, b in pairwise(shown))


@pytest.mark.parametrize("tasks", [1, 5, 27])
def test_among_tasks_it_is_shown_in_four_of_five_samples_after_holm(tasks: int) -> None:
    """One of so many tasks differs; the p of the others are those of models that do not."""
    rng = np.random.default_rng(tasks)
    share = smallest_shown(250, 50, LEVEL / tasks)
    assert share is not None
    counts = rng.multinomial(250, [0.1 + share / 2, 0.1 - share / 2, 0.8], 2000)
    equal = [mcnemar(int(w), int(loss)) for w, loss, _ in rng.multinomial(250, [0.1, 0.1, 0.8], 99)]
    shown = [
        w > loss and holm([mcnemar(int(w), int(loss)), *rng.choice(equal, tasks - 1)])[0] <= LEVEL
        for w, loss, _ in counts
    ]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.045)


def test_what_scores_could_show_is_that_of_right_and_wrong() -> None:
    """Differences of +1 and −1 are told apart alike by either formula, where there are many."""
    differences = np.repeat([1.0, -1.0, 0.0], [150, 150, 700])
    for level in (LEVEL, LEVEL / 27):
        by_counts = smallest_shown(1000, 300, level)
        assert smallest_mean_shown(differences, level) == pytest.approx(by_counts, rel=0.03)


def test_what_scores_could_show_is_that_of_students_test() -> None:
    """20 documents, power by the noncentral distribution."""
    values = np.random.default_rng(0).normal(size=20)
    shown = smallest_mean_shown(values)
    assert shown is not None
    limit = scipy_stats.t.isf(0.025, 19)
    noncentrality = 20**0.5 * shown / values.std(ddof=1)
    assert scipy_stats.nct.sf(limit, 19, noncentrality) == pytest.approx(0.8, abs=0.01)


def test_nothing_is_said_where_too_little_is_known() -> None:
    assert smallest_mean_shown(np.zeros(100)) is None
    assert smallest_mean_shown(np.repeat([1.0, 0.0], [1, 99])) is None
    six = np.array([1.0, -2.0, 3.0, 1.0, -1.0, 0.5])
    assert smallest_mean_shown(six) is None
    assert smallest_mean_shown(np.tile(six, 4), LEVEL / 27) is not None
    assert smallest_mean_shown(np.repeat([1.0, -1.0, 0.0], [2, 1, 9997]), 1e-9) is None


# pass@k


@quick
@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@quick
@given(st.integers(1, 300), st.data())
def test_pass_at_k_is_the_product_of_the_paper(n: int, data: st.DataObject) -> None:
    """The form of Chen et al. 2021, figure 3."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    product = 1.0 if n - c >= k else 0.0
    for i in range(n - c + 1, n + 1):
        product *= 1 - k / i
    assert pass_at_k(n, c, k) == pytest.approx(1 - product)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_of_fewer_samples_is_refused(k: int) -> None:
    with pytest.raises(EvaluationError, match=f"pass@{k} needs at least .* there are 3"):
        pass_at_k(3, 1, k)


# BLEU


def test_bleu_is_that_of_sacrebleu() -> None:
    references, rng = corpus(80, 0)
    for share in (0.2, 0.6, 1.0):
        responses = noisy(references, share, rng)
        expected = sacrebleu.corpus_bleu(responses, [references]).score
        assert Translations(responses, references).bleu == pytest.approx(expected, abs=1e-9)
    silent = Translations([""] * 80, references)
    assert silent.bleu == 0


def test_points_of_documents_have_bleu_as_their_mean_and_its_error() -> None:
    """Against BLEU of documents drawn with replacement, by sacrebleu itself."""
    references, rng = corpus(60, 1)
    texts = [noisy(references, share, rng) for share in (0.3, 0.4)]
    a, b = (Translations(of, references) for of in texts)
    assert a.points.mean() == pytest.approx(a.bleu)
    slow = []
    for _ in range(400):
        chosen = rng.integers(60, size=60)
        scores = [
            sacrebleu.corpus_bleu([of[i] for i in chosen], [[references[i] for i in chosen]]).score
            for of in texts
        ]
        slow.append(scores[0] - scores[1])
    found = estimate(a.points - b.points)
    assert found.value == pytest.approx(a.bleu - b.bleu)
    assert found.error == pytest.approx(np.std(slow), rel=0.12)


def test_p_of_bleu_is_near_those_of_sacrebleu() -> None:
    """Of its randomization, and twice that of its bootstrap, which is of one side."""
    references, rng = corpus(60, 2)
    texts = {name: noisy(references, share, rng) for name, share in (("a", 0.36), ("b", 0.4))}
    a, b = (Translations(of, references).points for of in texts.values())
    theirs = {}
    for kind in ("ar", "bs"):
        _, found = significance.PairedTest(
            [("b", texts["b"]), ("a", texts["a"])],
            {"BLEU": sacrebleu.metrics.BLEU()},
            [references],
            test_type=kind,
            n_samples=2000,
        )()
        theirs[kind] = found["BLEU"][1].p_value
    ours = compare(a, b, 10_000, rng).estimate.p
    assert 0.001 < ours < 0.5
    assert ours == pytest.approx(theirs["ar"], abs=0.05)
    assert ours == pytest.approx(2 * theirs["bs"], abs=0.05)


def test_translations_compared() -> None:
    references, rng = corpus(100, 3)
    good, bad = (Translations(noisy(references, share, rng), references) for share in (0.1, 0.5))
    found = compare(good.points, bad.points, 500, np.random.default_rng(0)).estimate
    low, high = found.interval or (np.nan, np.nan)
    assert 0 < low < good.bleu - bad.bleu < high
    assert found.p < 0.05


@pytest.mark.slow
def test_level_of_the_test_of_bleu() -> None:
    rejected = []
    for seed in range(400):
        references, rng = corpus(60, seed)
        a, b = (Translations(noisy(references, 0.3, rng), references).points for _ in range(2))
        rejected.append(compare(a, b, 1000, rng).estimate.p <= LEVEL)
    assert 0.02 <= np.mean(rejected) <= 0.08


# The extra


@pytest.mark.parametrize("module", ["scipy.stats", "sacrebleu.metrics"])
def test_a_missing_package_is_named_with_its_cure(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(EvaluationError, match=f"^{package} is needed .*fusellm\\[eval\\]"):
        mcnemar(1, 2) if package == "scipy" else Translations([], [])
