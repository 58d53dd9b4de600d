"""Reading what a sandboxed program writes, and stopping it at its limits."""

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fusellm.errors import EvaluationError
from fusellm.evaluation.sandbox.limits import Limits

STATUS = "status"
_LOOK_EVERY_SECONDS = 0.05
_PATIENCE_SECONDS = 10
_CHUNK = 1 << 16
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def watch(
    process: "subprocess.Popen[bytes]", pipes: Mapping[str, int], limits: Limits, folder: str
) -> tuple[str, dict[str, bytes]]:
    """Read pipes to their ends, or to the first limit that is reached; then nothing runs any more.

    Args:
        process: the leader of its own process group, whose death ends all that it started.
        pipes: file descriptors by name; `STATUS` is what bwrap tells as JSON.
        folder: of the sandbox, whose files are counted.

    Returns:
        The limit (empty: none), and what was read from each pipe.
    """
    read = {name: bytearray() for name in pipes}
    end = time.monotonic() + limits.wall_seconds
    look = 0.0
    stopped = ""
    first = None
    try:
        with selectors.DefaultSelector() as selector:
            for name, pipe in pipes.items():
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map() and not stopped:
                now = time.monotonic()
                if now >= look:
                    stopped = _over(process.pid, limits, folder)
                    look = now + _LOOK_EVERY_SECONDS
                if now >= end:
                    stopped = "timeout"
                for key, _ in selector.select(min(_LOOK_EVERY_SECONDS, max(0, end - now))):
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fd)
                        continue
                    read[key.data] += chunk
                    if len(read[key.data]) > limits.output_bytes:
                        stopped = "output"
                    if first is None and key.data == STATUS:
                        first = _first_process(bytes(read[STATUS]))
    finally:
        _end(process, first)
    return stopped, {name: bytes(data[: limits.output_bytes]) for name, data in read.items()}


def _first_process(status: bytes) -> int | None:
    """A handle of the sandbox's first process, which goes last; None if it is gone, or not told."""
    line, end, _ = status.partition(b"\n")
    pid = json.loads(line).get("child-pid") if end else None
    if pid is None:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _end(process: "subprocess.Popen[bytes]", first: int | None) -> None:
    """Kill what is left of a sandbox, and wait until it is gone.

    Raises:
        EvaluationError: it does not go.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if first is None:
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
    poll = select.poll()
    poll.register(first, select.POLLIN)
    ended = poll.poll(_PATIENCE_SECONDS * 1000)
    os.close(first)
    if not ended:
        raise EvaluationError(
            f"a sandboxed program does not end within {_PATIENCE_SECONDS} s of being killed; see "
            "what this machine's kernel waits for"
        )


def _over(pid: int, limits: Limits, folder: str) -> str:
    """The limit that all descendants of a process together are over; empty: none."""
    resident = 0
    files = 0
    for descendant in _descendants(pid):
        with contextlib.suppress(OSError):
            pages = Path(f"/proc/{descendant}/statm").read_bytes().split()[1]
            resident += int(pages) * _PAGE_BYTES
        with contextlib.suppress(OSError):
            held = os.statvfs(f"/proc/{descendant}/root{folder}")
            # While a sandbox is being made, the path may still be that of the host.
            if held.f_blocks * held.f_bsize == limits.disk_bytes:
                files = max(files, held.f_files - held.f_ffree)
    if resident > limits.memory_bytes:
        return "memory"
    return "files" if files > limits.files else ""


def _descendants(pid: int) -> Iterator[int]:
    """A process and all that it started, adopted orphans included."""
    yield pid
    for child in _children(pid):
        yield from _descendants(child)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_bytes().split())
