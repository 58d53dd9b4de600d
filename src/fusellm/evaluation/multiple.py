"""The suites of programs, `multiple` and `humaneval`: written by a model, judged in the sandbox.

`multiple` has ten languages; its prompts are without white space at their ends, as
bigcode-evaluation-harness has them, which the paper's authors used. `humaneval` is HumanEval as
published: a prompt ends with its line end. Models that were trained on chats write another thing
after the one than after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from fusellm.errors import EvaluationError
from fusellm.evaluation.code_problems import Problem, judge, problems_file, read_problems, sample
from fusellm.evaluation.comparison import NotRun
from fusellm.evaluation.completions import (
    Writing,
    complete,
    requests_for,
    require_different,
)
from fusellm.evaluation.lm_eval_import import extra
from fusellm.evaluation.records import Header, TaskRecord
from fusellm.evaluation.sandbox import LANGUAGES, Sandbox, Toolchain, find_sandbox, find_toolchain
from fusellm.evaluation.settings import DATA_DIR, Loaded, Settings
from fusellm.progress import Progress
from fusellm.store.files import file_digest

MOST_NEW_TOKENS = 512


@dataclass(frozen=True)
class CodeSuite:
    """A suite of programs.

    Attributes:
        languages: keys of `LANGUAGES`, by the names of its tasks.
        published: whether prompts are as their file has them, and HumanEval's own file comes first.
    """

    name: str
    languages: Mapping[str, str]
    published: bool = False


CODE_SUITES = {
    suite.name: suite
    for suite in (
        CodeSuite("multiple", {key: key for key in LANGUAGES}),
        CodeSuite("humaneval", {"humaneval": "python"}, published=True),
    )
}


@dataclass(frozen=True)
class CodeTask:
    """A language whose problems are read and whose toolchain works.

    Attributes:
        header: without a model.
    """

    header: Header
    problems: tuple[Problem, ...]
    toolchain: Toolchain
    writing: Writing

    def of_model(self, facts: Mapping[str, str], settings: Settings) -> Header:
        """The header for a model."""
        return replace(self.header, model=dict(facts) | {"batch_size": str(settings.batch_size)})


def prepare_languages(
    suite: CodeSuite, settings: Settings, progress: Progress
) -> tuple[tuple[CodeTask, ...], tuple[NotRun, ...]]:
    """The tasks that can be run here, and why each of the others cannot.

    Raises:
        EvaluationError: there is no working sandbox, no task can be run, there is none of a name
            that is asked for, or lm_eval is not installed.
    """
    extra("lm_eval")
    wanted = settings.only or tuple(suite.languages)
    for task in wanted:
        if task not in suite.languages:
            names = ", ".join(suite.languages)
            raise EvaluationError(f"{suite.name} has no task {task!r}; it has {names}")
    writing = _writing(settings)
    require_different(writing)
    if settings.data_dir is None or not settings.data_dir.is_dir():
        there = settings.data_dir or "none"
        raise EvaluationError(
            f"{suite.name} reads its problems from a data folder, and {there} is there; name it: "
            f"{DATA_DIR} (docs/evaluation.md says what is in it)"
        )
    sandbox = find_sandbox(settings.toolchains)
    tasks, not_run = [], []
    with progress.start("trying toolchains", len(wanted), "languages") as bar:
        for task in wanted:
            try:
                tasks.append(_prepare(suite, task, sandbox, writing, settings))
            except EvaluationError as error:
                not_run.append(NotRun(suite.name, task, str(error)))
            bar.advance()
    if not tasks:
        raise EvaluationError(
            f"{suite.name}: {not_run[0].task} cannot be run here: {not_run[0].reason}"
            + (f". Nor can {', '.join(one.task for one in not_run[1:])}" if not_run[1:] else "")
        )
    return tuple(tasks), tuple(not_run)


def without_problems(suite: CodeSuite, settings: Settings) -> dict[str, str]:
    """The tasks whose problems are not at hand, and why."""
    faults = {}
    for task, key in suite.languages.items():
        if settings.data_dir is None:
            faults[task] = "no data folder was given"
            continue
        try:
            problems_file(settings.data_dir, key, suite.published)
        except EvaluationError as error:
            faults[task] = str(error)
    return faults


def _writing(settings: Settings) -> Writing:
    most = min(MOST_NEW_TOKENS, settings.max_new_tokens or MOST_NEW_TOKENS)
    return Writing(most, settings.samples, settings.temperature, settings.top_p)


def _prepare(
    suite: CodeSuite, task: str, sandbox: Sandbox, writing: Writing, settings: Settings
) -> CodeTask:
    assert settings.data_dir is not None
    key = suite.languages[task]
    path = problems_file(settings.data_dir, key, suite.published)
    problems = tuple(read_problems(path, key, suite.published)[: settings.limit])
    toolchain = find_toolchain(LANGUAGES[key], sandbox, settings.data_dir)
    protocol = toolchain.language.protocol | {
        "writing": {
            "max_new_tokens": writing.max_new_tokens,
            "samples": writing.samples,
            "temperature": writing.temperature,
            "top_p": writing.top_p,
        },
        "metric": "passes its tests",
        "stop": "the problem's stop tokens",
        "too_long": settings.too_long,
        "limit": settings.limit,
        "seed": settings.seed,
    }
    software = {package: version(package) for package in ("lm_eval", "transformers", "torch")}
    software |= {"toolchain": toolchain.version, "bubblewrap": sandbox.version}
    data = {path.relative_to(settings.data_dir).as_posix(): file_digest(path)}
    header = Header(suite.name, task, protocol, "samples", data, {}, software)
    return CodeTask(header, problems, toolchain, writing)


def requests_of_language(task: CodeTask) -> list[Any]:
    """What a language's problems ask a model, once each."""
    prompts = [problem.prompt for problem in task.problems]
    return requests_for(prompts, [], replace(task.writing, samples=1), task.header.task)


def run_language(
    task: CodeTask,
    loaded: Loaded,
    facts: Mapping[str, str],
    settings: Settings,
    progress: Progress,
) -> TaskRecord:
    """Let a model write programs in a language, and judge them.

    Raises:
        EvaluationError: a prompt does not fit the model's context and is not to be cut, or the
            sandbox failed; nothing is scored then.
    """
    what = f"{task.header.suite}/{task.header.task}"
    written = sample(
        task.problems,
        lambda prompts, stop: complete(
            loaded, prompts, stop, task.writing, settings, progress, what
        ),
    )
    answers = judge(task.problems, [one.texts for one in written], task.toolchain, progress)
    cut = {p.document for p, one in zip(task.problems, written, strict=True) if one.truncated}
    return TaskRecord(
        task.of_model(facts, settings),
        tuple(replace(answer, truncated=answer.document in cut) for answer in answers),
    )
