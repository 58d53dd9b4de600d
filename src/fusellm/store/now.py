"""What a run is doing now, for who looks at it from another terminal: a small file in its folder.

It is written anew every few seconds while a bar moves, and says nothing that is needed: a run goes
on without it.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from fusellm.progress import Bar, Progress
from fusellm.store.run_folder import NOW
from fusellm.store.usage import memory_of_life

_EVERY_SECONDS = 2.0
_Number = Annotated[float, Field(allow_inf_nan=False, ge=0, lt=1e15)]


@dataclass(frozen=True)
class Now:
    """What is being done.

    Attributes:
        what: is done, in words, with its `unit`.
        done, total: units; of a total that is not known 0.
        rate: units a second; None before any.
        left: seconds, as it goes; None where that is not known.
        note: what is said beside the bar, as the last loss.
        memory: bytes that the process has held at most.
        gpu: bytes of the GPU that it holds; None without one.
        updated: when this was written, in seconds since 1970.
        pid, host: of the process.
    """

    what: str
    unit: str
    done: _Number
    total: _Number
    rate: _Number | None
    left: _Number | None
    note: str
    memory: int
    gpu: int | None
    updated: _Number
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    host: str

    @property
    def is_running(self) -> bool | None:
        """Whether the process is there; None where it is another machine's."""
        if self.host != socket.gethostname():
            return None
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return True
        except (ProcessLookupError, OverflowError):
            return False
        return True


def now_of(run: Path) -> Now | None:
    """What a run said last; None where it has said nothing that can be read."""
    try:
        return _TOLD.validate_json((run / NOW[0]).read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


_TOLD = TypeAdapter(Now)


class Published:
    """A progress that is shown as another one shows it, and told in the run's folder.

    It is told while the run is worked on, and by one process of those that train together.
    """

    def __init__(self, shown: Progress, run: Path) -> None:
        """`run`: its folder; nothing is written before it is there."""
        self._shown, self._run, self._works = shown, run, False

    @contextmanager
    def working(self) -> Iterator[None]:
        """While bars are told."""
        before, self._works = self._works, os.environ.get("RANK", "0") == "0"
        try:
            yield
        finally:
            self._works = before

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; 0 where that is not known."""
        with self._shown.start(what, total, unit) as bar:
            if not self._works:
                yield bar
                return
            published = _PublishedBar(bar, self._run, what, total, unit)
            published.tell()
            yield published
            published.tell()

    def say(self, message: str) -> None:
        """One line."""
        self._shown.say(message)


class _PublishedBar:
    def __init__(self, bar: Bar, run: Path, what: str, total: float, unit: str) -> None:
        self._bar, self._run, self._what, self._unit = bar, run, what, unit
        self._total, self._done, self._before = total, 0.0, 0.0
        self._note, self._began, self._told = "", time.monotonic(), -_EVERY_SECONDS

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._bar.advance(amount, note)
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._told >= _EVERY_SECONDS:
            self.tell()

    def resize(self, total: float, done: float = 0) -> None:
        self._bar.resize(total, done)
        self._total, self._before = total, done
        self._done = max(self._done, done)

    def tell(self) -> None:
        self._told = time.monotonic()
        here = self._done - self._before
        rate = here / max(self._told - self._began, 1e-3) if here > 0 else None
        left = max(self._total - self._done, 0) / rate if rate and self._total else None
        torch = sys.modules.get("torch")  # which `status` can do without
        on_gpu = torch is not None and torch.cuda.is_initialized()
        gpu = torch.cuda.memory_allocated() if torch is not None and on_gpu else None
        now = Now(
            self._what,
            self._unit,
            self._done,
            self._total,
            rate,
            left,
            self._note,
            memory_of_life(),
            gpu,
            time.time(),
            os.getpid(),
            socket.gethostname(),
        )
        whole, half = (self._run / name for name in NOW)
        with suppress(OSError):  # a folder that is not there yet, or that can only be read
            half.write_text(json.dumps(asdict(now)), encoding="utf-8")
            half.replace(whole)
