"""Where text meets the terminal: the two consoles, and bars and messages on them.

Names in recipes, tokens and fields of documents are other people's text. Here, and only here, what
a terminal would obey becomes what it shows.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from fusellm.progress import Bar, Silent
from fusellm.text_table import counted

_PLAIN_EVERY_SECONDS = 15.0
_KEPT = "\t\n"
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT]
_TURNING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # the direction of what follows
_HALVES = range(0xD800, 0xE000)  # of characters; undecodable bytes of a file's name
_SIGNS = dict.fromkeys((*_CONTROLS, *_TURNING, *_HALVES), "\ufffd")
_SIGNS |= {code: chr(0x2400 + code) for code in _CONTROLS if code < 0x20} | {0x7F: "\u2421"}
_ESCAPES = {code: f"\\u{code:04x}" for code in _SIGNS if code >= 0x7F}  # JSON has the others


def shown(text: str) -> str:
    """A text with signs for what would move a terminal's cursor, colour it or turn its direction.

    >>> shown("red\x1b[31m")
    'red␛[31m'
    """
    return text.translate(_SIGNS)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that a terminal may be shown as well; in one line, or indented."""
    return json.dumps(value, ensure_ascii=False, indent=indent).translate(_ESCAPES)


class SafeConsole(Console):
    """A console on which all text is text: no markup, no emoji names, no control characters."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """A text that is laid out; signs take room where what they stand for takes none."""
        return super().render_str(shown(text), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What is written, piece by piece; movements of the cursor that rich makes are marked."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)

    def show(self, *parts: RenderableType) -> None:
        """Print one after another."""
        for part in parts:
            self.print(part)

    def say(self, text: str | Text) -> None:
        """One line, not wrapped: a path stays a path, and a log has a line for each message."""
        self.print(text, soft_wrap=True)


STDOUT, STDERR = SafeConsole(), SafeConsole(stderr=True)


class _Done(ProgressColumn):
    """How much is done of how much, and at what rate."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        rate = f"  {_short(task.speed)} {unit}/s" if task.speed else ""
        done = _done(task.completed, task.total, unit)
        return Text(f"{done}{rate}", style="progress.download")


def _done(amount: float, total: float | None, unit: str) -> str:
    return f"{_short(amount)}{f'/{_short(total)}' if total else ''} {unit}"


def _short(amount: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if amount >= size:
            return f"{amount / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{amount:.0f}" if amount >= 10 or amount == int(amount) else f"{amount:.1f}"


class _Bar:
    """A bar of rich, or lines now and then where that is disabled as there is no terminal."""

    def __init__(
        self, console: SafeConsole, progress: Progress, what: str, total: float, unit: str
    ) -> None:
        self._console, self._progress = console, progress
        self._id = progress.add_task(what, total=total or None, unit=unit, note="")
        self._task, self._said = progress.tasks[0], time.monotonic()
        self._before = 0.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        task = self._task
        self._progress.update(self._id, advance=amount, note=note or task.fields["note"])
        if self._progress.disable and time.monotonic() - self._said > _PLAIN_EVERY_SECONDS:
            self._said = time.monotonic()
            self._say(_done(task.completed, task.total, task.fields["unit"]) + self._left())

    def resize(self, total: float, done: float = 0) -> None:
        self._before = done
        if done:
            self._progress.update(self._id, completed=done)
        self._progress.update(self._id, total=total)  # and rich forgets how fast it went so far

    def finish(self) -> None:
        done, unit = self._task.completed, self._task.fields["unit"]
        if self._progress.disable:
            self._say(f"{counted(_short(done), unit)} in {self._task.elapsed:.1f} s")
        self._progress.update(self._id, total=done or 1, completed=done or 1)

    def _say(self, text: str) -> None:
        note = self._task.fields["note"]
        self._console.say(f"{self._task.description}: {text}{f', {note}' if note else ''}")

    def _left(self) -> str:
        task = self._task
        here = task.completed - self._before
        if not here or not task.total:
            return ""
        rate = here / (task.elapsed or 1)
        left = max(task.total - task.completed, 0) / rate
        return f", {_short(rate)} {task.fields['unit']}/s, {left:.0f} s left"


class Terminal:
    """A `fusellm.progress.Progress` for people.

    Attributes:
        is_quiet: whether nothing is shown, by whoever types the command.
    """

    is_quiet: ClassVar[bool] = False

    def __init__(self, console: SafeConsole) -> None:
        self._console = console

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; 0 where that is not known."""
        if self.is_quiet:
            with Silent().start(what, total, unit) as nothing:
                yield nothing
            return
        progress = Progress(
            SpinnerColumn(finished_text=Text("✓", style="green")),
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=28),
            _Done(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="cyan", markup=False),
            console=self._console,
            refresh_per_second=4,
            disable=not self._console.is_terminal,
        )
        # One that is disabled is not begun: rich before 15 ends it with an empty line.
        with nullcontext() if progress.disable else progress:
            bar = _Bar(self._console, progress, what, total, unit)
            yield bar
            bar.finish()

    def say(self, message: str) -> None:
        """One line."""
        if not self.is_quiet:
            self._console.say(message)
