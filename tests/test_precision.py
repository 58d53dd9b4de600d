"""The note on a precision that this processor is slow in."""

from typing import Any

import pytest
import torch

from fusellm.config import ModelSettings
from fusellm.models import precision
from fusellm.models.precision import slow_half_note, times_slower

_CPU = torch.device("cpu")


def _models(**dtypes: str) -> dict[str, ModelSettings]:
    return {
        name: ModelSettings.model_validate({"model": "m", "dtype": dtype})
        for name, dtype in dtypes.items()
    }


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "times_slower", lambda dtype: 4.9)


@pytest.mark.parametrize(
    ("models", "training", "cure"),
    [
        ({"target": "float32", "first": "bfloat16"}, {}, "`dtype: float32` for first would"),
        (
            {"target": "bfloat16", "first": "bfloat16"},
            {"bf16": True},
            "`dtype: float32` for target, first and `training.bf16: false` would",
        ),
        ({"first": "float32"}, {"fp16": True}, "(just timed); `training.fp16: false` would"),
        ({"first": "float16"}, {"bf16": True}, "`training.bf16: false` would"),
    ],
)
def test_the_cure_names_what_asks_for_it(
    models: dict[str, str], training: dict[str, Any], cure: str
) -> None:
    note = slow_half_note(_models(**models), training, _CPU)
    assert note is not None
    assert "4.9 times slower" in note
    assert cure in note


def test_nothing_is_said_where_nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    halves, training = _models(first="bfloat16"), {"bf16": True}
    assert slow_half_note(_models(first="float32"), {"bf16": False}, _CPU) is None
    assert slow_half_note(halves, training, torch.device("cuda", 0)) is None
    monkeypatch.setattr(precision, "times_slower", lambda dtype: 0.4)
    assert slow_half_note(halves, training, _CPU) is None


def test_a_product_is_timed() -> None:
    assert 0.001 < times_slower("bfloat16") < 1000


@pytest.mark.parametrize(("slower", "expected"), [(0.4, 0.4), (5.0, 5.0)])
def test_pauses_are_not_taken_for_slowness(
    monkeypatch: pytest.MonkeyPatch, slower: float, expected: float
) -> None:
    """Others at work beside it: the first products in half precision are all interrupted."""
    count = 0

    def seconds(dtype: torch.dtype) -> float:
        nonlocal count
        if dtype == torch.float32:
            return 1.0
        count += 1
        return slower + (10.0 if count < 8 else 0.0)

    monkeypatch.setattr(precision, "_seconds", seconds)
    times_slower.cache_clear()
    assert times_slower("bfloat16") == expected
    times_slower.cache_clear()
