"""The tasks whose prompt or scoring is ours because lm_eval has none like them."""

import math
from collections.abc import Sequence
from typing import Any

from fusellm.errors import EvaluationError
from fusellm.evaluation.suites.data import Row
from fusellm.evaluation.suites.parse import (
    SCIBENCH_TOLERANCE,
    bbh_answer,
    bbh_plain_answer,
    close_enough,
    same_but_for_case_and_punctuation,
    same_but_for_case_and_space,
    scibench_number,
)
from fusellm.evaluation.suites.task import Definition, Inputs

BBH_NEW_TOKENS = SCIBENCH_NEW_TOKENS = 512
IWSLT_NEW_TOKENS = 256
SCIBENCH_BOOKS = (
    *("atkins", "calculus", "chemmc", "class", "diff"),
    *("fund", "matter", "quan", "stat", "thermo"),
)


def bbh(inputs: Inputs) -> Definition:
    """A task of BIG-Bench Hard as the paper's evaluator, open-instruct, runs it.

    The text of examples without its two lines of canary, the question, `A:` and no more; greedy,
    at most 512 tokens. Other than there, writing stops where the next question would begin.

    Raises:
        EvaluationError: the text of examples is none.
    """
    lines = inputs.texts["prompt"].splitlines(keepends=True)
    examples = "".join(lines[2:]).strip()
    if "\nA: Let's think step by step." not in examples:
        raise EvaluationError(
            "the file of a BBH prompt has no worked examples below its first two lines; it should "
            "be one of suzgunmirac/BIG-Bench-Hard:cot-prompts"
        )
    rows = tuple(
        {"prompt": f"{examples}\n\nQ: {row['input']}\nA:"}
        | {key: row[key] for key in ("input", "target")}
        for row in inputs.rows["questions"]
    )
    config = _writing(BBH_NEW_TOKENS, ["\n\nQ:"], "exact_match", "strict_match")
    config |= {"doc_to_text": _prompt, "doc_to_target": _target, "process_results": bbh_scores}
    notes = (
        "open-instruct's prompt, with worked examples in it, and its reading of the answer; case "
        "and punctuation do not count",
        "ours: writing stops at the next 'Q:' after a blank line",
        "strict_match: punctuation counts, and an answer may end with its line",
    )
    return Definition(rows, config, notes=notes, unread=_bbh_unread)


def bbh_scores(doc: Row, results: Sequence[str]) -> dict[str, float]:
    """Scores of one response to a BBH question."""
    answer, plain, target = bbh_answer(results[0]), bbh_plain_answer(results[0]), doc["target"]
    return {
        "exact_match": float(same_but_for_case_and_punctuation(answer, target)),
        "strict_match": float(same_but_for_case_and_space(plain, target)),
    }


def _bbh_unread(response: str) -> str:
    return "" if "So the answer is " in response else "no 'So the answer is'"


def iwslt(inputs: Inputs) -> Definition:
    """IWSLT2017 from English to German with one example, scored by BLEU."""
    example, *_ = inputs.rows["validation"]
    before = "{}\n\n".format(_translating(example) + example["translation"]["de"].strip())
    rows = tuple(
        {"prompt": before + _translating(row), "target": row["translation"]["de"].strip()}
        for row in inputs.rows["test"]
    )
    config = _writing(IWSLT_NEW_TOKENS, ["\n"], "bleu", aggregation="bleu")
    config |= {"doc_to_text": _prompt, "doc_to_target": _target, "process_results": _translated}
    notes = (
        "OpenCompass's instruction (iwslt2017_gen_02ea0b), with one example",
        "ours: the example is the first of the validation split for all, not the nearest by BM25; "
        "BLEU is sacrebleu's on the plain text, which OpenCompass cuts up first",
    )
    return Definition(rows, config, notes=notes)


def _translating(row: Row) -> str:
    english = row["translation"]["en"].strip()
    return f"Please translate the following English statements to German:\n{english}\n"


def _translated(doc: Row, results: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {"bleu": (doc["target"], results[0].strip())}


def scibench(inputs: Inputs) -> Definition:
    """SciBench: a number, within a relative tolerance of 5 %."""
    rows = tuple(
        {
            "prompt": _problem(row),
            "target": row["answer_number"].strip(),
            "number": _right_number(row),
        }
        for book in SCIBENCH_BOOKS
        for row in inputs.rows[book]
    )
    config = _writing(SCIBENCH_NEW_TOKENS, ["\n\nProblem:"], "exact_match")
    config |= {"doc_to_text": _prompt, "doc_to_target": _target, "process_results": _solved}
    notes = (
        f"relative tolerance {SCIBENCH_TOLERANCE}, as in SciBench's own evaluation; OpenCompass "
        "compares strings",
        "ours: the prompt, with the unit in it, and no examples; the number is that in the last "
        "\\boxed{}, else the first after the last 'answer is', else the last",
    )
    return Definition(rows, config, notes=notes, unread=_scibench_unread)


def _problem(row: Row) -> str:
    unit = row["unit"].strip()
    asked = f"The answer is one number, in {unit}." if unit else "The answer is one number."
    return f"Problem: {row['problem_text'].strip()}\n{asked}\nSolution:"


def _right_number(row: Row) -> float:
    number = scibench_number(row["answer_number"])
    if number is None or not math.isfinite(number):
        raise EvaluationError(
            f"the answer {row['answer_number']!r} to the problem {row['problem_text'][:80]!r} is "
            "no number; it should be as in mandyyyyii/scibench:dataset/original"
        )
    return number


def _solved(doc: Row, results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(close_enough(scibench_number(results[0]), doc["number"]))}


def _scibench_unread(response: str) -> str:
    return "no number" if scibench_number(response) is None else ""


def _writing(
    new_tokens: int, until: list[str], *metrics: str, aggregation: str = "mean"
) -> dict[str, Any]:
    """Configuration of a task whose answers are written, greedily."""
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": until, "max_gen_toks": new_tokens, "do_sample": False},
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": True}
            for metric in metrics
        ],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }


def _prompt(doc: Row) -> str:
    return str(doc["prompt"])


def _target(doc: Row) -> str:
    return str(doc["target"])
