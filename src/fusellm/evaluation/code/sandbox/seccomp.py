"""System calls that no program needs here, refused by a seccomp filter.

The kernel hands each system call of a sandboxed program to a filter first: a small program in BPF,
a machine language of the kernel with one register, loads, jumps forward, and returns. What it
loads from is `struct seccomp_data`: the number of the call (4 bytes), the architecture whose table
of calls the number is of (4), the place in the program (8), and six arguments (8 each). What it
returns is allow, kill, or an error that the program gets in place of the call. An instruction is 8
bytes: what to do (2), how many instructions to jump over if a comparison holds (1) and if it does
not (1), and a value (4).

Refused are

- calls of seccomp.yaml, each for the reason above it, with EPERM;
- sockets of any family but AF_UNIX, with EAFNOSUPPORT. A network namespace holds back the internet
  families only: AF_VSOCK reaches the host of a virtual machine, and others the kernel's own parts.
  AF_UNIX is what pools of processes and event loops are made of;
- larger buffers of sockets and pipes, and filters for sockets, with EPERM: see `Limits` for how the
  memory in them is counted;
- `clone` into new namespaces, with EPERM; `clone3`, whose flags lie in memory where no filter can
  see them, with ENOSYS, upon which libraries take `clone`;
- calls that are newer than this file, with ENOSYS, as if the kernel were older. Numbers of the x32
  table are larger than all others, and fall under this.

A call by another table than the machine's own (32 bits on x86_64, with `socketcall` in it) kills
the process. On a machine whose tables are not here nothing is run.

A filter can see arguments, not what they point to: all that is compared here are plain numbers.
The generator is here and not libseccomp's because that is a library in C, which would have to be
installed on each machine for some 20 lines of Python.
"""

import errno
import socket
import struct

from fusellm.errors import EvaluationError
from fusellm.evaluation.yaml_table import yaml_table

_REFUSED: dict[str, tuple[int | None, int | None]] = yaml_table(__file__)
"""Numbers on x86_64 and on aarch64; the file has the reason above each group."""

_LOOKED_INTO: dict[str, tuple[tuple[int, int], str]] = {
    "socket": ((41, 198), "family"),
    "socketpair": ((53, 199), "family"),
    "setsockopt": ((54, 208), "option"),
    "fcntl": ((72, 25), "pipe size"),
    "clone": ((56, 220), "namespaces"),
    "clone3": ((435, 435), "unknown"),
}
"""Calls that depend on their arguments: numbers as above, and the block that decides."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column above, and AUDIT_ARCH of linux/audit.h."""

_NEWER = 463
"""The first number that this file does not know: 462 is mseal, of Linux 6.10, on both machines."""

_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET of linux/sched.h."""

_SOCKET_OPTIONS = (socket.SO_SNDBUF, 32, 26, 50, 51, 52)
"""SO_SNDBUF, SNDBUFFORCE, ATTACH_FILTER, ATTACH_BPF and ATTACH_REUSEPORT_CBPF and _EBPF."""

_F_SETPIPE_SZ = 1031

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

_Instruction = tuple[int, int, str, str]
"""What to do, its value, and the blocks to go to if it holds and if not; "" is the next line."""


def seccomp_filter(machine: str) -> bytes:
    """The filter as an array of `struct sock_filter`, as bwrap reads it.

    Args:
        machine: as `platform.machine()` names it.

    Raises:
        EvaluationError: the system calls of this machine are not known here.

    >>> len(seccomp_filter("x86_64")) % 8
    0
    """
    if machine not in _MACHINES:
        raise EvaluationError(
            f"generated programs are not run on {machine}: their system calls are filtered on "
            f"{' and '.join(_MACHINES)} only; evaluate code on one of these"
        )
    column, architecture = _MACHINES[machine]
    refused = [(n, "refuse") for row in _REFUSED.values() if (n := row[column]) is not None]
    looked_into = [(row[column], block) for row, block in _LOOKED_INTO.values()]
    return _assemble(
        {
            "machine": [
                (_LOAD, _ARCHITECTURE_AT, "", ""),
                (_IF_EQUAL, architecture, "", "kill"),
                (_LOAD, _NUMBER_AT, "", ""),
                (_IF_AT_LEAST, _NEWER, "unknown", ""),
                *((_IF_EQUAL, number, block, "") for number, block in looked_into + refused),
                (_RETURN, _ALLOW, "", ""),
            ],
            "family": [_load_argument(0), (_IF_EQUAL, socket.AF_UNIX, "allow", "no family")],
            "option": [
                _load_argument(1),
                (_IF_EQUAL, socket.SOL_SOCKET, "", "allow"),
                _load_argument(2),
                *((_IF_EQUAL, option, "refuse", "") for option in _SOCKET_OPTIONS),
                (_RETURN, _ALLOW, "", ""),
            ],
            "pipe size": [_load_argument(1), (_IF_EQUAL, _F_SETPIPE_SZ, "refuse", "allow")],
            "namespaces": [_load_argument(0), (_IF_ANY_BIT, _NAMESPACES, "refuse", "allow")],
            "allow": [(_RETURN, _ALLOW, "", "")],
            "refuse": [(_RETURN, _ERROR | errno.EPERM, "", "")],
            "no family": [(_RETURN, _ERROR | errno.EAFNOSUPPORT, "", "")],
            "unknown": [(_RETURN, _ERROR | errno.ENOSYS, "", "")],
            "kill": [(_RETURN, _KILL, "", "")],
        }
    )


def _load_argument(index: int) -> _Instruction:
    """The lower half of an argument: the kernel too takes no more of those that are looked into."""
    return (_LOAD, _ARGUMENTS_AT + 8 * index, "", "")


def _assemble(blocks: dict[str, list[_Instruction]]) -> bytes:
    """Lines one after the other, names of blocks replaced by how many lines to jump over."""
    starts: dict[str, int] = {}
    length = 0
    for name, block in blocks.items():
        starts[name] = length
        length += len(block)

    def over(name: str, line: int) -> int:
        return starts[name] - line - 1 if name else 0

    lines = [instruction for block in blocks.values() for instruction in block]
    return b"".join(
        # A jump backwards or over more than 255 lines is an error of struct.
        struct.pack("=HBBI", what, over(yes, line), over(no, line), value)
        for line, (what, value, yes, no) in enumerate(lines)
    )
