"""System calls that no program needs here, refused by a seccomp filter.

Refused are calls that hold memory outside of what is counted (memory files, System V memory,
message queues), reach into other processes, make namespaces or mounts, or open parts of the kernel
that programs of this kind never touch and faults are often found in. They fail with EPERM. A call
of another architecture's table kills the process; one of x32's is refused.
"""

import struct

from fusellm.errors import EvaluationError

_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
"""Numbers on x86_64 and on aarch64 (Linux, arch/*/entry/syscalls and asm-generic/unistd.h)."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column above, and AUDIT_ARCH of linux/audit.h."""

_LOAD_WORD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32 = 0x40000000


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
    numbers = sorted(n for row in _REFUSED.values() if (n := row[column]) is not None)
    refuse = len(numbers) + 1
    code = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, refuse, 0, _X32),
        *((_IF_EQUAL, refuse - 1 - n, 0, number) for n, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
