"""Programs that try to get out of the sandbox, and a world outside of it that tells if they did.

A program prints `TRIED` when it came to its end, and `ESCAPED` with what it got away with.
"""

import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusellm.evaluation.code.sandbox import MIB, Limits, Outcome, Sandbox, pack

LIMITS = Limits(wall_seconds=10, processes=32, memory_bytes=512 * MIB, disk_bytes=64 * MIB)
LITTLE = replace(LIMITS, memory_bytes=64 * MIB)
SHORT = Limits(wall_seconds=1, processes=32, memory_bytes=512 * MIB, disk_bytes=64 * MIB)

_PREAMBLE = """
import ctypes, ctypes.util, errno, fcntl, json, mmap, os, platform, resource, signal, socket
import subprocess, sys, time
import threading
world = json.load(open("world.json"))
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what, *more):
    print("ESCAPED", what, *more, flush=True)
def must_fail(what, do, *args):
    try:
        got = do(*args)
    except (OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
        return error
    if got != -1:
        escaped(what, repr(got)[:200])
def call(x86, arm, *args):
    number = x86 if platform.machine() == "x86_64" else arm
    return libc.syscall(ctypes.c_long(number), *[
        ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in args])
def survive(step):
    child = os.fork()
    if child == 0:
        step()
        os._exit(0)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True)
class Attack:
    """A program in Python; `ends` are the ways in which it may be ended ("": by itself)."""

    name: str
    program: str
    ends: tuple[str, ...] = ("",)
    limits: Limits = LIMITS


ATTACKS = [
    Attack("endless loop", "while True: pass", ("timeout",), SHORT),
    Attack("sleep", "time.sleep(1000)", ("timeout",), SHORT),
    Attack(
        "deaf to signals",
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        ("timeout",),
        SHORT,
    ),
    Attack(
        "output closed, still running",
        "os.close(0); os.close(1); os.close(2)\nwhile True: pass",
        ("timeout",),
        SHORT,
    ),
    Attack(
        "stopped with its parent",
        "for pid in (1, os.getppid(), os.getpid()):\n    os.kill(pid, signal.SIGSTOP)\n"
        "time.sleep(100)",
        ("timeout",),
        SHORT,
    ),
    Attack(
        "fork bomb",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        ("timeout", "memory"),
        SHORT,
    ),
    Attack(
        "counted forks",
        """
children = []
try:
    for _ in range(500):
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
        children.append(child)
except OSError:
    pass
if len(children) > 32: escaped("processes", len(children))
if len(children) < 5: escaped("nothing: this test is broken", len(children))
""",
    ),
    Attack(
        "counted threads",
        """
threads = []
try:
    for _ in range(500):
        thread = threading.Thread(target=time.sleep, args=(100,), daemon=True)
        thread.start()
        threads.append(thread)
except RuntimeError:
    pass
if len(threads) > 32: escaped("threads", len(threads))
print("TRIED", flush=True)
os._exit(0)
""",
    ),
    Attack("memory", "must_fail('memory', lambda: len(bytearray(3 << 30)))"),
    Attack(
        "memory of many processes",
        """
for _ in range(10):
    if os.fork() == 0:
        hold = b"x" * (200 << 20)
        time.sleep(100)
time.sleep(100)
""",
        ("memory",),
    ),
    Attack(
        "memory that is not counted",
        """
must_fail("memory file", os.memfd_create, "x")
must_fail("System V memory", call, 29, 194, 0, 1 << 20, 0o1600)
must_fail("message queue", call, 68, 186, 0, 0o1600)
must_fail("POSIX queue", call, 240, 180, b"/q", os.O_CREAT | os.O_RDWR, 0o600, 0)
class Vector(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]
page = mmap.mmap(-1, 4096)
held = Vector(ctypes.addressof(ctypes.c_char.from_buffer(page)), 1)
must_fail("pages in a pipe", call, 278, 75, os.pipe()[1], ctypes.addressof(held), 1, 0)
must_fail("queue of events", call, 294, 26, 0)
must_fail("old queue of events", call, 253, 26, 0)
must_fail("queue of reads", call, 206, 0, 8, ctypes.addressof(ctypes.c_long(0)))
must_fail("larger pipe", fcntl.fcntl, os.pipe()[1], 1031, 1 << 17)
for n in (7, 26, 32, 50, 51, 52):
    one = socket.socket(socket.AF_UNIX)
    error = must_fail(f"option {n}", one.setsockopt, socket.SOL_SOCKET, n, 1 << 17)
    if error.errno != errno.EPERM: escaped("option", n, error)
for path in ("/dev/x", "/x", "/proc/x", "/dev/pts/x", "/dev/mqueue/x"):
    must_fail(path, open, path, "wb")
""",
    ),
    Attack(
        "memory in pairs of sockets",
        """
held = []
try:
    while True:
        pair = socket.socketpair()
        held += pair
        for one in pair:
            one.setblocking(False)
            try:
                while True: one.send(bytes(1 << 14))
            except BlockingIOError: pass
except OSError: pass
time.sleep(1)
""",
        ("memory",),
        LITTLE,
    ),
    Attack(
        "memory in sockets without a descriptor",
        """
listener = socket.socket(socket.AF_UNIX)
listener.bind("listener")
listener.listen(4096)
for _ in range(1000):
    one = socket.socket(socket.AF_UNIX)
    one.connect("listener")
    one.setblocking(False)
    try:
        while True: one.send(bytes(1 << 14))
    except BlockingIOError: pass
    one.close()
time.sleep(1)
""",
        ("memory",),
        LITTLE,
    ),
    Attack(
        "memory in datagrams",
        """
receivers = []
try:
    while True:
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(f"receiver{len(receivers)}")
        receivers.append(receiver)
        try:
            while True:
                one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                one.setblocking(False)
                one.sendto(bytes(200_000), receiver.getsockname())
                one.close()
        except BlockingIOError: pass
except OSError: pass
time.sleep(1)
""",
        ("memory",),
        LITTLE,
    ),
    Attack(
        "memory in page tables",
        """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for n in range(20_000):
    at = libc.mmap((1 << 40) + (n << 30), 4096, mmap.PROT_READ, 0x22, -1, 0)
    ctypes.string_at(at, 1)
time.sleep(1)
""",
        ("memory",),
        LITTLE,
    ),
    Attack(
        "shared memory",
        """
def fill():
    with open("/dev/shm/x", "wb", buffering=0) as file:
        for _ in range(17):
            if file.write(bytes(1 << 20)) < 1 << 20: raise OSError
    return file.name
must_fail("more than 16 MiB", fill)
""",
    ),
    Attack(
        "inodes of shared memory",
        "for n in range(10**7): open(f'/dev/shm/{n}', 'w').close()",
        ("files",),
    ),
    Attack(
        "raised limits",
        """
for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU,
              resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    most = resource.getrlimit(limit)[1]
    if most == resource.RLIM_INFINITY: escaped("no limit", limit)
    must_fail("limit", resource.setrlimit, limit, (most + 1, most + 1))
""",
    ),
    Attack(
        "one big file",
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill():
    with open("big", "wb", buffering=0) as file:
        for _ in range(2000):
            if file.write(bytes(1 << 20)) < 1 << 20: raise OSError
    return file.name
must_fail("a big file", fill)
""",
    ),
    Attack(
        "full disk",
        """
total = 0
try:
    for n in range(100):
        with open(f"part{n}", "wb", buffering=0) as file:
            total += file.write(bytes(8 << 20))
except OSError:
    pass
if total > (64 << 20): escaped("disk", total)
""",
    ),
    Attack("inodes", "for n in range(10**7): open(f'{n}', 'w').close()", ("files",)),
    Attack("endless output", "while True: os.write(1, b'x' * 65536)", ("output",)),
    Attack("endless errors", "while True: os.write(2, b'x' * 65536)", ("output",)),
    Attack(
        "network",
        """
socket.setdefaulttimeout(1)
for host in ("127.0.0.1", "8.8.8.8", world["address"]):
    for port in (world["port"], 53, 80):
        must_fail(f"{host}:{port}", socket.create_connection, (host, port), 1)
must_fail("IPv6", socket.create_connection, ("::1", world["port"]), 1)
must_fail("UDP", socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
must_fail("names", socket.getaddrinfo, "example.org", 80)
must_fail("raw socket", socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
must_fail("packets", socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
names = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
if names != ["lo"]: escaped("interfaces", names)
""",
    ),
    Attack(
        "families of sockets",
        """
pair = (ctypes.c_int * 2)()
for family in [*range(46), 255, -1, (1 << 32) + socket.AF_INET]:
    for kind in (1, 2, 3, 4, 5, 6, 10):
        for name, numbers, more in (
            ("socket", (41, 198), ()), ("socketpair", (53, 199), (ctypes.addressof(pair),))
        ):
            ctypes.set_errno(0)
            made = call(*numbers, family, kind, 0, *more)
            error = ctypes.get_errno()
            if family == socket.AF_UNIX: continue
            if made != -1: escaped(name, family, kind)
            elif error != errno.EAFNOSUPPORT: escaped(name, family, kind, errno.errorcode[error])
if call(41, 198, socket.AF_UNIX, socket.SOCK_STREAM, 0) < 0: escaped("this test is broken")
""",
    ),
    Attack(
        "sockets of virtual machines",
        """
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    error = must_fail("AF_VSOCK", socket.socket, socket.AF_VSOCK, kind)
    if error.errno != errno.EAFNOSUPPORT: escaped("AF_VSOCK", error)
""",
    ),
    Attack(
        "sockets of the host",
        """
for name in ("\\0" + world["abstract"], world["socket"], "/run/docker.sock", "/run/dbus/socket"):
    s = socket.socket(socket.AF_UNIX)
    must_fail(name, lambda: s.connect(name) or 0)
""",
    ),
    Attack(
        "reading the host",
        """
places = [world["canary"], "/etc/passwd", "/etc/shadow", "/root/.bashrc", "/etc/hostname",
          "/proc/1/root" + world["canary"], "/proc/self/root" + world["canary"],
          "/usr/.." + world["canary"], "../../.." + world["canary"],
          f"/proc/{world['victim']}/environ", "/proc/kcore", "/proc/kmsg", "/dev/kmsg",
          "/dev/mem", "/dev/vda", "/dev/sda", "/sys/kernel/notes"]
for place in places:
    must_fail(place, lambda: open(place, "rb").read(100))
for folder in ("/home", "/root", "/etc/ssh", "/var", "/work", "/sys", "/run", "/mnt", "/opt"):
    must_fail(folder, os.listdir, folder)
for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
    for part in ("environ", "cmdline", "maps", "mountinfo"):
        try: sys.stdout.write(open(f"/proc/{pid}/{part}", errors="replace").read())
        except OSError: pass
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 8: escaped("processes seen")
print(os.environ, socket.gethostname(), os.uname())
if socket.gethostname() == world["host"]: escaped("host name")
""",
    ),
    Attack(
        "links out",
        """
os.symlink(world["canary"], "link")
must_fail("symlink read", lambda: open("link").read())
os.symlink("/usr/local", "folder")
must_fail("symlink write", open, "folder/x", "w")
os.symlink("/proc/1/root", "root")
must_fail("root of the first process", lambda: open("root" + world["canary"]).read())
must_fail("hard link", lambda: os.link("/usr/bin/env", "env") or 0)
must_fail("over a system file", open, "/usr/bin/env", "r+b")
must_fail("change of mode", lambda: os.chmod("/usr/bin/env", 0o777) or 0)
must_fail("rename", lambda: os.rename("/usr/bin/env", "/tmp/env") or 0)
""",
    ),
    Attack(
        "descriptors",
        """
listing = os.open("/proc/self/fd", os.O_RDONLY)
extra = {int(name) for name in os.listdir(listing)} - {0, 1, 2}
for fd in sorted(extra):
    try: target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError: continue
    if not target.startswith("/proc"): escaped("descriptor", fd, target)
for fd in os.listdir("/proc/1/fd"):
    target = os.readlink(f"/proc/1/fd/{fd}")
    if "pipe" in target: continue
    must_fail(target, lambda: os.write(os.open(f"/proc/1/fd/{fd}", os.O_RDWR), b"exit-code"))
""",
    ),
    Attack(
        "killing others",
        """
def step():
    for pid in [world["victim"], world["tests"], *range(20, 40000), 1, os.getppid()]:
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
print("TRIED", flush=True)
survive(step)
os.kill(-1, signal.SIGKILL)
""",
    ),
    Attack(
        "debugging others",
        """
must_fail("trace me", call, 101, 117, 0, 0, 0, 0)
for pid in (1, os.getppid(), world["victim"]):
    must_fail("attach", call, 101, 117, 16, pid, 0, 0)
    must_fail("seize", call, 101, 117, 0x4206, pid, 0, 0)
must_fail("read memory", call, 310, 270, 1, 0, 0, 0, 0, 0)
must_fail("write memory", call, 311, 271, 1, 0, 0, 0, 0, 0)
if hasattr(os, "pidfd_open"):
    must_fail("take a descriptor", call, 438, 438, os.pidfd_open(1), 0, 0)
""",
    ),
    Attack(
        "namespaces and mounts",
        """
for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x10020000):
    must_fail("unshare", call, 272, 97, flag)
if platform.machine() == "x86_64":
    child = call(56, 0, 0x10000000 | 17, 0, 0, 0, 0)
    if child == 0: os._exit(0)
    if child > 0: escaped("clone into a user namespace")
    class Args(ctypes.Structure):
        _fields_ = [(n, ctypes.c_uint64) for n in ("flags", "a", "b", "c", "signal", *"defghi")]
    args = Args(flags=0x10000000, signal=17)
    child = libc.syscall(435, ctypes.byref(args), ctypes.sizeof(args))
    if child == 0: os._exit(0)
    if child > 0: escaped("clone3 into a user namespace")
    if ctypes.get_errno() != errno.ENOSYS: escaped("clone3 is let through")
for kind in ("user", "mnt", "net", "pid"):
    fd = os.open(f"/proc/1/ns/{kind}", os.O_RDONLY)
    must_fail("setns", call, 308, 268, fd, 0)
must_fail("mount", call, 165, 40, b"x", b"/tmp", b"tmpfs", 0, 0)
must_fail("remount", call, 165, 40, b"/usr", b"/usr", b"", 4096 | 32, 0)
must_fail("mount proc", call, 165, 40, b"p", b"/tmp", b"proc", 0, 0)
must_fail("umount", call, 166, 39, b"/usr", 2)
must_fail("chroot", call, 161, 51, b"/tmp")
must_fail("pivot", call, 155, 41, b"/tmp", b"/tmp")
must_fail("new mount call", call, 430, 430, b"tmpfs", 0)
must_fail("bwrap in bwrap", lambda: subprocess.run(
    ["bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"], capture_output=True, check=True))
""",
    ),
    Attack(
        "more rights",
        """
if 0 in (os.getuid(), os.geteuid(), os.getgid(), *os.getgroups()): escaped("root", os.getgroups())
must_fail("setuid", lambda: os.setuid(0) or 0)
must_fail("setresuid", lambda: os.setresuid(0, 0, 0) or 0)
must_fail("setgroups", lambda: os.setgroups([0]) or 0)
for program in ("su", "sudo", "mount", "newuidmap", "passwd", "unshare", "pkexec"):
    for folder in ("/usr/bin/", "/usr/sbin/"):
        try:
            got = subprocess.run([folder + program, "-c", "id -u"], capture_output=True,
                                 text=True, stdin=subprocess.DEVNULL, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
        if got == "0": escaped(program)
status = dict(l.split(":", 1) for l in open("/proc/self/status").read().splitlines())
for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if int(status[name], 16): escaped(name, status[name])
must_fail("priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -20) or 0)
must_fail("host name", lambda: socket.sethostname("x") or 0)
must_fail("clock", lambda: time.clock_settime(time.CLOCK_REALTIME, 0) or 0)
""",
    ),
    Attack(
        "devices",
        """
import stat
for kind, device in ((stat.S_IFBLK, os.makedev(254, 0)), (stat.S_IFCHR, os.makedev(1, 1))):
    must_fail("mknod", lambda: os.mknod("device", kind | 0o666, device) or 0)
allowed = {"null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm",
           "fd", "core", "stdin", "stdout", "stderr"}
extra = set(os.listdir("/dev")) - allowed
if extra: escaped("devices", extra)
must_fail("terminal", open, "/dev/tty", "r+b")
""",
    ),
    Attack(
        "kernel settings",
        """
for place in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger",
              "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/1/oom_score_adj",
              "/sys/fs/cgroup/release_agent", "/sys/kernel/uevent_helper", "/proc/self/uid_map"):
    must_fail(place, lambda: os.write(os.open(place, os.O_WRONLY), b"-1000"))
""",
    ),
    Attack(
        "kernel calls",
        """
must_fail("bpf", call, 321, 280, 0, 0, 0)
must_fail("io_uring", call, 425, 425, 8, ctypes.addressof(ctypes.create_string_buffer(512)))
must_fail("userfaultfd", call, 323, 282, 1)
must_fail("perf", call, 298, 241, 0, 0, -1, -1, 0)
must_fail("keys", call, 248, 217, b"user", b"x", b"y", 1, -2)
must_fail("file handles", call, 304, 265, -100, 0, 0)
if platform.machine() == "x86_64":
    must_fail("x32", call, 0x40000000 + 319, 0, b"x", 0)
    must_fail("socket of x32", call, 0x40000000 + 41, 0, socket.AF_VSOCK, 1, 0)
ctypes.set_errno(0)
for number in (463, 467, 500, 1000):
    call(number, number, -1, 0, 0, 0)
    if ctypes.get_errno() != errno.ENOSYS: escaped("a call of a newer kernel", number)
""",
    ),
    Attack(
        "calls of 32 bits",
        """
if platform.machine() == "x86_64":
    code = mmap.mmap(-1, 4096, prot=7)
    at = ctypes.addressof(ctypes.c_char.from_buffer(code))
    for name, program in (
        ("getpid", "b814000000cd80c3"),
        ("socket of AF_VSOCK", "53b867010000bb28000000b90100000031d2cd805bc3"),
        ("socketcall", "53b866000000bb0100000031c9cd805bc3"),
    ):
        code.seek(0)
        code.write(bytes.fromhex(program))  # mov eax, NUMBER; …; int 0x80; ret
        child = os.fork()
        if child == 0:
            ctypes.CFUNCTYPE(ctypes.c_int)(at)()
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(ended): escaped("32 bits:", name)
""",
    ),
    Attack(
        "background child",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (0, 1, 2): os.close(fd)
        time.sleep(1000)
    os._exit(0)
""",
    ),
    Attack(
        "background child that holds the output",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
""",
    ),
]


@dataclass
class World:
    """What lies outside of the sandbox, and what was seen of attacks on it."""

    facts: dict[str, str | int]
    secret: str
    victim: "subprocess.Popen[bytes]"
    connected: list[str] = field(default_factory=list)


@contextmanager
def world() -> Iterator[World]:
    """A readable file with a secret, sockets that count their callers, and a process to kill."""
    token = secrets.token_hex(8)
    secret = f"secret-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        folder.chmod(0o755)
        canary = folder / "canary.txt"
        canary.write_text(secret)
        canary.chmod(0o644)
        nobody = 65534 if os.geteuid() == 0 else None
        victim = stack.enter_context(
            subprocess.Popen(["sleep", "1000"], user=nobody, env={"SECRET": secret, "PATH": "/bin"})
        )
        stack.callback(victim.kill)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{token}")
        named = stack.enter_context(socket.socket(socket.AF_UNIX))
        named.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        facts: dict[str, str | int] = {
            "canary": str(canary),
            "socket": str(folder / "socket"),
            "abstract": token,
            "port": tcp.getsockname()[1],
            "address": _own_address(),
            "victim": victim.pid,
            "tests": os.getpid(),
            "host": socket.gethostname(),
        }
        found = World(facts, secret, victim)
        for name, listener in (("tcp", tcp), ("abstract", abstract), ("named", named)):
            listener.listen()
            threading.Thread(target=_count, args=(name, listener, found), daemon=True).start()
        yield found


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


def _count(name: str, listener: socket.socket, found: World) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        found.connected.append(name)
        connection.close()


def run_attack(attack: Attack, sandbox: Sandbox, found: World) -> tuple[Outcome, list[str]]:
    """What became of an attack, and what it got away with; nothing is as it should be."""
    token = f"attack-{secrets.token_hex(8)}"
    text = f"{_PREAMBLE}\n{attack.program}\nprint('TRIED', flush=True)\n"
    archive = pack({"main.py": text.encode(), "world.json": json.dumps(found.facts).encode()})
    command = ["python3", "-I", "main.py", token]
    outcome = sandbox.run(command, attack.limits, archive=archive)
    wrote = (outcome.stdout + outcome.stderr).decode("utf-8", "replace")
    escapes = [line for line in wrote.splitlines() if line.startswith("ESCAPED")]
    if outcome.stopped not in attack.ends:
        escapes.append(f"ended by {outcome.stopped or 'itself'}: {wrote[-500:]}")
    if outcome.stopped == "" and "TRIED" not in wrote:
        escapes.append(f"it did not come to its end: {wrote[-500:]}")
    if found.secret in wrote:
        escapes.append("it read the secret")
    if found.victim.poll() is not None:
        escapes.append("it killed a process outside")
    if found.connected:
        escapes.append(f"it connected to {found.connected}")
    if outcome.seconds > attack.limits.wall_seconds + 3:
        escapes.append(f"it ran for {outcome.seconds:.1f} s")
    if left := processes_with(token):
        escapes.append(f"it left processes {left}")
    return outcome, escapes


def processes_with(token: str) -> list[int]:
    """Processes of this machine whose command has a word in it."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if token.encode() in command:
                found.append(int(path.name))
    return found
