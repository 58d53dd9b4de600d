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

from fusellm.evaluation.sandbox.limits import MIB, Limits

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


_TABLE = (
    Language(
        key="cpp",
        name="C++",
        file="main.cpp",
        tools={"g++": "apt install g++"},
        version=("g++", "--version"),
        compile=("g++", "-std=c++17", "-o", "program", "main.cpp"),
        artefacts="program",
        run=("./program",),
        limits=Limits(),
        epilogue='std::fputs("\\nFIRST" "SECOND\\n", stdout);',
        inside=1,
    ),
    Language(
        key="go",
        name="Go",
        file="main_test.go",
        tools={"go": "apt install golang-go"},
        version=("go", "version"),
        compile=("go", "test", "-c", "-o", "program", "main_test.go"),
        artefacts="program",
        compile_limits=replace(_COMPILE, wall_seconds=60),
        run=("./program",),
        limits=replace(_VIRTUAL_MACHINE, wall_seconds=30),
        epilogue='if !t.Failed() { fmt.Println("\\nFIRST" + "SECOND") }',
        inside=1,
        environment={
            "GOCACHE": "/tmp/.cache",
            "GOPATH": "/tmp/.go",
            "GOPROXY": "off",
            "GOTOOLCHAIN": "local",
            "CGO_ENABLED": "0",
        },
    ),
    Language(
        key="java",
        name="Java",
        file="Problem.java",
        tools={
            "javac": "apt install default-jdk-headless",
            "java": "apt install default-jre-headless",
        },
        version=("java", "-version"),
        compile=(
            *("javac", "-J-Xmx512m", "-J-XX:+UseSerialGC", "-encoding", "UTF8"),
            *("-cp", ".:javatuples-1.2.jar", "Problem.java"),
        ),
        artefacts="*.class *.jar",
        run=(
            *("java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:-UsePerfData"),
            *("-cp", ".:javatuples-1.2.jar", "-ea", "Problem"),
        ),
        limits=_VIRTUAL_MACHINE,
        epilogue='System.out.println("\\nFIRST" + "SECOND");',
        inside=2,
        binds=(*_BINDS, *(f"/etc/java-{n}-openjdk" for n in (8, 11, 17, 21, 25))),
        support={
            "javatuples-1.2.jar": "https://repo1.maven.org/maven2/org/javatuples/javatuples/1.2/"
        },
    ),
    Language(
        key="js",
        name="JavaScript",
        file="main.js",
        tools={"node": "apt install nodejs"},
        version=("node", "--version"),
        run=("node", "main.js"),
        limits=replace(_VIRTUAL_MACHINE, wall_seconds=5),
        epilogue='globalThis.process.stdout.write("\\nFIRST" + "SECOND\\n");',
    ),
    Language(
        key="php",
        name="PHP",
        file="main.php",
        tools={"php": "apt install php-cli"},
        version=("php", "--version"),
        run=("php", "main.php"),
        limits=Limits(),
        epilogue='fwrite(STDOUT, "\\nFIRST" . "SECOND\\n");',
        binds=(*_BINDS, "/etc/php"),
    ),
    Language(
        key="python",
        name="Python",
        file="main.py",
        tools={"python3": "apt install python3"},
        version=("python3", "--version"),
        run=("python3", "-I", "main.py"),
        limits=Limits(),
        epilogue='__import__("os").write(1, b"\\nFIRST" + b"SECOND\\n")',
        says_last=True,
    ),
    Language(
        key="r",
        name="R",
        file="main.R",
        tools={"Rscript": "apt install r-base-core"},
        version=("Rscript", "--version"),
        run=("Rscript", "--vanilla", "main.R"),
        limits=Limits(wall_seconds=5),
        epilogue='cat("\\nFIRST", "SECOND\\n", sep = "")',
        binds=(*_BINDS, "/etc/R"),
    ),
    Language(
        key="rb",
        name="Ruby",
        file="main.rb",
        tools={"ruby": "apt install ruby ruby-test-unit"},
        version=("ruby", "--version"),
        run=("ruby", "main.rb"),
        limits=Limits(wall_seconds=5),
        epilogue=(
            "Test::Unit::AutoRunner.need_auto_run = false\n"
            "exit(1) unless Test::Unit::AutoRunner.run\n"
            'STDOUT.write("\\nFIRST" + "SECOND\\n")'
        ),
    ),
    Language(
        key="rs",
        name="Rust",
        file="main.rs",
        tools={"rustc": "apt install rustc", "cc": "apt install gcc"},
        version=("rustc", "--version"),
        compile=("rustc", "-o", "program", "main.rs"),
        artefacts="program",
        run=("./program",),
        limits=Limits(wall_seconds=5),
        epilogue='println!("\\n{}{}", "FIRST", "SECOND");',
        inside=1,
    ),
    Language(
        key="ts",
        name="TypeScript",
        file="main.ts",
        tools={"tsc": "npm install --global typescript@5", "node": "apt install nodejs"},
        version=("tsc", "--version"),
        compile=("tsc", "--target", "esnext", "main.ts"),
        artefacts="main.js",
        run=("node", "main.js"),
        limits=replace(_VIRTUAL_MACHINE, wall_seconds=5),
        epilogue='(globalThis as any).process.stdout.write("\\nFIRST" + "SECOND\\n");',
    ),
)

LANGUAGES = {language.key: language for language in _TABLE}
"""By the names in MultiPL-E's files."""
