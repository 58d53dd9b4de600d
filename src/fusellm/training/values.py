"""Values of TrainingArguments, which transformers itself takes whatever they are.

Its types are annotations only. What is out of range fails once training begins, or never does: a
negative `max_grad_norm` turns the gradient round.
"""

from collections.abc import Callable
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter
from transformers import TrainingArguments

from fusellm.errors import RecipeError

_Range = tuple[Callable[[float], bool], str]
_ONE_OR_MORE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "torch_empty_cache_steps",
    "dataloader_prefetch_factor",
    "ddp_bucket_cap_mb",
    "ddp_timeout",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "eval_delay",
    "neftune_noise_alpha",
)
_MOST_WORKERS = 128  # each is a process
_LARGEST = 2**32 - 1  # of seeds; what is larger elsewhere is a mistake
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(_ONE_OR_MORE, (lambda x: x >= 1, "1 or more")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda x: x >= 0, "0 or more")),
    **dict.fromkeys(
        ("num_train_epochs", "logging_steps", "save_steps"), (lambda x: x > 0, "more than 0")
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda x: 0 <= x < 1, "0 or more, below 1")),
    "max_steps": (lambda x: x == -1 or x >= 1, "1 or more; -1 is for all epochs"),
    "dataloader_num_workers": (lambda x: 0 <= x <= _MOST_WORKERS, f"0 to {_MOST_WORKERS}"),
    "seed": (lambda x: 0 <= x <= _LARGEST, f"0 to {_LARGEST}"),
}
_ALSO: dict[str, type] = {"fsdp": bool}
"""What transformers takes besides what it says."""
_SPOKEN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list of texts",
    dict: "a mapping",
    NoneType: "null",
}


def checked(place: str, key: str, value: Any) -> Any:
    """A value as TrainingArguments should have it; the text "1e-4" is a number to it too.

    Args:
        place: of the key in the recipe, "training".

    Raises:
        RecipeError: it is of another type, or out of its range.
    """
    kinds = _kinds(key)
    try:
        if isinstance(value, bool) and bool not in kinds:  # which is a number to Python
            raise ValueError
        is_also = type(value) is _ALSO.get(key)
        setting = value if is_also else _adapter(key).validate_python(value)
    except (ValueError, RecursionError):  # of pydantic too
        raise RecipeError(f"{place}.{key}: {as_written(value)} is not {_spoken(kinds)}") from None
    if isinstance(setting, int | float) and not isinstance(setting, bool):
        fits, words = _RANGES.get(key, (lambda _: True, ""))
        if not abs(setting) <= _LARGEST:  # nor NaN
            fits, words = (lambda _: False), f"a number up to {_LARGEST}"
        if not fits(setting):
            raise RecipeError(f"{place}.{key} is {as_written(value)}, and has to be {words}")
    return setting


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainingArguments)


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(_hints()[key], config=ConfigDict(arbitrary_types_allowed=True))


@cache
def _kinds(key: str) -> frozenset[type]:
    """The types of a setting: list[str] | None is list and NoneType; an enumeration is text."""
    hint = _hints()[key]
    kinds = set()
    for part in get_args(hint) if _is_union(hint) else [hint]:
        kind = get_origin(part) or part
        kinds.add(str if isinstance(kind, type) and issubclass(kind, Enum) else kind)
    return frozenset({*kinds, *([_ALSO[key]] if key in _ALSO else [])})


def _is_union(hint: Any) -> bool:
    return get_origin(hint) is not None and get_origin(hint) not in (list, dict)


def _spoken(kinds: frozenset[type]) -> str:
    words = [word for kind, word in _SPOKEN.items() if kind in kinds]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def as_written(value: Any) -> str:
    """A value as a recipe has it, cut where it is long.

    >>> as_written(None), as_written("adamw")
    ('null', "'adamw'")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
