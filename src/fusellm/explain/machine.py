"""What fusellm finds where it runs: packages, devices, memory, disk, the hub, the sandbox."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from fusellm.errors import EvaluationError
from fusellm.evaluation.code.sandbox import find_sandbox
from fusellm.models.precision import SLOWER, times_slower
from fusellm.store.translations import cache_folder

_GB = 1e9
_LITTLE_DISK = 5e9
_FOR_DEVELOPERS = "dev"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: of which it is: packages, extras, devices, memory, disk, hub, sandbox.
        name: of it.
        value: what was found.
        cure: what to do, where something is missing or slow; empty where all is well.
        needed: whether fusellm cannot do without it.
    """

    topic: str
    name: str
    value: str
    cure: str = ""
    needed: bool = False


def examine(folder: Path) -> list[Finding]:
    """Look at the machine; no model is loaded, and nothing is fetched.

    A token of the hub is looked for, and never told.

    Args:
        folder: where runs are to be.
    """
    return [*_packages(), *_devices(), *_memory(), *_disk(folder), *_hub(), *_sandbox()]


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "python", platform.python_version())
    try:
        wanted = [Requirement(one) for one in requires("fusellm") or ()]
        yield Finding("packages", "fusellm", version("fusellm"))
    except PackageNotFoundError:
        yield Finding("packages", "fusellm", "run from a folder, not installed", "pip install .")
        return
    by_extra: dict[str, list[Requirement]] = {}
    for one in wanted:
        extra = str(one.marker).partition('extra == "')[2].rstrip('"') if one.marker else ""
        by_extra.setdefault(extra, []).append(one)
    for one in by_extra.pop("", []):
        yield _package(one, "packages", f"pip install '{one.name}{one.specifier}'", needed=True)
    for extra, ones in by_extra.items():
        if extra != _FOR_DEVELOPERS:
            for one in ones:
                yield _package(one, "extras", f"pip install 'fusellm[{extra}]'", needed=False)


def _package(wanted: Requirement, topic: str, cure: str, needed: bool) -> Finding:
    try:
        there = version(wanted.name)
    except PackageNotFoundError:
        return Finding(topic, wanted.name, "not installed", cure, needed)
    if wanted.specifier.contains(there, prereleases=True):
        return Finding(topic, wanted.name, there)
    return Finding(topic, wanted.name, f"{there}, and {wanted.specifier} is needed", cure, needed)


def _devices() -> Iterator[Finding]:
    build = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            try:
                facts = torch.cuda.get_device_properties(n)
                free, whole = torch.cuda.mem_get_info(n)
            except RuntimeError as error:  # it is another process' alone, full, or broken
                why = " ".join(str(error).split())[:200]
                cure = "see what holds it: nvidia-smi"
                yield Finding("devices", f"GPU {n}", f"cannot be used: {why}", cure)
                continue
            shown = f"{facts.name}, {free / _GB:.1f} of {whole / _GB:.1f} GB free"
            yield Finding("devices", f"GPU {n}", f"{shown}, CUDA {build}")
    elif build is not None and Path("/proc/driver/nvidia").exists():
        yield Finding(
            "devices",
            "GPU",
            "there is one, and torch cannot use it",
            f"this torch is built for CUDA {build}: update the driver, or install another build",
        )
    else:
        why = "this build of torch has no GPUs" if build is None else "torch sees none"
        yield Finding("devices", "GPU", f"none ({why})")
    usable = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(usable(0)) if usable is not None else os.cpu_count()
    threads = f"{cores} cores, {torch.get_num_threads()} threads of torch"
    yield Finding("devices", "processor", f"{_processor()}: {threads}")
    slower = times_slower("bfloat16")
    quick = slower <= SLOWER
    told = f"{slower:.1f} times the time of float32, for a product of matrices (just timed)"
    cure = "" if quick or torch.cuda.is_available() else "dtype: float32 and no bf16: true here"
    yield Finding("devices", "bfloat16 on it", told, cure)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _of_meminfo().get("MemAvailable")


def _memory() -> Iterator[Finding]:
    told = _of_meminfo()
    if "MemTotal" in told:
        free, whole = told.get("MemAvailable", 0), told["MemTotal"]
        yield Finding("memory", "memory", f"{free / _GB:.1f} of {whole / _GB:.1f} GB free")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return
    if limit.isdigit():
        yield Finding("memory", "limit of this container", f"{int(limit) / _GB:.1f} GB")


def _of_meminfo() -> dict[str, int]:
    """Bytes by name."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.replace(":", "").split() for line in lines)
    return {pair[0]: int(pair[1]) * 1024 for pair in pairs if len(pair) == 3}


def _disk(folder: Path) -> Iterator[Finding]:
    hub = Path(constants.HF_HUB_CACHE)
    for name, place, variable in (
        ("runs", folder, "--out"),
        ("models of the hub", hub, "HF_HOME"),
        ("maps and digests", cache_folder(), "FUSELLM_CACHE"),
    ):
        # Path.exists raises where a folder above may not be looked into; this says no.
        above = (place, *place.absolute().parents)
        there = next(path for path in above if os.access(path, os.F_OK))
        free = shutil.disk_usage(there).free
        shown, cure = f"{place}: {free / _GB:.1f} GB free", ""
        writable = os.access(there, os.W_OK)
        if not writable:
            shown, cure = f"{place}: cannot be written", f"name another place by {variable}"
        elif free < _LITTLE_DISK:
            cure = f"free some, or name another place by {variable}"
        yield Finding("disk", name, shown, cure, needed=not writable and name == "runs")


def _hub() -> Iterator[Finding]:
    offline = constants.HF_HUB_OFFLINE
    place = urlsplit(constants.ENDPOINT).hostname or "a place that is no address"
    yield Finding("hub", "access", "HF_HUB_OFFLINE is set" if offline else place)
    there = "there is one" if get_token() else "none"
    cure = "" if get_token() else "only for gated models and uploads: `hf auth login`"
    yield Finding("hub", "token", there, cure)


def _sandbox() -> Iterator[Finding]:
    try:
        find_sandbox()
    except EvaluationError as error:
        yield Finding("sandbox", "bubblewrap", "none that holds", str(error))
    else:
        yield Finding("sandbox", "bubblewrap", "works; programs of models can be judged")
