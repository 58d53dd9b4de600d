"""Small tasks made in code: whether an evaluation runs, in a minute and with no data.

Chance is 1/4, 1/2 and 0. They tell a model that reads its context from one that does not; they
are no benchmark.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from fusellm.evaluation.suites.data import Row
from fusellm.evaluation.suites.task import Definition, Inputs
from fusellm.evaluation.yaml_table import yaml_table

PATTERNS, AGREEMENT, RECALL = 64, 64, 24
_SEED = 20240116
_WORDS = yaml_table(__file__)


def patterns(_: Inputs) -> Definition:
    """Which of four words goes on with a sequence that repeats itself."""
    rng = random.Random(_SEED)
    rows = []
    for _row in range(PATTERNS):
        words = rng.sample(_WORDS["things"], 4)
        period = rng.choice((2, 3, 4))
        length = period * 3 + rng.randrange(period)
        shown = " ".join(words[n % period] for n in range(length))
        right = words[length % period]
        choices = rng.sample(words, 4)
        rows.append({"text": shown, "choices": choices, "label": choices.index(right)})
    return Definition(tuple(rows), _choosing())


def agreement(_: Inputs) -> Definition:
    """Whether a verb agrees with its subject, whatever noun stands between them."""
    rng = random.Random(_SEED + 1)
    rows = []
    for _row in range(AGREEMENT):
        number = rng.randrange(2)
        subject, other = rng.sample(_WORDS["nouns"], 2)
        text = f"The {subject[number]} {rng.choice(_WORDS['between'])} the {rng.choice(other)}"
        rows.append({"text": text, "choices": list(rng.choice(_WORDS["verbs"])), "label": number})
    return Definition(tuple(rows), _choosing())


def _choosing() -> dict[str, Any]:
    return _config("multiple_choice", "acc", _label, doc_to_choice=_choices)


def recall(_: Inputs) -> Definition:
    """Whether a number that stands in the text is written again."""
    rng = random.Random(_SEED + 2)
    rows = []
    for _row in range(RECALL):
        names = rng.sample(_WORDS["names"], 3)
        numbers = [str(rng.randint(10, 99)) for _ in names]
        facts = [f"The number of {a} is {b}." for a, b in zip(names, numbers, strict=True)]
        asked = rng.randrange(3)
        text = "\n".join([*facts, f"The number of {names[asked]} is"])
        rows.append({"text": text, "answer": numbers[asked]})
    writing = {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False}
    config = _config("generate_until", "exact_match", _answer, process_results=_recalled)
    return Definition(tuple(rows), config | {"generation_kwargs": writing})


def _config(output: str, metric: str, target: Callable[[Row], Any], **more: Any) -> dict[str, Any]:
    return {
        "output_type": output,
        "doc_to_text": _text,
        "doc_to_target": target,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    } | more


def _text(doc: Row) -> str:
    return str(doc["text"])


def _choices(doc: Row) -> list[str]:
    return list(doc["choices"])


def _label(doc: Row) -> int:
    return int(doc["label"])


def _answer(doc: Row) -> str:
    return str(doc["answer"])


def _recalled(doc: Row, results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
