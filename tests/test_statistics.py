"""Statistics of paired scores: by hand, against scipy and sacrebleu, and by simulation."""

import sys
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusellm.errors import EvaluationError
from fusellm.evaluation.statistics import (
    BLEU_RESAMPLINGS,
    Translations,
    bleu_p,
    bootstrap_p,
    compare_scores,
    compare_translations,
    holm,
    interval,
    mcnemar,
    pass_at_k,
    resampled_bleu,
    resampled_means,
    smallest_shown,
    smallest_shown_by,
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


# Bootstrap


@pytest.mark.parametrize("decimals", [0, 3], ids=["few values", "many values"])
def test_intervals_are_those_of_scipy(decimals: int) -> None:
    rng = np.random.default_rng(3)
    a, b = (np.round(rng.normal(size=300) + shift, decimals) for shift in (0.2, 0.0))
    ours = interval(resampled_means(a - b, 20_000, rng))
    theirs = scipy_stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        batch=500,
        method="percentile",
        rng=rng,
    )
    spread = theirs.standard_error
    assert len(np.unique(a - b)) < 64 or decimals
    assert ours[0] == pytest.approx(theirs.confidence_interval.low, abs=0.06 * spread)
    assert ours[1] == pytest.approx(theirs.confidence_interval.high, abs=0.06 * spread)


def test_intervals_cover_and_tests_hold_their_level() -> None:
    """400 samples of two models of 40 and 45 percent, and of two that are equally good."""
    rng = np.random.default_rng(0)
    covered, wrong = 0, {"mcnemar": 0, "bootstrap": 0}
    for _ in range(400):
        hard = rng.random(300)
        b = (hard + rng.normal(0, 0.1, 300) < 0.40).astype(float)
        a = (hard + rng.normal(0, 0.1, 300) < 0.45).astype(float)
        low, high = interval(resampled_means(a - b, 1000, rng))
        covered += low <= 0.05 <= high
        same = (hard + rng.normal(0, 0.1, 300) < 0.40).astype(float)
        tested = compare_scores(same, b, 1000, rng)
        wrong["mcnemar"] += tested.p <= 0.05
        wrong["bootstrap"] += bootstrap_p(tested.drawn) <= 0.05
    assert 0.92 <= covered / 400 <= 0.98
    assert 0.005 <= wrong["mcnemar"] / 400 <= 0.06
    assert 0.02 <= wrong["bootstrap"] / 400 <= 0.09


@quick
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), min_size=2, max_size=200), st.data())
def test_the_negative_has_the_negative_bootstrap(values: list[float], data: st.DataObject) -> None:
    a = np.array(values)
    b = np.array(data.draw(st.permutations(values)))
    there, back = (compare_scores(x, y, 200, np.random.default_rng(1)) for x, y in ((a, b), (b, a)))
    np.testing.assert_array_equal(there.drawn, -back.drawn)
    assert there.p == back.p
    assert there.could_show == back.could_show


def test_many_values_have_the_negative_bootstrap_too() -> None:
    values = np.random.default_rng(2).normal(size=500)
    there, back = (
        resampled_means(sign * values, 300, np.random.default_rng(5)) for sign in (1, -1)
    )
    np.testing.assert_array_equal(there, -back)
    assert there.std() == pytest.approx(values.std() / 500**0.5, rel=0.15)


def test_p_and_interval_say_the_same() -> None:
    rng = np.random.default_rng(8)
    for shift in np.linspace(0, 4, 80):
        drawn = rng.normal(shift, 1, 2000)
        low, high = interval(drawn)
        if min(abs(low), abs(high)) > 0.02:
            assert (bootstrap_p(drawn) < 0.05) == (low > 0 or high < 0)


def test_equal_scores_differ_by_nothing() -> None:
    a = np.random.default_rng(0).random(100)
    tested = compare_scores(a, a, 500, np.random.default_rng(0))
    assert interval(tested.drawn) == (0, 0)
    assert tested.p == 1
    assert tested.could_show is None
    right = (a > 0.5).astype(float)
    assert compare_scores(right, right, 500, np.random.default_rng(0)).p == 1


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


def test_the_spread_of_a_bootstrap_gives_the_same() -> None:
    a = np.repeat([1.0, 0.0, 1.0], [150, 150, 700])
    b = np.repeat([0.0, 1.0, 1.0], [150, 150, 700])
    tested = compare_scores(a, b, 10_000, np.random.default_rng(0))
    assert smallest_shown_by(tested.drawn) == pytest.approx(tested.could_show, rel=0.05)
    assert smallest_shown_by(np.zeros(10)) is None


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


def test_resampled_bleu_is_the_bleu_of_the_resampled() -> None:
    """sacrebleu's own resamples, and ours, of one system against references that it lacks."""
    references, rng = corpus(60, 1)
    a, b = (Translations(noisy(references, share, rng), references) for share in (0.3, 0.4))
    drawn = resampled_bleu(a, b, 2000, np.random.default_rng(0))
    slow = []
    for _ in range(400):
        chosen = rng.integers(60, size=60)
        scores = [
            sacrebleu.corpus_bleu(
                [system.responses[i] for i in chosen], [[references[i] for i in chosen]]
            ).score
            for system in (a, b)
        ]
        slow.append(scores[0] - scores[1])
    assert drawn.mean() == pytest.approx(np.mean(slow), abs=0.25 * np.std(slow))
    assert drawn.std() == pytest.approx(np.std(slow), rel=0.12)


def test_p_of_bleu_is_twice_that_of_sacrebleu() -> None:
    references, rng = corpus(60, 2)
    texts = {name: noisy(references, share, rng) for name, share in (("a", 0.36), ("b", 0.4))}
    a, b = (Translations(of, references) for of in texts.values())
    _, found = significance.PairedTest(
        [("b", texts["b"]), ("a", texts["a"])],
        {"BLEU": sacrebleu.metrics.BLEU()},
        [references],
        test_type="bs",
        n_samples=BLEU_RESAMPLINGS,
    )()
    assert 0.001 < found["BLEU"][1].p_value < 0.5
    assert bleu_p(a, b) == pytest.approx(2 * found["BLEU"][1].p_value)
    assert bleu_p(b, a) == bleu_p(a, b)
    assert bleu_p(a, a) == 1


def test_translations_compared() -> None:
    references, rng = corpus(100, 3)
    good, bad = (Translations(noisy(references, share, rng), references) for share in (0.1, 0.5))
    tested = compare_translations(good, bad, 500, np.random.default_rng(0))
    low, high = interval(tested.drawn)
    assert low < good.bleu - bad.bleu < high
    assert low > 0
    assert tested.p < 0.05
    back = compare_translations(bad, good, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(tested.drawn, -back.drawn)


@pytest.mark.slow
def test_level_of_the_test_of_bleu() -> None:
    """sacrebleu's p is of one side: two equally good systems differ by it in 1 of 10 cases."""
    rejected = []
    for seed in range(200):
        references, rng = corpus(60, seed)
        a, b = (Translations(noisy(references, 0.3, rng), references) for _ in range(2))
        rejected.append([bleu_p(a, b) / 2 <= 0.05, bleu_p(a, b) <= 0.05])
    ones, twos = np.mean(rejected, axis=0)
    assert ones > 0.065
    assert 0.02 <= twos <= 0.08


# The extra


@pytest.mark.parametrize("module", ["scipy.stats", "sacrebleu.metrics"])
def test_a_missing_package_is_named_with_its_cure(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(EvaluationError, match=f"^{package} is needed .*fusellm\\[eval\\]"):
        mcnemar(1, 2) if package == "scipy" else Translations([], [])
