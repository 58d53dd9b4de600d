"""Bits per byte over documents: values, intervals, and what differs from what."""

import numpy as np
import pytest

from fusellm.evaluation.compare.statistics import MEAN
from fusellm.evaluation.text.intervals import Record, Scores, records

LN2 = np.log(2)
DOCUMENTS = {"prose": 60, "code": 25}


def scores(better: float, sizes: dict[str, int] = DOCUMENTS, seed: int = 0) -> Scores:
    """Two models, `fused` being better by some bits per byte in documents of every length."""
    rng = np.random.default_rng(seed)
    domains = [domain for domain, count in sizes.items() for _ in range(count)]
    scored_bytes = rng.integers(50, 5000, len(domains))
    bits = rng.normal(1.5, 0.3, len(domains))
    gain = rng.normal(better, 0.05, len(domains))
    nats = {"clm": bits * scored_bytes * LN2, "fused": (bits - gain) * scored_bytes * LN2}
    return Scores(domains, scored_bytes, nats)


def found(given: Scores) -> dict[tuple[str, str], Record]:
    return {(r.model, r.task): r for r in records(given, 4000, 0, [("fused", "clm")])}


def test_values_are_sums_over_sums() -> None:
    given = scores(0.05)
    by_place = found(given)
    prose = np.array(given.domains) == "prose"
    expected = given.nats["fused"][prose].sum() / given.scored_bytes[prose].sum() / LN2
    assert by_place["fused", "prose"].value == pytest.approx(expected)
    assert by_place["fused", MEAN].value == pytest.approx(
        (by_place["fused", "prose"].value + by_place["fused", "code"].value) / 2
    )
    for task in ("prose", "code", MEAN):
        difference = by_place["fused", task].value - by_place["clm", task].value
        assert by_place["fused-clm", task].value == pytest.approx(difference)
        assert by_place["fused-clm", task].n == {**DOCUMENTS, MEAN: 85}[task]


def test_a_paired_difference_is_known_better_than_its_models() -> None:
    by_place = found(scores(0.05))
    widths = {place: (r.high or 0) - (r.low or 0) for place, r in by_place.items()}
    for task in ("prose", "code", MEAN):
        assert 0 < 3 * widths["fused-clm", task] < widths["fused", task]
        assert by_place["fused-clm", task].sign == 1
    assert widths["fused-clm", MEAN] < widths["fused-clm", "code"]


def test_equal_models_differ_by_nothing() -> None:
    given = scores(0.05)
    same = Scores(given.domains, given.scored_bytes, dict.fromkeys(given.nats, given.nats["clm"]))
    for task in ("prose", "code", MEAN):
        one = found(same)["fused-clm", task]
        assert (one.value, one.low, one.high, one.sign) == (0, 0, 0, 0)


def test_intervals_cover_with_few_documents() -> None:
    """10 documents of very unequal length, where a bootstrap's cover 9 of 10 times."""
    covered = []
    for seed in range(300):
        one = found(scores(0.02, {"prose": 10}, seed))["fused-clm", "prose"]
        covered.append((one.low or 0) <= -0.02 <= (one.high or 0))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_documents_without_scored_bytes_do_not_count() -> None:
    given = scores(0.05)
    given.scored_bytes[:10] = 0
    for of_model in given.nats.values():
        of_model[:10] = 0
    assert found(given)["fused", "prose"].n == DOCUMENTS["prose"] - 10


def test_five_documents_have_no_interval_nor_then_has_the_mean() -> None:
    by_place = found(scores(0.5, {"prose": 60, "code": 5}))
    assert by_place["fused-clm", "prose"].sign == 1
    for task in ("code", MEAN):
        one = by_place["fused-clm", task]
        assert one.value < 0
        assert (one.low, one.high, one.sign) == (None, None, None)
