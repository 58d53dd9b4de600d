"""What a program may use, and what became of it."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a program may use before it is stopped.

    Attributes:
        wall_seconds: time on the clock, for all its processes.
        address_space_bytes: virtual memory of each process.
        memory_bytes: resident and swapped memory of all its processes together, their page tables,
            and 2 × 208 KiB for each socket (or what a socket's buffer is here); looked at 20 times
            a second.
        processes: processes and threads at one time, those of the sandbox (3) among them.
        file_bytes: size of one file.
        disk_bytes: of the only folder it can write to, which lies in memory.
        files: in that folder.
        output_bytes: of standard output, and as many of standard error.
        open_files: by each process.
    """

    wall_seconds: float = 15
    address_space_bytes: int = 1024 * MIB
    memory_bytes: int = 1024 * MIB
    processes: int = 64
    file_bytes: int = 64 * MIB
    disk_bytes: int = 256 * MIB
    files: int = 20_000
    output_bytes: int = 4 * MIB
    open_files: int = 256

    @property
    def cpu_seconds(self) -> int:
        """Of each process, should the clock fail: twice the wall time, as programs have threads."""
        return 2 * int(self.wall_seconds) + 1


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        exit_code: 128 + n for a program that died of signal n; None if it was stopped.
        stopped: the limit for which it was stopped from outside: timeout, output, memory or files;
            empty otherwise.
        stdout, stderr: at most `Limits.output_bytes` of each.
        seconds: on the clock, the sandbox included.
    """

    exit_code: int | None
    stopped: str
    stdout: bytes
    stderr: bytes
    seconds: float
