"""Rows of the layouts that benchmarks come in, as the rows that their stock tasks read."""

import re
from collections.abc import Sequence

from fusellm.errors import EvaluationError
from fusellm.evaluation.suites.data import Row

_QUESTION = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n"
    r"(Answer1: .*)\n\nAnswer format: answer1((?:/answer\d)+)",
    re.DOTALL,
)
_YES_OR_NO = re.compile(
    r"Please answer the following question with true or false, question: (.*)\?\n\n"
    r"Answer format: true/false",
    re.DOTALL,
)
_CHOICE = re.compile(r"(?:^| )Answer(\d): ")
_LETTERS = "ABCDEFGH"
_DATE = ("day", "month", "year")


def arc_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of allenai/ai2_arc, from themselves or from instruction/answer records.

    Raises:
        EvaluationError: a record's choices cannot be told apart.
    """
    return tuple(_choices(number, row, "question") for number, row in enumerate(rows))


def openbookqa_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of allenai/openbookqa, from themselves or from instruction/answer records.

    Raises:
        EvaluationError: a record's choices cannot be told apart.
    """
    return tuple(_choices(number, row, "question_stem") for number, row in enumerate(rows))


def _choices(number: int, row: Row, key: str) -> Row:
    if "instruction" not in row:
        choices = {"text": list(row["choices"]["text"]), "label": list(row["choices"]["label"])}
        return {key: row[key], "choices": choices, "answerKey": row["answerKey"]}
    question, texts = choices_of(number, row["instruction"])
    place = re.fullmatch(r"answer(\d)", row["answer"])
    if place is None or not 1 <= int(place[1]) <= len(texts):
        raise EvaluationError(
            f"record {number} has the answer {row['answer']!r}, which is none; get its file again"
        )
    labels = list(_LETTERS[: len(texts)])
    choices = {"text": texts, "label": labels}
    return {key: question, "choices": choices, "answerKey": labels[int(place[1]) - 1]}


def choices_of(number: int, instruction: str) -> tuple[str, list[str]]:
    """Question and choices of an instruction of LLM-Adapters' commonsense sets.

    >>> choices_of(0, "Please choose the correct answer to the question: Up?\\n\\n"
    ...     "Answer1: yes Answer2: no\\n\\nAnswer format: answer1/answer2")
    ('Up?', ['yes', 'no'])

    Raises:
        EvaluationError: they cannot be told apart.
    """
    whole = _QUESTION.fullmatch(instruction)
    if whole is not None:
        _, *parts = _CHOICE.split(whole[2])
        places, texts = parts[::2], parts[1::2]
        wanted = [str(n + 1) for n in range(whole[3].count("/") + 1)]
        if places == wanted and all(text.strip() == text != "" for text in texts):
            return whole[1], texts
    raise EvaluationError(
        f"record {number} has choices that cannot be told apart: {instruction[:200]!r}; get "
        "its file again"
    )


def boolq_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of aps/super_glue's boolq, from themselves, google/boolq's or instruction records.

    The last have no passage, and neither have their rows then.

    Raises:
        EvaluationError: a record is none.
    """
    return tuple(_yes_or_no(number, row) for number, row in enumerate(rows))


def _yes_or_no(number: int, row: Row) -> Row:
    if "instruction" not in row:
        label = row["label"] if "label" in row else row["answer"]
        return {"question": row["question"], "passage": row["passage"], "label": int(label)}
    question = _YES_OR_NO.fullmatch(row["instruction"])
    if question is None or row["answer"] not in ("true", "false"):
        raise EvaluationError(
            f"record {number} is no question of BoolQ: {row!r:.200}; get its file again"
        )
    return {"question": question[1], "label": int(row["answer"] == "true")}


def hellaswag_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of Rowan/hellaswag, with what its stock task reads."""
    keys = ("activity_label", "ctx_a", "ctx_b", "endings")
    return tuple({key: row[key] for key in keys} | {"label": str(row["label"])} for row in rows)


def triviaqa_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of mandarjoshi/trivia_qa, with what its stock task reads."""
    return tuple(
        {"question": row["question"], "answer": {"aliases": list(row["answer"]["aliases"])}}
        for row in rows
    )


def drop_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of EleutherAI/drop, from themselves or from those of ucinlp/drop.

    The latter have every span of every annotator in one list, so that each counts as an answer
    of its own: the parts of an answer of several spans are not told from each other's
    alternatives.
    """
    return tuple(_drop(row) for row in rows)


def _drop(row: Row) -> Row:
    kept = {key: row[key] for key in ("query_id", "passage", "question")}
    if "answers_spans" in row:
        spans = list(dict.fromkeys(row["answers_spans"]["spans"]))
        answers = [_one_span(span) for span in spans]
        return kept | {"answer": answers[0], "validated_answers": _columns(answers[1:])}
    validated = row["validated_answers"]
    if isinstance(validated, list):
        validated = _columns(validated)
    return kept | {
        "answer": _three(row["answer"]),
        "validated_answers": {key: list(validated[key]) for key in ("number", "date", "spans")},
    }


def _one_span(span: str) -> Row:
    return {"number": "", "date": dict.fromkeys(_DATE, ""), "spans": [span]}


def _three(answer: Row) -> Row:
    date = {key: (answer.get("date") or {}).get(key, "") for key in _DATE}
    return {"number": str(answer["number"]), "date": date, "spans": list(answer["spans"])}


def _columns(answers: Sequence[Row]) -> Row:
    plain = [_three(answer) for answer in answers]
    return {key: [answer[key] for answer in plain] for key in ("number", "date", "spans")}
