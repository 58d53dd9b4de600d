"""How long work tells the user that it goes on, without printing anything itself.

A stage calls `progress.start(...)` for each loop over data; the command line shows a bar with rate
and time left, a test shows nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One loop over data."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is shown beside the bar."""

    def resize(self, total: float, done: float = 0) -> None:
        """The number of units is known now, and how many were done before: they tell no rate."""


class Progress(Protocol):
    """Where bars and messages go."""

    def start(self, what: str, total: float, unit: str) -> AbstractContextManager[Bar]:
        """A bar over `total` units, for use in a `with` statement; 0 where that is not known."""

    def say(self, message: str) -> None:
        """One line for the user."""


class _Nothing:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass

    def resize(self, total: float, done: float = 0) -> None:
        pass


class Silent:
    """Shows nothing; for tests and for use as a library."""

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar that is not shown."""
        yield _Nothing()

    def say(self, message: str) -> None:
        """Say nothing."""
