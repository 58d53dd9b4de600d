"""Problems that are solved by a program, and how samples of solutions are judged.

Problems are those of MultiPL-E (Cassano et al. 2023), one file for each language, and for Python
those of HumanEval (Chen et al. 2021). A model continues a problem's prompt; what it wrote is cut at
the first stop token; prompt, completion and tests together are a program, which a toolchain judges.
"""

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.completions import Written
from fusellm.evaluation.code.sandbox.toolchain import Toolchain, Verdict
from fusellm.evaluation.compare.records import Answer
from fusellm.progress import Progress, Silent
from fusellm.store.identity import digest

MULTIPL_E = "https://huggingface.co/datasets/nuprl/MultiPL-E"
HUMAN_EVAL = "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)"
PYTHON_STOP_TOKENS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Those of HumanEval (Chen et al. 2021, section 2.2)."""
_MOST_BYTES = 1 << 26  # unpacked; the largest file there is has some hundred kilobytes


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        name: in its file.
        prompt: what a model continues.
        tests: what follows prompt, completion and a line end.
        stop_tokens: a completion ends before the first of them.
    """

    name: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...]

    @property
    def document(self) -> str:
        """Digest of everything that a score depends on."""
        return digest([self.name, self.prompt, self.tests, list(self.stop_tokens)])


class Complete(Protocol):
    """A model that continues prompts."""

    def __call__(self, prompts: Sequence[str], stop_tokens: Sequence[str]) -> Sequence[Written]:
        """What it writes after each prompt; it may end at any of the stop tokens, or go on."""


def problems_file(data_dir: Path, key: str, published: bool = False) -> Path:
    """The file with a language's problems.

    Args:
        key: the language's name in MultiPL-E's files.
        published: whether HumanEval's own file comes first, where it has the language.

    Raises:
        EvaluationError: it is not there, with where to get it.
    """
    name = f"humaneval-{key}.jsonl"
    choices = [data_dir / "multipl-e" / name, data_dir / name]
    source = f"{MULTIPL_E}, configuration humaneval-{key}, its test split as JSON lines"
    if key == "python":
        choices += [folder / "humaneval-py.jsonl" for folder in (data_dir / "multipl-e", data_dir)]
        own = [data_dir / "HumanEval.jsonl.gz", data_dir / "HumanEval.jsonl"]
        choices = own + choices if published else choices + own
        source = f"{HUMAN_EVAL}, as {data_dir / 'HumanEval.jsonl.gz'}"
    for path in choices:
        if path.is_file():
            return path
    raise EvaluationError(f"{choices[0]} is missing: get it from {source}")


def read_problems(path: Path, key: str, verbatim: bool = False) -> list[Problem]:
    """Problems of one language: rows of MultiPL-E, or of HumanEval for Python.

    Args:
        verbatim: whether prompts keep the white space at their ends.

    Raises:
        EvaluationError: the file cannot be read, or a row of it is none of these.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise EvaluationError(
                f"{path} holds more than {_MOST_BYTES >> 20} MiB, as no file of problems does; get "
                "it again"
            )
        text = data.decode("utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); get it again") from error
    if not rows:
        raise EvaluationError(f"{path} is empty; get it again")
    problems = [_problem(row, f"{path}, row {n}", key) for n, row in enumerate(rows, start=1)]
    if not verbatim:
        problems = [replace(problem, prompt=problem.prompt.strip()) for problem in problems]
    if len({problem.name for problem in problems}) < len(problems):
        raise EvaluationError(f"{path} has two problems of one name; get it again")
    return problems


def _problem(row: Any, place: str, key: str) -> Problem:
    if not isinstance(row, dict):
        raise EvaluationError(
            f"{place} is {type(row).__name__}, and must be an object; get the file again"
        )
    language = str(row.get("language", key)).removesuffix("_test.go")
    if language not in (key, {"python": "py"}.get(key)):
        raise EvaluationError(
            f"{place} is a problem in {language}, and {key} was asked for; give the file of {key}"
        )
    name, prompt = row.get("name", row.get("task_id")), row.get("prompt")
    tests, stop_tokens = row.get("tests", row.get("test")), row.get("stop_tokens") or []
    if key == "python":
        stop_tokens = stop_tokens or PYTHON_STOP_TOKENS
        if isinstance(tests, str) and "entry_point" in row:
            tests = f"{tests}\ncheck({row['entry_point']})\n"
    for field, value in (("name or task_id", name), ("prompt", prompt), ("tests or test", tests)):
        if not isinstance(value, str) or not value.strip():
            raise EvaluationError(
                f"{place} has no {field}; it has {', '.join(sorted(row))}; get the file again"
            )
    if not stop_tokens or not all(isinstance(token, str) and token for token in stop_tokens):
        raise EvaluationError(
            f"{place}: stop_tokens are {stop_tokens!r}, and must be texts; get the file again"
        )
    assert name is not None
    assert prompt is not None
    assert tests is not None
    return Problem(name, prompt, tests, tuple(stop_tokens))


def cut(completion: str, stop_tokens: Sequence[str]) -> str:
    """A completion up to the first stop token in it.

    >>> cut(" return 1;\\n}\\nint main() {", ["\\nint", "\\n}"])
    ' return 1;'
    """
    ends = [at for token in stop_tokens if (at := completion.find(token)) >= 0]
    return completion[: min(ends)] if ends else completion


def sample(problems: Sequence[Problem], complete: Complete) -> list[Written]:
    """What a model writes for each problem; not yet cut."""
    places: dict[tuple[str, ...], list[int]] = {}
    for n, problem in enumerate(problems):
        places.setdefault(problem.stop_tokens, []).append(n)
    completions: dict[int, Written] = {}
    for stop_tokens, numbers in places.items():
        written = complete([problems[n].prompt for n in numbers], stop_tokens)
        completions |= zip(numbers, written, strict=True)
    return [completions[n] for n in range(len(problems))]


def judge(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    toolchain: Toolchain,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Answer]:
    """Scores of samples: 1 if a program passes its tests, else 0 with the reason.

    Equal samples of a problem are run once.

    Args:
        completions: samples of each problem; cut here.
        workers: programs at a time; None: as many as this process has cores.

    Returns:
        Answers of all samples, problem by problem.

    Raises:
        EvaluationError: the sandbox failed; nothing is scored then.
    """
    cuts = [
        [cut(completion, problem.stop_tokens) for completion in of_problem]
        for problem, of_problem in zip(problems, completions, strict=True)
    ]
    distinct = list(dict.fromkeys((n, text) for n, of_one in enumerate(cuts) for text in of_one))
    verdicts = _verdicts(problems, distinct, toolchain, progress or Silent(), workers or _cores())
    return [
        Answer(
            document=problem.document,
            prompt=digest(problem.prompt),
            response=text,
            score=float(verdicts[n, text].passed),
            sample=sample_number,
            reason=verdicts[n, text].reason,
        )
        for n, problem in enumerate(problems)
        for sample_number, text in enumerate(cuts[n])
    ]


def _verdicts(
    problems: Sequence[Problem],
    distinct: Sequence[tuple[int, str]],
    toolchain: Toolchain,
    progress: Progress,
    workers: int,
) -> dict[tuple[int, str], Verdict]:
    name = toolchain.language.name
    runs: dict[Future[Verdict], tuple[int, str]] = {}
    with (
        progress.start(f"running programs in {name}", len(distinct), "programs") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for n, text in distinct:
                problem = problems[n]
                run = pool.submit(toolchain.judge, problem.prompt + text, problem.tests)
                runs[run] = (n, text)
            for run in as_completed(runs):
                run.result()
                bar.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {place: run.result() for run, place in runs.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
