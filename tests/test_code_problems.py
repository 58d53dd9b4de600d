"""Problems solved by programs: how they are read, cut, judged and counted."""

import gzip
import json
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

import worlds
from fusellm.errors import EvaluationError
from fusellm.evaluation.code.completions import Written
from fusellm.evaluation.code.problems import (
    PYTHON_STOP_TOKENS,
    Problem,
    cut,
    judge,
    problems_file,
    read_problems,
    sample,
)
from fusellm.evaluation.code.sandbox import LANGUAGES, Language, Limits, Toolchain, Verdict
from fusellm.evaluation.code.sandbox.toolchain import with_nonce
from toolchains import SLOW, Toolchains

EVAL = worlds.SHARED / "eval"
needs_shared = pytest.mark.skipif(not EVAL.is_dir(), reason="../shared/eval is not here")


def problem(name: str = "one", **changes: Any) -> Problem:
    kept = {"prompt": "def f(n):", "tests": "assert f(1) == 2\n", "stop_tokens": ("\ndef",)}
    return Problem(name, **(kept | changes))


# Reading

ROW = {
    "name": "HumanEval_0_f",
    "language": "js",
    "prompt": "//Doubles\nfunction f(n){\n",
    "doctests": "transform",
    "original": "f.py",
    "prompt_terminology": "reworded",
    "tests": "test();",
    "stop_tokens": ["\nfunction ", "\n//"],
}
OPENAI = {
    "task_id": "HumanEval/0",
    "prompt": '\ndef f(n):\n    """Doubles."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


def written(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def test_rows_of_multipl_e(tmp_path: Path) -> None:
    other = ROW | {"name": "HumanEval_1_g", "tests": "two();"}
    first, second = read_problems(written(tmp_path / "x.jsonl", ROW, other), "js")
    assert first == Problem(
        "HumanEval_0_f", "//Doubles\nfunction f(n){", "test();", ("\nfunction ", "\n//")
    )
    assert second.tests == "two();"
    assert first.document != second.document


def test_rows_of_human_eval(tmp_path: Path) -> None:
    (read,) = read_problems(written(tmp_path / "x.jsonl.gz", OPENAI), "python")
    assert read.name == "HumanEval/0"
    assert read.prompt == 'def f(n):\n    """Doubles."""'
    assert read.tests.endswith("== 2\n\ncheck(f)\n")
    assert read.stop_tokens == PYTHON_STOP_TOKENS
    (published,) = read_problems(tmp_path / "x.jsonl.gz", "python", verbatim=True)
    assert published.prompt == OPENAI["prompt"]
    assert published.document != read.document


@pytest.mark.parametrize("changes", [{"prompt": "x"}, {"tests": "x"}, {"stop_tokens": ["\nx"]}])
def test_a_document_is_all_that_a_score_depends_on(changes: dict[str, Any], tmp_path: Path) -> None:
    (one,) = read_problems(written(tmp_path / "1.jsonl", ROW), "js")
    (two,) = read_problems(written(tmp_path / "2.jsonl", ROW | changes), "js")
    assert one.document != two.document


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "is empty; get it again"),
        ([[1]], "row 1 is list, and must be an object"),
        ([ROW, ROW], "has two problems of one name"),
        ([ROW | {"language": "php"}], "row 1 is a problem in php, and js was asked for"),
        ([ROW, ROW | {"tests": " "}], "row 2 has no tests or test; it has doctests, "),
        ([ROW | {"prompt": None}], "row 1 has no prompt"),
        ([ROW | {"name": 3}], "row 1 has no name or task_id"),
        ([ROW | {"stop_tokens": []}], "row 1: stop_tokens are []"),
        ([ROW | {"stop_tokens": [""]}], "row 1: stop_tokens are ['']"),
    ],
)
def test_rows_that_are_none_are_refused(rows: list[Any], part: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", *rows)
    with pytest.raises(EvaluationError) as caught:
        read_problems(path, "js")
    assert str(caught.value).startswith(str(path))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", b"{"),
        ("x.jsonl", b"[" * 100_000),
        ("x.jsonl.gz", b"no gzip"),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9]),
        ("x.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"no deflate"),
    ],
)
def test_damaged_files_are_refused(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EvaluationError, match=r"cannot be read .*; get it again"):
        read_problems(tmp_path / name, "js")


def test_a_file_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(bytes(70_000_000), 1))
    with pytest.raises(EvaluationError, match=r"x\.jsonl\.gz holds more than 64 MiB"):
        read_problems(tmp_path / "x.jsonl.gz", "js")


def test_a_missing_file_names_itself_and_its_source(tmp_path: Path) -> None:
    expected = r"multipl-e/humaneval-cpp.jsonl is missing: get it from https://.*humaneval-cpp,"
    with pytest.raises(EvaluationError, match=expected):
        problems_file(tmp_path, "cpp")
    with pytest.raises(EvaluationError, match=r"python.jsonl is missing: .*openai/human-eval"):
        problems_file(tmp_path, "python")


def test_python_falls_back_on_human_eval(tmp_path: Path) -> None:
    own = written(tmp_path / "HumanEval.jsonl.gz", OPENAI)
    assert problems_file(tmp_path, "python") == own
    (tmp_path / "multipl-e").mkdir()
    first = written(tmp_path / "multipl-e" / "humaneval-python.jsonl", OPENAI)
    assert problems_file(tmp_path, "python") == first
    assert problems_file(tmp_path, "python", published=True) == own
    with pytest.raises(EvaluationError):
        problems_file(tmp_path, "js")


@needs_shared
@pytest.mark.parametrize("key", sorted(LANGUAGES))
def test_every_row_is_read_and_takes_a_nonce(key: str) -> None:
    """As many problems as MultiPL-E has for the language."""
    counts = {"go": 154, "java": 158, "python": 164, "rs": 156, "ts": 159}
    problems = read_problems(problems_file(EVAL, key), key)
    assert len(problems) == counts.get(key, 161)
    for one in problems:
        with_nonce(LANGUAGES[key], one.tests, "0" * 32)


# Cutting and completing


@given(st.text("ab\n"), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1))
def test_a_cut_is_the_longest_beginning_without_a_stop_token(text: str, stops: list[str]) -> None:
    def holds(part: str) -> bool:
        return all(stop not in part for stop in stops)

    kept = cut(text, stops)
    if holds(text):
        assert kept == text
    else:
        assert text.startswith(kept)
        assert any(text[len(kept) :].startswith(stop) for stop in stops)
        earlier = (text[n:].startswith(stop) for n in range(len(kept)) for stop in stops)
        assert not any(earlier)


def test_samples_are_those_of_their_problem() -> None:
    problems = [
        problem("a", prompt="A"),
        problem("b", prompt="B", stop_tokens=("\n#",)),
        problem("c", prompt="C"),
    ]
    asked: list[tuple[list[str], tuple[str, ...]]] = []

    def complete(prompts: Any, stop_tokens: Any) -> list[Written]:
        asked.append((list(prompts), tuple(stop_tokens)))
        return [Written([f"{prompt}{n}"], False) for n, prompt in enumerate(prompts)]

    assert [w.texts for w in sample(problems, complete)] == [["A0"], ["B0"], ["C1"]]
    assert asked == [(["A", "C"], ("\ndef",)), (["B"], ("\n#",))]


# Judging


@dataclass
class Stand:
    """In a toolchain's place: passes what ends in `good`, and notes what it is given."""

    language: Language = field(default_factory=lambda: LANGUAGES["python"])
    heads: list[str] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, head: str, tests: str) -> Verdict:
        with self.lock:
            self.heads.append(head)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(0.02)
        with self.lock:
            self.at_once -= 1
        if head.endswith("broken"):
            raise EvaluationError("bwrap failed")
        passed = head.endswith("good")
        return Verdict(passed, "" if passed else "exit code 1")


def test_answers_are_in_order_and_equal_samples_run_once() -> None:
    problems = [problem("a", prompt="A"), problem("b", prompt="B")]
    stand = Stand()
    written = [[" good\ndef g", " bad", " good"], [" bad", " bad", " good"]]
    answers = judge(problems, written, cast(Toolchain, stand), workers=3)
    assert sorted(stand.heads) == ["A bad", "A good", "B bad", "B good"]
    assert [(a.response, a.score, a.reason, a.sample) for a in answers] == [
        (" good", 1, "", 0),
        (" bad", 0, "exit code 1", 1),
        (" good", 1, "", 2),
        (" bad", 0, "exit code 1", 0),
        (" bad", 0, "exit code 1", 1),
        (" good", 1, "", 2),
    ]
    assert [a.document for a in answers] == [p.document for p in problems for _ in range(3)]


def test_as_many_programs_at_a_time_as_workers() -> None:
    for workers in (1, 4):
        stand = Stand()
        judge([problem()], [[str(n) for n in range(16)]], cast(Toolchain, stand), workers=workers)
        assert stand.most == workers


def test_a_sandbox_that_fails_is_no_score() -> None:
    stand = Stand()
    completions = [[" broken", *map(str, range(200))]]
    with pytest.raises(EvaluationError, match="bwrap failed"):
        judge([problem()], completions, cast(Toolchain, stand), workers=2)
    assert len(stand.heads) < 100


def test_judged_in_the_sandbox(toolchains: Toolchains) -> None:
    problems = [problem("a"), problem("b", tests="assert f(1) == 3\n")]
    completions = [
        [" return n + 1", " return n", " exit(0)", " return (\n", "\n    while True: pass"],
        [" return n + 2"] * 5,
    ]
    toolchain = toolchains("python")
    language = replace(toolchain.language, limits=Limits(wall_seconds=1.5))
    answers = judge(problems, completions, replace(toolchain, language=language))
    assert [a.score for a in answers] == [1, 0, 0, 0, 0] + [1] * 5
    reasons = [a.reason for a in answers]
    assert reasons[0] == ""
    assert reasons[1] == "exit code 1: AssertionError"
    assert reasons[2].startswith("no nonce")
    assert reasons[3].startswith("exit code 1: SyntaxError: ")
    assert reasons[4] == "timeout"


def human_eval(verbatim: bool) -> tuple[list[Problem], list[str]]:
    path = EVAL / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    before = "" if verbatim else "\n"
    solutions = [before + row["canonical_solution"] for row in rows]
    return read_problems(path, "python", verbatim), solutions


@needs_shared
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verbatim", [False, True])
def test_solutions_of_human_eval_pass_and_stubs_do_not(
    verbatim: bool, step: int, toolchains: Toolchains
) -> None:
    problems, solutions = (found[::step] for found in human_eval(verbatim))
    completions = [[solution, "\n    pass"] for solution in solutions]
    answers = judge(problems, completions, toolchains("python"))
    assert [a.reason for a in answers[::2]] == [""] * len(problems)
    assert [a.score for a in answers] == [1, 0] * len(problems)


STRLEN = {
    "cpp": ("\n  return string.size();", "\n  return 3;"),
    "go": ("\n    return len(myString)\n}\n", "\n    return 3\n}\n"),
    "java": ("\n        return string.length();\n", "\n        return 3;\n"),
    "js": ("\n  return string.length;\n}\n", "\n  return 3;\n}\n"),
    "php": ("\n    return $x + $y;\n}\n", "\n    return 1;\n}\n"),
    "python": ("\n    return len(string)", "\n    return 3"),
    "r": ("\n    nchar(string)\n}\n", "\n    3\n}\n"),
    "rb": ("\n  string.length\nend\n", "\n  3\nend\n"),
    "rs": ("\n    string.len() as isize\n", "\n    3\n"),
    "ts": ("\n  return string.length;\n}\n", "\n  return 3;\n}\n"),
}
"""Solutions of HumanEval's problem 23, right and wrong; in PHP, where `strlen` cannot be defined
again, of problem 53."""


@needs_shared
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] * (key in (*SLOW, "cpp")))
        for key in sorted(STRLEN)
    ],
)
def test_a_real_problem_in_each_language(key: str, toolchains: Toolchains) -> None:
    toolchain = toolchains(key)
    problems = read_problems(problems_file(EVAL, key), key)
    name = {"python": "Python/23", "php": "HumanEval_53_add"}.get(key, "HumanEval_23_strlen")
    (one,) = [problem for problem in problems if problem.name == name]
    answers = judge([one], [STRLEN[key]], toolchain)
    assert [a.score for a in answers] == [1, 0], answers
