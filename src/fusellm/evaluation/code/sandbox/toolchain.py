"""A language's toolchain in the sandbox: whether it works, and whether a program passes."""

import contextlib
import secrets
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox.bubblewrap import Sandbox, pack
from fusellm.evaluation.code.sandbox.examples import EXAMPLES
from fusellm.evaluation.code.sandbox.languages import Language
from fusellm.evaluation.code.sandbox.limits import Limits, Outcome

_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests; `reason` is empty if it did."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Toolchain:
    """A language whose programs can be run; see `find_toolchain`.

    Attributes:
        support: the files that `Language.support` names.
        version: first line of what the toolchain says of itself.
    """

    language: Language
    sandbox: Sandbox
    support: Mapping[str, bytes] = field(default_factory=dict)
    version: str = ""

    def judge(self, head: str, tests: str) -> Verdict:
        """Compile and run a program: `head`, a line end, and tests that end by writing a nonce.

        Raises:
            EvaluationError: the sandbox could not be made, or the tests are of another language.
        """
        nonce = secrets.token_hex(16)
        text = f"{head}\n{with_nonce(self.language, tests, nonce)}"
        file = {self.language.file: text.encode("utf-8", "replace")}
        archive = pack({**self.support, **file})
        if self.language.compile:
            made = self.run(self.language.compile, self.language.compile_limits, archive, True)
            if made.exit_code != 0:
                return Verdict(False, f"compile error: {_why(made)}")
            archive = made.stdout
        outcome = self.run(self.language.run, self.language.limits, archive)
        if outcome.exit_code != 0:
            return Verdict(False, _why(outcome, self.language.says_last))
        if nonce.encode() not in outcome.stdout.split(b"\n"):
            return Verdict(False, "no nonce: it ended before its tests did")
        return Verdict(True, "")

    def run(
        self, command: tuple[str, ...], limits: Limits, archive: bytes, collect: bool = False
    ) -> Outcome:
        """Run a command where the toolchain is at hand."""
        return self.sandbox.run(
            command,
            limits,
            archive=archive,
            binds=self.language.binds,
            environment=self.language.environment,
            collect=self.language.artefacts if collect else "",
        )


def with_nonce(language: Language, tests: str, nonce: str) -> str:
    """Tests that write a nonce when they have passed.

    Raises:
        EvaluationError: the tests do not end with as many braces as the language's do.
    """
    half = len(nonce) // 2
    epilogue = language.epilogue.replace("FIRST", nonce[:half]).replace("SECOND", nonce[half:])
    body = tests.rstrip()
    for _ in range(language.inside):
        if not body.endswith("}"):
            raise EvaluationError(
                f"tests for {language.name} must end with {language.inside} closing brace(s), and "
                f"these end with {tests[-40:]!r}: see whether the file is MultiPL-E's of "
                f"{language.key}"
            )
        body = body[:-1].rstrip()
    return f"{body}\n{epilogue}\n" + "}\n" * language.inside


def find_toolchain(language: Language, sandbox: Sandbox, data_dir: Path | None = None) -> Toolchain:
    """A language's toolchain, after a good program passed and a bad one did not.

    Args:
        data_dir: where `Language.support` is found.

    Raises:
        EvaluationError: it is missing or does not work, with what to do about it.
    """
    for tool, install in language.tools.items():
        _require_tool(tool, install, sandbox)
    support = {
        name: _support(name, source, language, data_dir)
        for name, source in language.support.items()
    }
    toolchain = Toolchain(language, sandbox, support)
    example = EXAMPLES[language.key]
    good = toolchain.judge(example.prompt + example.right, example.tests)
    if not good.passed:
        raise EvaluationError(f"a right program in {language.name} fails here: {good.reason}")
    if toolchain.judge(example.prompt + example.wrong, example.tests).passed:
        raise EvaluationError(
            f"a wrong program in {language.name} passes its tests here; "
            f"install it again: {'; '.join(language.tools.values())}"
        )
    told = toolchain.run(language.version, language.limits, pack({}))
    return replace(toolchain, version=_first_line(told.stdout or told.stderr))


def _require_tool(tool: str, install: str, sandbox: Sandbox) -> None:
    path = shutil.which(tool, path=sandbox.path)
    shown = ("/usr", "/bin", *sandbox.toolchains)
    if path and any(Path(path).resolve().is_relative_to(folder) for folder in shown):
        return
    elsewhere = path or shutil.which(tool)
    if elsewhere is None:
        raise EvaluationError(f"{tool} is not installed: {install}")
    raise EvaluationError(
        f"{tool} is at {elsewhere}, which the sandbox does not show: {install}, or name the "
        "folder that has it in its bin: evaluation.toolchains, or --toolchain of fusellm evaluate"
    )


def _support(name: str, source: str, language: Language, data_dir: Path | None) -> bytes:
    if data_dir is None or not (data_dir / name).is_file():
        raise EvaluationError(
            f"{language.name} needs {name} in {data_dir or 'the data folder'}: get it from {source}"
        )
    return (data_dir / name).read_bytes()


def _why(outcome: Outcome, last_line: bool = False) -> str:
    """How a program ended, and the line of its errors that says most."""
    if outcome.stopped:
        return outcome.stopped
    assert outcome.exit_code is not None
    ended = f"exit code {outcome.exit_code}"
    with contextlib.suppress(ValueError):
        # bwrap gives a death by signal n as 128 + n.
        ended += f" ({signal.Signals(outcome.exit_code - 128).name})"
    lines = outcome.stderr.splitlines()
    line = _first_line(b"\n".join(reversed(lines)) if last_line else outcome.stderr)
    return f"{ended}: {line}" if line else ended


def _first_line(data: bytes) -> str:
    """The first line that says something, without control characters."""
    text = data[: 1 << 16].decode("utf-8", "replace")
    for line in text.splitlines():
        clean = "".join(c if c.isprintable() else " " for c in line).strip()
        if clean:
            return clean[:_REASON_CHARACTERS]
    return ""
