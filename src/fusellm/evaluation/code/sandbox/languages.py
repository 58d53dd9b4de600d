"""The languages of MultiPL-E: how their programs are compiled, run and limited.

Commands are those of bigcode-evaluation-harness (custom_metrics/multiple_metrics), except that Go
tests are compiled by `go test -c`, which does not run `go vet`, and that the Java machine is told
how much memory there is. Limits are those that each toolchain was found to need.

**The nonce.** An exit code of 0 alone does not say that the tests ran: a program may exit before
them, or a part of them be read as text (PHP after `?>`, Ruby after `__END__`). So every language's
tests end with a statement, the `epilogue`, that writes a random nonce, new for each program; it
stands in the program in two halves, so that a program that shows its own text does not show it. A
program passes if it exits with 0 and its output has the nonce as a line. This finds programs that
do not come to the end of their tests. It cannot find one that is written to cheat: a program shares
its process with its tests, and may read the nonce from them, or redefine what they compare with.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fusellm.evaluation.code.sandbox.limits import MIB, Limits
from fusellm.evaluation.yaml_table import yaml_table

_COMPILE = Limits(
    wall_seconds=30,
    address_space_bytes=4096 * MIB,
    memory_bytes=2048 * MIB,
    processes=256,
    file_bytes=128 * MIB,
    disk_bytes=512 * MIB,
    output_bytes=128 * MIB,
)
_VIRTUAL_MACHINE = Limits(address_space_bytes=4096 * MIB)
_BINDS = ("/etc/alternatives", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Language:
    """How programs of one language are made and run.

    Attributes:
        key: in the names of MultiPL-E's files.
        name: for people.
        file: what a program is saved as.
        tools: commands that are needed, and how to install each.
        version: command whose first line tells the version.
        run: command.
        limits: of `run`.
        epilogue: statement that writes the nonce, whose halves are `FIRST` and `SECOND`.
        inside: how many closing braces at the end of the tests the epilogue stands before; 0 for
            languages whose tests are a script.
        compile: command; empty for a language that has no such step.
        artefacts: of `compile` that `run` needs.
        compile_limits: of `compile`.
        environment: variables of both.
        binds: what this machine's toolchain needs to read outside of /usr.
        says_last: whether the last line of a failed program's errors says most, not the first.
        support: files that must be given besides the toolchain, and where to get each.
    """

    key: str
    name: str
    file: str
    tools: dict[str, str]
    version: tuple[str, ...]
    run: tuple[str, ...]
    limits: Limits
    epilogue: str
    inside: int = 0
    compile: tuple[str, ...] = ()
    artefacts: str = ""
    compile_limits: Limits = _COMPILE
    environment: dict[str, str] = field(default_factory=dict)
    binds: tuple[str, ...] = _BINDS
    says_last: bool = False
    support: dict[str, str] = field(default_factory=dict)

    @property
    def protocol(self) -> dict[str, Any]:
        """All that a score depends on besides problem and program, for a record's header."""
        steps = {"run": (self.run, self.limits)}
        if self.compile:
            steps["compile"] = (self.compile, self.compile_limits)
        told = {name: {"command": list(c), "limits": asdict(m)} for name, (c, m) in steps.items()}
        return {
            "language": self.key,
            "environment": self.environment,
            "nonce": self.epilogue,
        } | told


def _language(key: str, told: dict[str, Any]) -> Language:
    """A language from its entry in the file, where a command is one text."""
    machine = _VIRTUAL_MACHINE if told.pop("virtual_machine", False) else Limits()
    told |= {name: tuple(told.get(name, "").split()) for name in ("version", "compile", "run")}
    told["limits"] = replace(machine, **told.get("limits", {}))
    told["compile_limits"] = replace(_COMPILE, **told.get("compile_limits", {}))
    told["binds"] = (*_BINDS, *told.get("binds", ()))
    return Language(key, **told)


LANGUAGES = {key: _language(key, told) for key, told in yaml_table(__file__).items()}
"""By the names in MultiPL-E's files."""
