"""Where text meets the terminal: the two consoles, and what all screens are drawn with.

Names in recipes, tokens and fields of documents are other people's text. Here, and only here, what
a terminal would obey becomes what it shows.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from fusellm.progress import Bar

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


def json_text(found: Any, indent: int | None = None) -> str:
    """JSON that a terminal may be shown as well; in one line, or indented."""
    return json.dumps(found, ensure_ascii=False, indent=indent).translate(_ESCAPES)


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

right = partial(Column, justify="right", no_wrap=True)


def table(*columns: str | Column, **settings: Any) -> Table:
    """A table in the style that all have; a column whose name begins with `>` stands right."""
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "title_justify": "left"}
    style |= {"title_style": "bold italic"}
    made = [
        Column(one.removeprefix(">"), justify="right" if one.startswith(">") else "left")
        if isinstance(one, str)
        else one
        for one in columns
    ]
    return Table(*made, **(style | settings))


def facts(rows: Iterable[tuple[str | Text, str | Text]]) -> Table:
    """Names in grey, each with what is to be said of it."""
    drawn = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for row in rows:
        drawn.add_row(*row)
    return drawn


class Fitted:
    """What is drawn to the room that a cell has."""

    def __init__(self, draw: Callable[[int], Text], least: int) -> None:
        """`draw` makes it, so many columns wide; it needs `least` of them."""
        self._draw, self._least = draw, least

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self._draw(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._least, options.max_width)


class Look(NamedTuple):
    """How a situation is shown: its sign in a line, its colour, its filling of a bar."""

    sign: str
    style: str
    filling: str
    meaning: str


SITUATIONS = {
    "same": Look("=", "green", "█", "both cut the next token alike"),
    "several": Look("+", "cyan", "▓", "the source spells it in several tokens"),
    "beyond": Look(">", "yellow", "▒", "the source's next token ends after it"),
    "crossed": Look(
        "×", "magenta", "░", "the source's tokens end before and after it, not at its end"
    ),
    "unaligned": Look("≠", "bright_black", "·", "the source has not read the same text"),
}
"""So that they read without colours as well."""

_EIGHTHS = " ▏▎▍▌▋▊▉"


def share_bar(share: float, width: int) -> str:
    """A share as a bar; never empty where there is any.

    >>> share_bar(0.5, 4), share_bar(1.0, 4), share_bar(0.001, 4), share_bar(0.0, 4)
    ('██', '████', '▏', '')
    """
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def number(probability: float) -> str:
    """A probability in three decimals.

    >>> number(0.0314), number(1.0), number(0.0001), number(0.0)
    ('.031', '1.00', '<.001', '.000')
    """
    if probability > 0.9995:
        return f"{probability:.2f}"
    return "<.001" if 0 < probability < 0.0005 else f"{probability:.3f}".removeprefix("0")


def counted(amount: str, units: str) -> str:
    """An amount with its unit.

    >>> counted("1", "tokens"), counted("1.2M", "tokens")
    ('1 token', '1.2M tokens')
    """
    return f"{amount} {units.removesuffix('s') if amount == '1' else units}"


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


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._progress.advance(self._task, amount)
        if note:
            self._progress.update(self._task, note=note)

    def resize(self, total: float) -> None:
        self._progress.update(self._task, total=total)


class _PlainBar:
    def __init__(self, console: SafeConsole, what: str, total: float, unit: str) -> None:
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._done, self._note = 0.0, ""
        self._began = self._said = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._said > _PLAIN_EVERY_SECONDS:
            self._said = time.monotonic()
            self.say(f"{_done(self._done, self._total, self._unit)}{self._left()}")

    def resize(self, total: float) -> None:
        self._total = total

    def say(self, text: str) -> None:
        note = f", {self._note}" if self._note else ""
        self._console.say(f"{self._what}: {text}{note}")

    def finish(self) -> None:
        seconds = time.monotonic() - self._began
        self.say(f"{counted(_short(self._done), self._unit)} in {seconds:.1f} s")

    def _left(self) -> str:
        seconds = time.monotonic() - self._began
        if not self._done or not self._total:
            return ""
        rate = self._done / seconds
        left = max(self._total - self._done, 0) / rate
        return f", {_short(rate)} {self._unit}/s, {left:.0f} s left"


class Terminal:
    """A `fusellm.progress.Progress` for people."""

    def __init__(self, console: SafeConsole) -> None:
        self._console = console

    @contextmanager
    def start(self, what: str, total: float, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; 0 where that is not known."""
        if not self._console.is_terminal:
            plain = _PlainBar(self._console, what, total, unit)
            yield plain
            plain.finish()
            return
        with Progress(
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
        ) as progress:
            task = progress.add_task(what, total=total or None, unit=unit, note="")
            yield _RichBar(progress, task)
            done = progress.tasks[0].completed
            progress.update(task, total=done or 1, completed=done or 1)

    def say(self, message: str) -> None:
        """One line."""
        self._console.say(message)
