"""Work that a page waits for, in a thread of its own, and how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, Thread
from traceback import clear_frames
from typing import Any, Generic, TypeVar

from fusellm.errors import FusellmError
from fusellm.progress import Bar, Silent

Made = TypeVar("Made")


@dataclass
class _Counted:
    total: float
    done: float = 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount

    def resize(self, total: float, done: float = 0) -> None:
        self.total, self.done = total, done


class _Told(Silent):
    """What work is doing, for whoever asks."""

    def __init__(self) -> None:
        self.what = ""
        self._bar: _Counted | None = None

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        self.what, self._bar = what, _Counted(total)
        yield self._bar

    @property
    def share(self) -> float | None:
        """How much of it is done; None where that is not known."""
        bar = self._bar
        return min(bar.done / bar.total, 1.0) if bar is not None and bar.total > 0 else None


class Job(Generic[Made]):
    """Something that is made once, when it is first asked for.

    An error is told once; who asks again has it tried again.

    >>> job = Job("adding", lambda progress: 1 + 1)
    >>> job.wait()
    2
    >>> job.told
    {'done': True, 'what': 'adding', 'share': None, 'error': None}
    """

    def __init__(self, what: str, make: Callable[[Silent], Made]) -> None:
        """`make` is given where to say how far it is."""
        self._what, self._make, self._told = what, make, _Told()
        self._lock = Lock()
        self._thread: Thread | None = None
        self._made: list[Made] = []
        self._error: Exception | None = None
        self._was_told = False

    def start(self) -> "Job[Made]":
        """Begin with it, if that has not been done."""
        with self._lock:
            if self._error is not None and self._was_told:
                self._thread = self._error = None
                self._was_told = False
            if self._thread is None:
                self._thread = Thread(target=self._work, name=self._what, daemon=True)
                self._thread.start()
        return self

    def _work(self) -> None:
        try:
            self._made.append(self._make(self._told))
        except Exception as error:  # it is raised again where it is asked for
            # What its frames hold, such as a model, is not to be kept with it.
            for one in (error, error.__cause__, error.__context__):
                if one is not None:
                    clear_frames(one.__traceback__)
            self._error = error

    def wait(self, seconds: float | None = None) -> Made | None:
        """What was made; None where it is not ready after so many seconds.

        Raises:
            Exception: what its making raised.
        """
        self.start()
        assert self._thread is not None
        self._thread.join(seconds)
        if self._error is not None:
            self._was_told = True
            raise self._error
        return self._made[0] if self._made else None

    @property
    def told(self) -> dict[str, Any]:
        """How far it is, for a page that waits."""
        error = self._error
        told = str(error) if isinstance(error, FusellmError) else None
        if error is not None and told is None:
            told = f"{type(error).__name__}: {error}"
        what, share = self._told.what or self._what, self._told.share
        done = bool(self._made) or error is not None
        self._was_told = self._was_told or error is not None
        return {"done": done, "what": what, "share": share, "error": told}
