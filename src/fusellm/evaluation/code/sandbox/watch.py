"""Reading what a sandboxed program writes, and stopping it at its limits.

What memory is counted: of every process what it holds (`VmRSS`), what was swapped out (`VmSwap`)
and its page tables (`VmPTE`: a page that is only read takes none itself, and up to 8 KiB of these);
and of sockets, whose buffers belong to no process, the most that their number can hold. A socket
buffers what is sent through it, up to its `SO_SNDBUF`, which the sandbox does not let it change,
and one message more that is no larger than that. A socket that was closed is counted until what it
sent has been read, as is one that waits to be accepted or is on its way in a message.
"""

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox.limits import Limits

STATUS = "status"
_LOOK_EVERY_SECONDS = 0.05
_PATIENCE_SECONDS = 10
_CHUNK = 1 << 16
_KIB = 1024
_HELD = (b"VmRSS:", b"VmSwap:", b"VmPTE:")


class _First(NamedTuple):
    """The sandbox's first process, with whose end all others end; `handle` is a pidfd."""

    pid: int
    handle: int


def watch(
    process: "subprocess.Popen[bytes]",
    pipes: Mapping[str, int],
    limits: Limits,
    folders: Mapping[str, int],
) -> tuple[str, dict[str, bytes]]:
    """Read pipes to their ends, or to the first limit that is reached; then nothing runs any more.

    Args:
        process: the leader of its own process group, whose death ends all that it started.
        pipes: file descriptors by name; `STATUS` is what bwrap tells as JSON.
        folders: of the sandbox, whose files are counted, and the size of each in bytes.

    Returns:
        The limit (empty: none), and what was read from each pipe.
    """
    read = {name: bytearray() for name in pipes}
    end = time.monotonic() + limits.wall_seconds
    look = 0.0
    stopped = ""
    first: _First | None = None
    socket_bytes = _most_in_a_socket()
    try:
        with selectors.DefaultSelector() as selector:
            for name, pipe in pipes.items():
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map() and not stopped:
                now = time.monotonic()
                if now >= look:
                    held = sum(map(_held, _descendants(process.pid)))
                    held += _sockets(first.pid) * socket_bytes if first else 0
                    if held > limits.memory_bytes:
                        stopped = "memory"
                    elif _files(process.pid, folders) > limits.files:
                        stopped = "files"
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


def _first_process(status: bytes) -> _First | None:
    """The process that bwrap tells of; None if it is gone, or not told."""
    line, end, _ = status.partition(b"\n")
    pid = json.loads(line).get("child-pid") if end else None
    if pid is None:
        return None
    try:
        return _First(pid, os.pidfd_open(pid))
    except ProcessLookupError:
        return None


def _end(process: "subprocess.Popen[bytes]", first: _First | None) -> None:
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
        signal.pidfd_send_signal(first.handle, signal.SIGKILL)
    poll = select.poll()
    poll.register(first.handle, select.POLLIN)
    ended = poll.poll(_PATIENCE_SECONDS * 1000)
    os.close(first.handle)
    if not ended:
        raise EvaluationError(
            f"a sandboxed program does not end within {_PATIENCE_SECONDS} s of being killed; see "
            "what this machine's kernel waits for"
        )


def _most_in_a_socket() -> int:
    """Bytes that one socket can have on their way: see above."""
    with socket.socket(socket.AF_UNIX) as one:
        return 2 * one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _sockets(first: int) -> int:
    """Of the network namespace of a process, which no other program shares."""
    try:
        told = Path(f"/proc/{first}/net/sockstat").read_bytes()
    except OSError:  # it has ended
        return 0
    return int(told.split(b"\n", 1)[0].rsplit(b" ", 1)[1])


def _held(pid: int) -> int:
    """Bytes of memory that a process holds; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * _KIB for line in lines if line.startswith(_HELD))


def _files(pid: int, folders: Mapping[str, int]) -> int:
    """In the folders of a sandbox together, as whichever of its processes sees most."""
    most = 0
    for descendant in _descendants(pid):
        files = 0
        for folder, size in folders.items():
            with contextlib.suppress(OSError):
                held = os.statvfs(f"/proc/{descendant}/root{folder}")
                # While a sandbox is being made, the path may still be that of the host.
                if held.f_blocks * held.f_bsize == size:
                    files += held.f_files - held.f_ffree
        most = max(most, files)
    return most


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
