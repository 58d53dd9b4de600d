"""What each stage of a run has used: time, and memory at its most.

It is a small file in the run's folder.

It says nothing that is needed; the report puts it beside what was planned.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from fusellm.store.files import alone_in
from fusellm.store.run_folder import USAGE

_RESETS_THE_PEAK = "5"  # of resident memory: proc(5), clear_refs
_Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, lt=1e18)]


@dataclass(frozen=True)
class Usage:
    """What a stage has used the time that it was finished.

    Attributes:
        seconds: that it took then.
        memory: bytes that the process has held at most.
        gpu: bytes that torch has held on the GPU at most; 0 without one.
    """

    seconds: _Amount
    memory: _Amount
    gpu: _Amount = 0.0

    @property
    def device_memory(self) -> float:
        """Bytes where models are: on the GPU, if there is one.

        >>> Usage(1.0, 5.0).device_memory, Usage(1.0, 5.0, 3.0).device_memory
        (5.0, 3.0)
        """
        return self.gpu or self.memory


_FILE = TypeAdapter(dict[str, Usage])


def usage_of(run: Path) -> Mapping[str, Usage]:
    """What is known, by the names of stages; nothing where the file is missing or damaged."""
    try:
        return _FILE.validate_json((run / USAGE).read_bytes(), strict=True)
    except (OSError, ValueError):
        return {}


@contextmanager
def measured(run: Path, stage: str) -> Iterator[None]:
    """Measure what is done while the context is open, and note it in a run's file.

    Nothing is noted of what fails: where a disk is full, this is not what its last bytes are for.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # a trained model is in a cycle, and would be held on
    began, held = time.perf_counter(), _peak_of_gpu(now=True)
    _forget_peaks()
    yield
    gpu = _peak_of_gpu()
    # What is held on a GPU all the time, by torch itself, is no use of this stage.
    now = Usage(time.perf_counter() - began, peak_memory(), gpu if gpu > held else 0.0)
    with suppress(OSError), alone_in(run):  # a folder that can only be read
        body = {name: asdict(one) for name, one in {**usage_of(run), stage: now}.items()}
        half = run / f"{USAGE}.half"
        half.unlink(missing_ok=True)
        with half.open("x", encoding="utf-8") as file:  # no link that stands there is followed
            file.write(json.dumps(body))
        half.replace(run / USAGE)


def peak_memory() -> int:
    """Bytes that this process has held at most, since they were last forgotten."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(one for one in status.splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return memory_of_life()


def memory_of_life() -> int:
    """Bytes that this process has held at most, ever."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _forget_peaks() -> None:
    """Where the system lets a process do so; elsewhere a peak is that of its whole life."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_RESETS_THE_PEAK, encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _peak_of_gpu(now: bool = False) -> float:
    """Bytes that torch has held at most on any GPU, or holds now; 0 where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    held = torch.cuda.memory_allocated if now else torch.cuda.max_memory_allocated
    return float(max((held(one) for one in range(torch.cuda.device_count())), default=0))
