"""The suites of programs, `multiple` and `humaneval`: written by a model, judged in the sandbox.

`multiple` has ten languages; its prompts are without white space at their ends, as
bigcode-evaluation-harness has them, which the paper's authors used. `humaneval` is HumanEval as
published: a prompt ends with its line end. Models that were trained on chats write another thing
after the one than after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusellm.config import EvaluationSettings
from fusellm.errors import EvaluationError
from fusellm.evaluation.code.completions import complete, new_tokens, requests_for
from fusellm.evaluation.code.problems import Problem, judge, problems_file, read_problems, sample
from fusellm.evaluation.code.sandbox import (
    LANGUAGES,
    Sandbox,
    Toolchain,
    find_sandbox,
    find_toolchain,
)
from fusellm.evaluation.compare.comparison import NotRun
from fusellm.evaluation.compare.records import Header, TaskRecord
from fusellm.evaluation.harness.lm_eval import SEED, extra
from fusellm.evaluation.harness.model import LoadedModel
from fusellm.evaluation.harness.run import Render, Task
from fusellm.evaluation.suites.catalogue import SUITES
from fusellm.evaluation.suites.data import DATA_DIR
from fusellm.progress import Progress, Silent
from fusellm.store.files import file_digest


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
class CodeTask(Task):
    """A language whose problems are read and whose toolchain works."""

    problems: tuple[Problem, ...]
    toolchain: Toolchain

    def requests(self, render: Render | None = None, system: str | None = None) -> list[Any]:
        """What the problems ask a model, once each; as they are, as programs go on."""
        prompts = [problem.prompt for problem in self.problems]
        once = self.settings.model_copy(update={"samples": 1})
        return requests_for(prompts, [], once, self.header.task)

    def run(
        self, loaded: LoadedModel, facts: Mapping[str, str], progress: Progress | None = None
    ) -> TaskRecord:
        """Let a model write programs in a language, and judge them.

        Raises:
            EvaluationError: a prompt does not fit the model's context and is not to be cut, or the
                sandbox failed; nothing is scored then.
        """
        shown = progress or Silent()
        written = sample(
            self.problems,
            lambda prompts, stop: complete(loaded, prompts, stop, self.settings, shown, self.place),
        )
        answers = judge(self.problems, [one.texts for one in written], self.toolchain, shown)
        cut = {p.document for p, one in zip(self.problems, written, strict=True) if one.truncated}
        return TaskRecord(
            self.of_model(facts),
            tuple(replace(answer, truncated=answer.document in cut) for answer in answers),
        )


def prepare_languages(
    suite: CodeSuite, settings: EvaluationSettings, progress: Progress
) -> tuple[tuple[CodeTask, ...], tuple[NotRun, ...]]:
    """The tasks that can be run here, and why each of the others cannot.

    Raises:
        EvaluationError: there is no working sandbox, no task can be run, there is none of a name
            that is asked for, or lm_eval is not installed.
    """
    extra("lm_eval")
    SUITES[suite.name].require(settings.tasks)
    wanted = settings.tasks or tuple(suite.languages)
    data_dir = settings.data_folder
    if data_dir is None or not data_dir.is_dir():
        raise EvaluationError(
            f"{suite.name} reads its problems from a data folder, and {data_dir or 'none'} is "
            f"there; name it: {DATA_DIR} (docs/evaluation.md says what is in it)"
        )
    sandbox = find_sandbox(Path(folder).expanduser() for folder in settings.toolchains)
    tasks, not_run = [], []
    with progress.start("trying toolchains", len(wanted), "languages") as bar:
        for task in wanted:
            try:
                tasks.append(_prepare(suite, task, sandbox, data_dir, settings))
            except EvaluationError as error:
                not_run.append(NotRun(suite.name, task, str(error)))
            bar.advance()
    if not tasks:
        raise EvaluationError(
            f"{suite.name}: {not_run[0].task} cannot be run here: {not_run[0].reason}"
            + (f". Nor can {', '.join(one.task for one in not_run[1:])}" if not_run[1:] else "")
        )
    return tuple(tasks), tuple(not_run)


def without_problems(suite: CodeSuite, settings: EvaluationSettings) -> dict[str, str]:
    """The tasks whose problems are not at hand, and why."""
    data_dir = settings.data_folder
    if data_dir is None:
        return dict.fromkeys(suite.languages, "no data folder was given")
    faults = {}
    for task, key in suite.languages.items():
        try:
            problems_file(data_dir, key, suite.published)
        except EvaluationError as error:
            faults[task] = str(error)
    return faults


def _prepare(
    suite: CodeSuite, task: str, sandbox: Sandbox, data_dir: Path, settings: EvaluationSettings
) -> CodeTask:
    key = suite.languages[task]
    path = problems_file(data_dir, key, suite.published)
    problems = tuple(read_problems(path, key, suite.published)[: settings.limit])
    toolchain = find_toolchain(LANGUAGES[key], sandbox, data_dir)
    writing = settings.model_dump(include={"samples", "temperature", "top_p"})
    protocol = toolchain.language.protocol | {
        "writing": {"max_new_tokens": new_tokens(settings)} | writing,
        "metric": "passes its tests",
        "stop": "the problem's stop tokens",
        "too_long": settings.too_long,
        "limit": settings.limit,
        "seed": SEED,
    }
    software = {package: version(package) for package in ("lm_eval", "transformers", "torch")}
    software |= {"toolchain": toolchain.version, "bubblewrap": sandbox.version}
    data = {path.relative_to(data_dir).as_posix(): file_digest(path)}
    header = Header(suite.name, task, protocol, "samples", data, {}, software)
    return CodeTask(header, settings, problems, toolchain)
