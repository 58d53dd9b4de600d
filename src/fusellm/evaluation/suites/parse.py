"""Reading an answer out of what a model wrote: pure functions of text."""

import math
import re
import string

SCIBENCH_TOLERANCE = 0.05
"""Relative; SciBench's own (arXiv 2307.10635, its evaluation code)."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SAID = re.compile(r"So the answer is (.*?)\.")
_SAID_TO_LINE_END = re.compile(r"So the answer is (.*?)(?:\.(?=\s|$)|$)", re.MULTILINE)

_MINUS = "-−–"
_SIGN = r"(?:(?<![\w)}.])[-+−–]\s?)?"
_DIGITS = r"(?<![A-Za-z_\d.])(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_TEN_TO = r"10\s*(?:\^|\*\*)\s*\{?\s*"
_POWER = r"[-+−–]?\d+"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:"
    rf"\\d?frac\{{(?P<above>\d+)\}}\{{(?P<below>\d+)\}}"
    rf"|{_TEN_TO}(?P<alone>{_POWER})"
    rf"|(?P<digits>{_DIGITS})(?:"
    r"\s*/\s*(?P<over>\d+)(?![\d.])"
    r"|[eE](?P<e>[-+−]?\d+)"
    rf"|\s*(?:\\times|\\cdot|×|·|x|\*)\s*{_TEN_TO}(?P<power>{_POWER}))?"
    r")"
)


def bbh_answer(response: str) -> str:
    """The answer that open-instruct reads (eval/bbh/run_eval.py, commit 0ddab2b), as the paper did.

    What stands between the first `So the answer is ` and the next full stop of its line; where
    there is none, all up to the first blank line.

    >>> bbh_answer("First we count. So the answer is (Q). ")
    '(Q)'
    >>> bbh_answer(" True\\n\\nQ: and then?")
    'True'
    """
    said = _SAID.search(response)
    if said is not None:
        return said[1].strip()
    return response.strip().split("\n\n")[0].strip()


def bbh_plain_answer(response: str) -> str:
    """The same, but an answer without a full stop ends with its line.

    >>> bbh_plain_answer("We sort. So the answer is ant bee")
    'ant bee'
    """
    said = _SAID_TO_LINE_END.search(response)
    return bbh_answer(response) if said is None else said[1].strip()


def same_but_for_case_and_punctuation(answer: str, target: str) -> bool:
    """Exact match as `evaluate`'s exact_match with ignore_case and ignore_punctuation.

    Answers of punctuation alone are alike to it, and so are a number and its negative, which two
    tasks of BBH feel: dyck_languages and multistep_arithmetic_two.

    >>> same_but_for_case_and_punctuation("(a)", "(A)")
    True
    >>> same_but_for_case_and_punctuation("-5", "5")
    True
    """
    return _bare(answer) == _bare(target)


def _bare(text: str) -> str:
    return text.lower().translate(_WITHOUT_PUNCTUATION)


def same_but_for_case_and_space(answer: str, target: str) -> bool:
    """Whether two answers are equal with punctuation kept.

    >>> same_but_for_case_and_space("> )", "> ]")
    False
    """
    return answer.lower().split() == target.lower().split()


def scibench_number(response: str) -> float | None:
    r"""The number that a solution ends with, or None.

    In this order: what the last `\boxed{}` holds, the first number after the last `answer is`,
    the last number of the text.

    >>> scibench_number(r"so $v = 3$ and the answer is $1.5 \times 10^{3}$ m/s (2 digits)")
    1500.0
    """
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", response)
    if boxed:
        return _first(boxed[-1])
    _, said, after = response.rpartition("answer is")
    if said and (number := _first(after)) is not None:
        return number
    numbers = [_value(match) for match in _NUMBER.finditer(response)]
    return numbers[-1] if numbers else None


def _first(text: str) -> float | None:
    match = _NUMBER.search(text)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> float:
    sign = -1.0 if match["sign"].strip() in tuple(_MINUS) else 1.0
    if match["above"]:
        return sign * _ratio(float(match["above"]), float(match["below"]))
    if match["alone"]:
        return sign * _power(match["alone"])
    value = float(match["digits"].replace(",", ""))
    if match["over"]:
        return sign * _ratio(value, float(match["over"]))
    exponent = match["e"] or match["power"]
    return sign * value * (_power(exponent) if exponent else 1.0)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _power(exponent: str) -> float:
    tens = int(exponent.replace("−", "-").replace("–", "-"))
    return 10.0**tens if abs(tens) <= 300 else math.nan


def close_enough(number: float | None, target: float) -> bool:
    """Whether a number is within SciBench's tolerance of the right one.

    >>> close_enough(104.9, 100.0), close_enough(None, 100.0)
    (True, False)
    """
    return number is not None and math.isclose(number, target, rel_tol=SCIBENCH_TOLERANCE)
