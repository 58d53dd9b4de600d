"""A training that is told to stop saves a checkpoint first."""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType

from fusellm.training import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(AbstractContextManager["Stop"]):
    """Notes the first signal that would end the process; a second one does what the first would.

    `agreed` is what all processes of a training know, where there are several: one that is told a
    little later than the others would wait for them in a step that they no longer do.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, signal._HANDLER] = {}
        self.agreed: bool | None = None

    def __enter__(self) -> "Stop":
        """Note signals from now on; those that are ignored, as by nohup, stay so."""
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Have signals do what they did; one that was noted and not obeyed does it now."""
        self._restore()
        if self._signal is not None:
            signal.raise_signal(self._signal)

    @property
    def asked(self) -> bool:
        """Whether this process has been told."""
        return self._signal is not None

    @property
    def now(self) -> bool:
        """Whether the training is to stop after this step."""
        return self.asked if self.agreed is None else self.agreed

    def obey(self) -> None:
        """End as the signal would have ended the process."""
        processes.wait()
        self._restore()
        number, self._signal = self._signal or signal.SIGTERM, None
        signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
