"""What all screens are drawn with: one table, one legend of situations, numbers and bars."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

Label = TypeVar("Label", str, Text)

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


SITUATIONS = {
    "same": Look("=", "green", "█"),
    "several": Look("+", "cyan", "▓"),
    "beyond": Look(">", "yellow", "▒"),
    "crossed": Look("×", "magenta", "░"),
    "unaligned": Look("≠", "bright_black", "·"),
}
"""So that they read without colours as well."""


def longest(shown: Callable[[int], Label], most: int, room: int) -> Label:
    """`shown(n)` of the largest n up to `most` that has room; of 1 where none has.

    >>> longest(lambda n: "abc"[:n], 3, 2)
    'ab'
    """
    longer = 1
    while longer < most and cell_len(str(shown(longer + 1))) <= room:
        longer += 1
    return shown(longer)


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
