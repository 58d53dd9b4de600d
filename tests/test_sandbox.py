"""The sandbox: what must not get out of it, and what must work in it."""

import errno
import json
import operator
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from attacks import (
    _PREAMBLE,
    ATTACKS,
    LIMITS,
    Attack,
    World,
    processes_with,
    run_attack,
    world,
)
from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox import (
    LANGUAGES,
    MIB,
    Language,
    Limits,
    Sandbox,
    find_sandbox,
    find_toolchain,
    pack,
)
from fusellm.evaluation.code.sandbox.examples import EXAMPLES
from fusellm.evaluation.code.sandbox.seccomp import seccomp_filter
from fusellm.evaluation.code.sandbox.toolchain import with_nonce
from toolchains import SLOW, Toolchains

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture(scope="module")
def outside() -> Iterator[World]:
    with world() as found:
        yield found


# Attacks


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_attacks_are_contained(attack: Attack, sandbox: Sandbox, outside: World) -> None:
    outcome, escapes = run_attack(attack, sandbox, outside)
    assert escapes == [], outcome


@pytest.mark.parametrize("name", ["reading the host", "sockets of the host"])
def test_attacks_succeed_where_there_is_no_sandbox(name: str, tmp_path: Path) -> None:
    """Harmless ones; what they could not do here would show nothing inside."""
    attack = next(attack for attack in ATTACKS if attack.name == name)
    with world() as found:
        (tmp_path / "world.json").write_text(json.dumps(found.facts))
        command = [sys.executable, "-c", _PREAMBLE + attack.program]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert b"ESCAPED" in ran.stdout
        assert found.secret.encode() in ran.stdout or "abstract" in found.connected


WORKS = "works"


def self_test(language: Language, sandbox: Sandbox, data_dir: Path | None = None) -> str:
    """`WORKS`, or why programs of this language are not run here."""
    try:
        find_toolchain(language, sandbox, data_dir)
    except EvaluationError as error:
        return str(error)
    return WORKS


def test_a_program_dies_with_its_parent(sandbox: Sandbox) -> None:
    token = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    text = f"""
    from fusellm.evaluation.code.sandbox import Limits, Sandbox
    Sandbox({sandbox.bwrap!r}, "").run(["sh", "-c", "sleep 60; : {token}"], Limits(60))
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    try:
        _wait_until(lambda: len(processes_with(token)) > 1 + 2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _wait_until(lambda: processes_with(token) == [])


def _wait_until(holds: "object", seconds: float = 20) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


ORDINARY = {
    "pool": """
import multiprocessing
with multiprocessing.Pool(2) as pool:
    print(sum(pool.map(abs, range(-3, 3))))
""",
    "executor": """
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2) as pool:
    print(sum(pool.map(abs, range(-3, 3))))
""",
    "manager": """
import multiprocessing
with multiprocessing.Manager() as manager:
    print(sum(manager.list([4, 5])))
""",
    "fork server": """
import multiprocessing
context = multiprocessing.get_context("forkserver")
if __name__ == "__main__":
    here, there = context.Pipe()
    process = context.Process(target=print, args=(9,))
    process.start()
    process.join()
""",
    "shared memory": """
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=1 << 20)
memory.buf[0] = 9
print(memory.buf[0])
memory.close()
memory.unlink()
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    print(sum(pool.map(abs, range(-3, 3))))
""",
    "event loop": """
import asyncio
async def main():
    process = await asyncio.create_subprocess_exec("echo", "9", stdout=-1)
    print((await process.communicate())[0].decode().strip())
asyncio.run(main())
""",
    "subprocess": """
import subprocess
print(subprocess.run("echo 4 5 | tr ' ' '+' | sed s/4+5/9/", shell=True, text=True,
                     capture_output=True, check=True).stdout.strip())
""",
    "database": """
import sqlite3
with sqlite3.connect("a.db") as database:
    database.execute("create table t (x)")
    database.execute("insert into t values (9)")
    print(database.execute("select x from t").fetchone()[0])
""",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_run(name: str, sandbox: Sandbox) -> None:
    archive = pack({"main.py": ORDINARY[name].encode()})
    outcome = sandbox.run(["python3", "-I", "main.py"], Limits(), archive=archive)
    assert (outcome.exit_code, outcome.stdout) == (0, b"9\n"), outcome


def test_each_sandbox_counts_its_own_processes(sandbox: Sandbox) -> None:
    """Four at once hold more processes together than one may."""
    text = "for n in 1 2 3 4 5 6 7 8; do sleep 0.5 & done; wait; echo all"
    limits = Limits(wall_seconds=20, processes=14)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: sandbox.run(["sh", "-c", text], limits), range(4)))
    assert [(run.exit_code, run.stdout) for run in runs] == [(0, b"all\n")] * 4


# What is told of a program


def test_outcomes(sandbox: Sandbox) -> None:
    def run(text: str, limits: Limits = LIMITS) -> tuple[int | None, str, bytes, bytes]:
        outcome = sandbox.run(["sh", "-c", text], limits)
        return outcome.exit_code, outcome.stopped, outcome.stdout, outcome.stderr

    assert run("echo out; echo err >&2; exit 7") == (7, "", b"out\n", b"err\n")
    assert run("kill -SEGV $$") == (128 + signal.SIGSEGV, "", b"", b"")
    assert run("cat; pwd; id -u; echo $HOME") == (0, "", b"/tmp\n65534\n/tmp\n", b"")
    assert run("echo a; sleep 9", replace(LIMITS, wall_seconds=0.5)) == (
        *(None, "timeout", b"a\n", b""),
    )
    exact = replace(LIMITS, output_bytes=1000)
    assert run("head -c 1000 /dev/zero", exact) == (0, "", bytes(1000), b"")
    assert run("head -c 1001 /dev/zero", exact) == (None, "output", bytes(1000), b"")
    assert run("nonesuch")[0] == 127


def test_files_go_in_and_come_out(sandbox: Sandbox) -> None:
    first = sandbox.run(
        ["sh", "-c", "echo said; cat a b > c"],
        LIMITS,
        archive=pack({"a": b"1", "b": "ä".encode()}),
        collect="c",
    )
    assert (first.exit_code, first.stderr) == (0, b"said\n")
    second = sandbox.run(["sh", "-c", "cat *"], LIMITS, archive=first.stdout)
    assert second.stdout.decode() == "1ä"
    failed = sandbox.run(["false"], LIMITS, collect="c")
    assert (failed.exit_code, failed.stdout) == (1, b"")


def test_the_environment_is_not_handed_on(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    outcome = sandbox.run(["env"], LIMITS, environment={"GIVEN": "y"})
    names = {line.split("=")[0] for line in outcome.stdout.decode().splitlines()}
    assert names == {"GIVEN", "HOME", "LANG", "PATH", "PWD"}


def test_toolchains_are_shown_and_read_only(sandbox: Sandbox) -> None:
    folder = Path("/var/tmp") / f"toolchain-{os.getpid()}"
    (folder / "bin").mkdir(parents=True)
    try:
        tool = folder / "bin" / "mytool"
        tool.write_text("#!/bin/sh\necho works\n")
        tool.chmod(0o755)
        shown = find_sandbox([folder])
        assert shown.run(["mytool"], LIMITS).stdout == b"works\n"
        assert shown.run(["touch", str(folder / "x")], LIMITS).exit_code == 1
        assert sandbox.run(["mytool"], LIMITS).exit_code == 127
    finally:
        shutil.rmtree(folder)


# No sandbox, no program


def fake_bwrap(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bwrap that comes first on PATH."""
    folder.chmod(0o755)
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that nobody can read, too."""
    folder = Path("/var/tmp") / f"bwrap-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_without_bwrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EvaluationError, match=r"bwrap.* is not installed: apt install bubblewrap"):
        find_sandbox()


def test_an_old_bwrap_is_refused(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bwrap(public, "echo bubblewrap 0.6.1", monkeypatch)
    with pytest.raises(EvaluationError, match=r"bubblewrap 0.6.1; 0.8.0 or newer is needed"):
        find_sandbox()


def test_forbidden_namespaces_are_named(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    if [ "$1" = --version ]; then echo bubblewrap 0.9.0; exit; fi
    echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1"""
    fake_bwrap(public, text, monkeypatch)
    with pytest.raises(EvaluationError, match=r"(?s)uid map: Permission denied.*namespaces"):
        find_sandbox()


FAKE = """
import os, subprocess, sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("bubblewrap 0.9.0"))
status = int(sys.argv[sys.argv.index("--json-status-fd") + 1])
command = sys.argv[sys.argv.index("--") + 1 :]
code = subprocess.call(command, cwd=os.path.dirname(__file__))
os.write(status, b'{"exit-code": %d}\\n' % code)
"""


def test_a_bwrap_that_shuts_nothing_in_is_refused(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bwrap(public, 'exec python3 -I "$(dirname "$0")/fake.py" "$@"', monkeypatch)
    (public / "fake.py").write_text(FAKE)
    public.chmod(0o777)
    with pytest.raises(EvaluationError, match=r"does not hold here: .*it has a network"):
        find_sandbox()


def test_machines_without_a_filter_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"not run on riscv64: .* x86_64 and aarch64"):
        seccomp_filter("riscv64")


def what_a_filter_says(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """A filter run on a call, for machines that these tests do not run on."""
    six = (*arguments, *(0 for _ in range(6 - len(arguments))))
    call = struct.pack("<IIQ6Q", number, architecture, 0, *six)
    lines = list(struct.iter_unpack("<HBBI", code))
    holds = {0x15: operator.eq, 0x35: operator.ge, 0x45: operator.and_}
    register, line = 0, 0
    while True:
        what, if_so, if_not, value = lines[line]
        line += 1
        if what == 0x06:
            return int(value)
        if what == 0x20:
            register = int.from_bytes(call[value : value + 4], "little")
        else:
            line += if_so if holds[what](register, value) else if_not


X86_64, AARCH64 = 0xC000003E, 0xC00000B7
CALLS = {
    "x86_64": (X86_64, 0x40000003, (41, 53, 56, 54, 72)),
    "aarch64": (AARCH64, 0x40000028, (198, 199, 220, 208, 25)),
}
"""Architecture, that of the same machine's calls of 32 bits, and numbers."""


@pytest.mark.parametrize("machine", CALLS)
def test_what_the_filter_says(machine: str) -> None:
    architecture, foreign, (socket_, pair, clone, set_option, fcntl_) = CALLS[machine]
    code = seccomp_filter(machine)

    def says(number: int, *arguments: int) -> int:
        return what_a_filter_says(code, architecture, number, *arguments)

    allow, error = 0x7FFF0000, 0x00050000
    for family in (*range(256), (1 << 32) + 2, (1 << 64) - 1):
        expected = allow if family == socket.AF_UNIX else error + errno.EAFNOSUPPORT
        assert {says(socket_, family, 1), says(pair, family, 1)} == {expected}, family
    threads = 0x3D0F00  # what pthread_create asks for
    assert {says(clone, flags) for flags in (17, 0x4111, threads)} == {allow}
    for flag in (0x20000, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30):
        assert says(clone, flag | 17) == error + errno.EPERM
    assert says(435) == error + errno.ENOSYS
    for option in (7, 26, 32, 50, 51, 52):
        assert says(set_option, 3, socket.SOL_SOCKET, option) == error + errno.EPERM
    assert {says(set_option, 3, 6, 7), says(set_option, 3, socket.SOL_SOCKET, 2)} == {allow}
    assert says(fcntl_, 3, 1031, 1 << 20) == error + errno.EPERM
    assert {says(fcntl_, 3, command) for command in (1, 2, 3, 4, 6, 1030, 1032)} == {allow}
    assert {says(n) for n in (463, 500, 0x40000000 + socket_, 2**32 - 1)} == {error + errno.ENOSYS}
    assert says(425) == error + errno.EPERM
    assert {what_a_filter_says(code, other, 20) for other in (foreign, 0, X86_64 ^ AARCH64)} == {
        0x80000000
    }


# Languages

KEYS = ["cpp", "go", "java", "js", "php", "python", "r", "rb", "rs", "ts"]


def test_the_languages_of_multipl_e_are_there() -> None:
    assert sorted(LANGUAGES) == sorted(EXAMPLES) == KEYS
    for key, language in LANGUAGES.items():
        assert language.key == key
        assert language.epilogue.count("FIRST") == language.epilogue.count("SECOND") == 1
        assert bool(language.compile) == bool(language.artefacts)


EARLY = {
    "cpp": "\n    std::exit(0);",
    "go": "\n    panic(n)\n}\nfunc init() { syscall.Exit(0) }",
    "java": "\n        System.exit(0); return null;",
    "js": "\n  process.exit(0);\n}",
    "php": "\n    exit(0);\n}",
    "python": "\n    raise SystemExit(0)",
    "r": "\n    quit(status = 0)\n}",
    "rb": "\n  exit!(0)\nend",
    "rs": "\n    std::process::exit(0)",
    "ts": "\n  (globalThis as any).process.exit(0); return 0;\n}",
}


@pytest.mark.parametrize("key", KEYS)
def test_what_a_score_depends_on_is_told(key: str) -> None:
    language = LANGUAGES[key]
    told = json.loads(json.dumps(language.protocol))
    assert told["run"]["limits"]["wall_seconds"] == language.limits.wall_seconds
    assert ("compile" in told) == bool(language.compile)
    changed = [
        replace(language, limits=replace(language.limits, wall_seconds=99)),
        replace(language, run=("true",)),
        replace(language, epilogue=""),
    ]
    assert all(other.protocol != language.protocol for other in changed)


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.slow] * (key in SLOW)) for key in KEYS]
)
def test_a_language(key: str, toolchains: Toolchains) -> None:
    """`find_toolchain` has tried a right program and a wrong one."""
    toolchain = toolchains(key)
    assert toolchain.version
    example = EXAMPLES[key]
    prompt = example.prompt.replace('    "fmt"', '    "fmt"\n    "syscall"')
    early = toolchain.judge(prompt + EARLY[key], example.tests)
    assert (early.passed, early.reason[:8]) == (False, "no nonce"), early
    broken = toolchain.judge(example.prompt + "\n ) nonsense (", example.tests)
    assert not broken.passed
    expected = "compile error: exit code" if LANGUAGES[key].compile else "exit code"
    assert broken.reason.startswith(expected)


@pytest.mark.parametrize(
    ("key", "completion"),
    [
        ("php", "\n    return $n;\n} ?> the rest is text"),
        ("rb", "\n  n\nend\n__END__"),
        ("js", "\n}\nprocess.stdout.write(require('fs').readFileSync(__filename));process.exit(0)"),
        ("python", "\n    pass\nprint(open(__file__).read())\nraise SystemExit"),
        ("python", "\n    pass\nimport os\nos._exit(0)"),
        ("python", "\n    pass\nimport atexit, os\natexit.register(os._exit, 0)"),
        ("python", "\n    pass\nimport sys\nsys.excepthook = lambda *a: __import__('os')._exit(0)"),
        (
            "python",
            "\n    pass\nimport os\nopen(__file__, 'w').write('')\n"
            "os.execv('/usr/bin/python3', ['python3', __file__])",
        ),
        ("python", "\n    pass\nimport os\nif os.fork(): os._exit(0)"),
        ("python", "\n    pass\nimport os\nopen('/proc/self/cmdline').read()\nos.close(1)"),
        ("python", "\n    pass\nimport os, signal\nos.kill(os.getppid(), signal.SIGKILL)"),
    ],
)
def test_ending_well_is_not_passing(key: str, completion: str, toolchains: Toolchains) -> None:
    """None of these runs its tests to their end; most of them end with exit code 0."""
    verdict = toolchains(key).judge(EXAMPLES[key].prompt + completion, EXAMPLES[key].tests)
    assert not verdict.passed
    assert verdict.reason


def test_reasons_are_one_printable_line(toolchains: Toolchains) -> None:
    toolchain = toolchains("python")
    example = EXAMPLES["python"]
    text = "\n    pass\nimport sys\nsys.stderr.write('\\x1b[2J\\n' + 'x' * 10**6)\nsys.exit(3)"
    reason = toolchain.judge(example.prompt + text, example.tests).reason
    assert reason.startswith("exit code 3: ")
    assert reason.isprintable()
    assert len(reason) < 300


def test_a_compiler_shows_nothing_of_the_machine(toolchains: Toolchains, outside: World) -> None:
    toolchain = toolchains("cpp")
    example = EXAMPLES["cpp"]
    for place in (outside.facts["canary"], "/etc/passwd"):
        program = f'{example.prompt}{example.right}\n}}\n#include "{place}"\nint unused() {{'
        verdict = toolchain.judge(program, example.tests)
        assert not verdict.passed
        assert outside.secret not in verdict.reason
        assert "root:" not in verdict.reason


def test_a_compiler_is_stopped(toolchains: Toolchains) -> None:
    toolchain = toolchains("cpp")
    short = replace(toolchain.language.compile_limits, wall_seconds=3, memory_bytes=300 * MIB)
    toolchain = replace(toolchain, language=replace(toolchain.language, compile_limits=short))
    verdict = toolchain.judge('#include "/dev/zero"', "int main() {}")
    assert verdict.reason.startswith("compile error: ")


def test_a_missing_toolchain_has_a_reason(sandbox: Sandbox, tmp_path: Path) -> None:
    language = replace(LANGUAGES["python"], tools={"nonesuch": "apt install nonesuch"})
    assert self_test(language, sandbox) == "nonesuch is not installed: apt install nonesuch"
    java = replace(LANGUAGES["java"], tools={})
    reason = self_test(java, sandbox, tmp_path)
    assert reason.startswith(f"Java needs javatuples-1.2.jar in {tmp_path}: get it from https:")
    broken = replace(LANGUAGES["python"], run=("false",))
    assert self_test(broken, sandbox) == "a right program in Python fails here: exit code 1"
    assert self_test(LANGUAGES["python"], sandbox) == WORKS


def test_a_tool_outside_is_named(
    public: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (public / "mytool").write_text("#!/bin/sh\n")
    (public / "mytool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{public}:{os.environ['PATH']}")
    language = replace(LANGUAGES["python"], tools={"mytool": "apt install mytool"})
    reason = self_test(language, sandbox)
    assert reason.startswith(f"mytool is at {public}/mytool, which the sandbox does not show: apt")


def test_a_language_that_passes_wrong_programs_is_not_run(sandbox: Sandbox) -> None:
    show = "import re; print(''.join(re.findall('[0-9a-f]{16}', open('main.py').read())))"
    gullible = replace(LANGUAGES["python"], run=("python3", "-I", "-c", show))
    assert self_test(gullible, sandbox).startswith("a wrong program in Python passes its tests")


@pytest.mark.parametrize("key", KEYS)
def test_the_nonce_stands_in_two_halves_at_the_end(key: str) -> None:
    text = with_nonce(LANGUAGES[key], EXAMPLES[key].tests, "0123456789abcdef")
    assert "0123456789abcdef" not in text
    assert text.index("01234567") < text.index("89abcdef")
    end = text[text.index("89abcdef") :]
    assert end.count("}") - end.count("{") == LANGUAGES[key].inside + (key == "go")


def test_tests_of_another_language_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"tests for Java must end with 2 closing brace"):
        with_nonce(LANGUAGES["java"], "check(x) }", "ab")
