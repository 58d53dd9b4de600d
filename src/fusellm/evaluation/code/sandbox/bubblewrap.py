"""One program in a bubblewrap sandbox."""

import fcntl
import io
import json
import os
import platform
import pwd
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox.limits import MIB, Limits, Outcome
from fusellm.evaluation.code.sandbox.seccomp import seccomp_filter
from fusellm.evaluation.code.sandbox.watch import STATUS, watch

FOLDER = "/tmp"
"""Where a program and its files are, and the only place that it can write to."""

_NOBODY = 65534
_PEOPLE = range(1000, _NOBODY)
_HOMES = (Path("/home"), Path("/root"))
_EVERYBODYS = (Path("/tmp"), Path("/var/tmp"), Path("/dev"), Path("/proc"), Path("/run"))
_PERSONAL = (
    *(".ssh", ".gnupg", ".aws", ".kube", ".docker", ".config", ".netrc", ".git-credentials"),
    *(".bashrc", ".bash_history", ".zshrc", ".profile", ".env"),
)
"""What tells a home folder, or one with secrets, from a toolchain's, whoever's it is."""

_SHARED = "/dev/shm"
_SHARED_BYTES = 16 * MIB
"""For semaphores, without which no pool of processes starts, and memory that processes share."""

_LEAST_VERSION = (0, 8)
_TOOLS = ("bwrap", "prlimit", "choom", "sh", "tar")
_UNPACK = 'tar -xf - && exec "$@" < /dev/null'
_UNPACK_AND_PACK = 'tar -xf - && "$@" < /dev/null >&2 && exec tar -cf - -- '
_SYSTEM = ("/usr/local/bin", "/usr/bin")
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PROBE_LIMITS = Limits(wall_seconds=10, processes=12, disk_bytes=MIB)
_PROBE = """cat /proc/self/status /proc/net/dev
touch /here /usr/here /dev/here
head -c 2097152 /dev/zero > full
for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do sleep 0.2 & done
echo unlimited
"""
_USERNS_SWITCHES = {
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "1"),
    "/proc/sys/user/max_user_namespaces": ("0", "15000"),
}
"""Where Ubuntu, Debian and Linux forbid what bwrap needs: the value that does, and its cure."""


@dataclass(frozen=True)
class Sandbox:
    """A sandbox that was found to hold; see `find_sandbox`.

    Attributes:
        bwrap: path of bubblewrap.
        version: of bubblewrap.
        toolchains: folders of this machine that every program may read, `bin` in each being on
            its PATH. Besides them and /usr a program sees nothing of the machine.
    """

    bwrap: str
    version: str
    toolchains: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """PATH of every program."""
        return ":".join([*(f"{folder}/bin" for folder in self.toolchains), *_SYSTEM])

    def run(
        self,
        command: Sequence[str],
        limits: Limits,
        *,
        archive: bytes = b"",
        binds: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        collect: str = "",
    ) -> Outcome:
        """Run a command in a folder of its own, and end everything that it started.

        Args:
            command: found through `path`.
            archive: files for the folder, as `pack` makes it or an earlier run gave it.
            binds: paths of this machine that may be read, if they exist, besides /usr.
            environment: variables besides PATH, HOME and LANG.
            collect: names or patterns of the shell; standard output becomes an archive of these
                files, if the command succeeds, and what it writes itself goes to standard error.

        Raises:
            EvaluationError: the sandbox could not be made, or was ended from outside.
        """
        driver = _UNPACK_AND_PACK + collect if collect else _UNPACK
        inner = [*_limited(limits), "sh", "-c", driver, "sh", *command]
        variables = {"PATH": self.path, "HOME": FOLDER, "LANG": "C.UTF-8"}
        variables |= environment or {}
        with ExitStack() as stack:
            stdin = stack.enter_context(_memory_file(archive or pack({})))
            rules = stack.enter_context(_memory_file(seccomp_filter(platform.machine())))
            read, write = os.pipe()
            stack.callback(os.close, read)
            with os.fdopen(write, "wb") as status:
                told, filtered = status.fileno(), rules.fileno()
                prefix = self._bwrap(limits, binds, variables, told, filtered)
                began = time.monotonic()
                process = _start([*prefix, *inner], stdin, (told, filtered))
            with process:
                assert process.stdout is not None
                assert process.stderr is not None
                pipes = {"out": process.stdout.fileno(), "err": process.stderr.fileno()}
                folders = {FOLDER: limits.disk_bytes, _SHARED: _SHARED_BYTES}
                stopped, wrote = watch(process, pipes | {STATUS: read}, limits, folders)
            seconds = time.monotonic() - began
        exit_code = None if stopped else _exit_code(wrote[STATUS])
        if exit_code is None and not stopped:
            raise EvaluationError(
                f"{self.bwrap} failed: {_text(wrote['err'])}; see whether the machine is out of "
                "processes or memory, and run again"
            )
        return Outcome(exit_code, stopped, wrote["out"], wrote["err"], seconds)

    def _bwrap(
        self,
        limits: Limits,
        binds: Iterable[str],
        variables: Mapping[str, str],
        status: int,
        rules: int,
    ) -> list[str]:
        return [
            self.bwrap,
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
            *("--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"),
            *("--uid", str(_NOBODY), "--gid", str(_NOBODY), "--clearenv"),
            *(part for name, value in variables.items() for part in ("--setenv", name, value)),
            *("--ro-bind", "/usr", "/usr"),
            *("--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"),
            *("--symlink", "usr/lib64", "/lib64"),
            *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
            *("--size", str(_SHARED_BYTES), "--tmpfs", _SHARED),
            *("--size", str(limits.disk_bytes), "--tmpfs", FOLDER),
            *(part for path in self.toolchains for part in ("--ro-bind", path, path)),
            *(part for path in binds for part in ("--ro-bind-try", path, path)),
            *("--remount-ro", "/"),
            *("--chdir", FOLDER, "--json-status-fd", str(status), "--seccomp", str(rules), "--"),
        ]


def _start(
    command: Sequence[str], stdin: io.BufferedRandom, descriptors: tuple[int, ...]
) -> "subprocess.Popen[bytes]":
    """Start bwrap. Root does it as nobody, as the kernel does not count root's processes."""
    nobody = _NOBODY if os.geteuid() == 0 else None
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            cwd="/",
            env={},
            start_new_session=True,
            user=nobody,
            group=nobody,
            extra_groups=None if nobody is None else [],
        )
    except (OSError, subprocess.SubprocessError) as error:
        user = os.geteuid() if nobody is None else nobody
        raise EvaluationError(
            f"{command[0]} cannot be started as uid {user} ({error}); run as a user other than root"
        ) from error


def _limited(limits: Limits) -> list[str]:
    """Set inside: a user's processes are then counted in each sandbox by itself (Linux 5.14)."""
    return [
        *("choom", "-n", "1000", "--", "prlimit", "--core=0"),
        f"--as={limits.address_space_bytes}",
        f"--cpu={limits.cpu_seconds}",
        f"--fsize={limits.file_bytes}",
        f"--nproc={limits.processes}",
        f"--nofile={limits.open_files}",
        "--",
    ]


def _memory_file(data: bytes) -> io.BufferedRandom:
    """A file without a name that nobody can change: the program can open it through /proc."""
    file = os.fdopen(os.memfd_create("fusellm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(data)
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    return file


def _exit_code(status: bytes) -> int | None:
    """What bwrap says of the command's end; None if it says nothing, as it did not run."""
    for line in status.splitlines():
        told = json.loads(line)
        if "exit-code" in told:
            return int(told["exit-code"])
    return None


def _text(data: bytes) -> str:
    return " ".join(data[-500:].decode("utf-8", "replace").split()) or "it says nothing"


def pack(files: Mapping[str, bytes]) -> bytes:
    """An archive of files by their names, for `Sandbox.run`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _toolchain(folder: Path) -> str:
    """A folder's own name, if it can be a toolchain's: a recipe may be somebody else's."""
    own = folder.resolve()
    if not (own / "bin").is_dir():
        raise EvaluationError(f"toolchain {folder} has no folder bin; name the one that has")
    if fault := _more_than_a_toolchain(own):
        raise EvaluationError(
            f"toolchain {folder} {fault}, which generated programs would read; "
            "name the toolchain's own folder"
        )
    return str(own)


def _more_than_a_toolchain(folder: Path) -> str:
    """What else is in a folder; empty: nothing that can be seen."""
    own = Path.home().resolve()
    if own.is_relative_to(folder):
        return "holds your home folder"
    people = [user for user in pwd.getpwall() if user.pw_uid in (0, *_PEOPLE)]
    homes = {own, *_HOMES, *(Path(user.pw_dir).resolve() for user in people)}
    for home in sorted(homes | set(_EVERYBODYS)):
        if home.is_relative_to(folder):
            return f"holds {home}"
    if folder.parent in homes and folder.name.startswith("."):
        return "keeps settings and keys of its owner"
    personal = [name for name in _PERSONAL if os.path.lexists(folder / name)]
    return f"has {personal[0]} in it, as home folders have" if personal else ""


def find_sandbox(toolchains: Iterable[Path] = ()) -> Sandbox:
    """The sandbox of this machine, after trying whether it holds.

    Args:
        toolchains: folders that every program may read, with a `bin` in each, for compilers and
            interpreters that are not installed under /usr. Nothing secret may be in them.

    Raises:
        EvaluationError: there is none that works, with what to do about it. Generated programs are
            never run without one.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise EvaluationError(
            f"generated programs are run in a sandbox only, and {', '.join(missing)} is not "
            "installed: apt install bubblewrap util-linux tar (or your system's packages of these "
            "names)"
        )
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    asked = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False)
    version = asked.stdout.split()[-1] if asked.stdout.split() else "unknown"
    if tuple(int(n) for n in version.split(".") if n.isdigit()) < _LEAST_VERSION:
        raise EvaluationError(f"{bwrap} is bubblewrap {version}; 0.8.0 or newer is needed")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        raise EvaluationError(
            f"{children} does not exist, so the memory of a program's processes cannot be "
            "watched: use a kernel with CONFIG_PROC_CHILDREN"
        )
    sandbox = Sandbox(bwrap, version, tuple(_toolchain(folder) for folder in toolchains))
    try:
        outcome = sandbox.run(["sh", "-c", _PROBE], _PROBE_LIMITS)
    except EvaluationError as error:
        raise EvaluationError(f"{error}. {_cure()}") from error
    leaks = _leaks(outcome)
    if leaks:
        raise EvaluationError(
            f"{bwrap} {version} makes a sandbox that does not hold here: {'; '.join(leaks)} "
            f"(stderr: {_text(outcome.stderr)}); use a newer kernel (5.14) and bubblewrap"
        )
    return sandbox


def _leaks(outcome: Outcome) -> list[str]:
    """What a sandbox must refuse, and the probe was not refused."""
    told = dict(line.split(":", 1) for line in outcome.stdout.decode().splitlines() if ":" in line)
    interfaces = {name.strip() for name in told if name.startswith(" ")}
    errors = outcome.stderr.decode("utf-8", "replace")
    held = {
        "it runs as another user": told.get("Uid", "").split() == [str(_NOBODY)] * 4,
        "it has capabilities": int(told.get("CapEff", "1"), 16) == 0,
        "it can gain privileges": told.get("NoNewPrivs", "").strip() == "1",
        "its system calls are not filtered": told.get("Seccomp", "").strip() == "2",
        "it has a network": interfaces == {"lo"},
        "it can write outside its folder": errors.count("Read-only file system") == 3,
        "its folder has no limit": "No space left on device" in errors,
        "its processes are not counted": "unlimited" not in told and "fork" in errors.lower(),
    }
    return [leak for leak, holds in held.items() if not holds]


def _cure() -> str:
    """What forbids user namespaces here."""
    for switch, (forbids, allows) in _USERNS_SWITCHES.items():
        path = Path(switch)
        if path.exists() and path.read_text(encoding="utf-8").strip() == forbids:
            name = switch.removeprefix("/proc/sys/").replace("/", ".")
            return f"User namespaces are forbidden here: sysctl -w {name}={allows}"
    return (
        "Does this machine allow user namespaces? In a container they need to be allowed from "
        'outside, and no more than they: see "In a container" of docs/evaluation.md'
    )
