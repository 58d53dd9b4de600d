"""How fast bars move: the rate of a loop once it runs, apart from what comes before it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusellm.progress import Bar, Progress

_BURST_SECONDS = 2e-3
_MOVES_IN_BURSTS = "evaluating"  # block by block, once a batch is done


class Loop:
    """One loop over data, as its bar saw it.

    Attributes:
        what: it was, as the bar said.
        done: units.
        seconds: that it took in all.
    """

    def __init__(self, what: str, in_bursts: bool = False) -> None:
        """It begins now. `in_bursts`: whether a bar of single units moves once for many."""
        self.what, self.done, self.seconds = what, 0.0, 0.0
        self._in_bursts = in_bursts
        self._began = time.perf_counter()
        self._moves: list[tuple[float, float]] = []  # when so many units were done

    def move(self, amount: float) -> None:
        """So many units more are done."""
        self.done += amount
        if amount:
            self._moves.append((time.perf_counter(), self.done))

    def end(self) -> None:
        """It ends now."""
        self.seconds = time.perf_counter() - self._began

    @property
    def steady(self) -> float:
        """Seconds that all its units take at the rate that it has after the first move.

        The first move has in it what is done once: memory is taken, code is compiled. Where there
        is only one, that cannot be told apart. Blocks of one batch move a bar in a burst, which is
        one move.
        """
        moves: list[tuple[float, float]] = []
        for at, done in self._moves:
            if self._in_bursts and moves and at - moves[-1][0] < _BURST_SECONDS:
                moves.pop()
            moves.append((at, done))
        if len(moves) < 2:
            return self.seconds
        (first, before), (last, after) = moves[0], moves[-1]
        return (last - first) / (after - before) * self.done if after > before else self.seconds


class Stopwatch:
    """A progress whose bars are shown as another one shows them, and timed.

    Messages are not shown: what is tried will say them again when it is done.
    """

    def __init__(self, shown: Progress) -> None:
        """`shown`: where the bars are seen."""
        self._shown = shown
        self.loops: list[Loop] = []

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; 0 where that is not known."""
        loop = Loop(what, in_bursts=what.startswith(_MOVES_IN_BURSTS))
        self.loops.append(loop)
        with self._shown.start(f"trying: {what}", total, unit) as bar:
            yield _TimedBar(bar, loop)
        loop.end()

    def say(self, message: str) -> None:
        """Nothing."""

    def taken(self) -> list[Loop]:
        """The loops since it was asked last."""
        loops, self.loops = self.loops, []
        return loops


class _TimedBar:
    def __init__(self, bar: Bar, loop: Loop) -> None:
        self._bar, self._loop = bar, loop

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._bar.advance(amount, note)
        self._loop.move(amount)

    def resize(self, total: float, done: float = 0) -> None:
        self._bar.resize(total, done)
