"""Tables, counts, sizes and times as plain text."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120  # characters; longer cells are folded


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of one or several lines, in columns.

    >>> print(text_table(["model", "bits"], [["zoo/prose", "1.5"], ["zoo/cpp", "2.25"]]))
    model      bits
    zoo/prose  1.5
    zoo/cpp    2.25
    """
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    written = io.StringIO()
    plain = Console(
        file=written, width=_WIDTH, force_terminal=False, force_jupyter=False, color_system=None
    )
    plain.print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip().splitlines())


def counted(amount: str, units: str) -> str:
    """An amount with its unit.

    >>> counted("1", "tokens"), counted("1.2M", "tokens")
    ('1 token', '1.2M tokens')
    """
    return f"{amount} {units.removesuffix('s') if amount == '1' else units}"


def few(names: Sequence[str], most: int) -> str:
    """The first names of a list.

    >>> few(["a", "b", "c"], 2), few(["a", "b"], 2)
    ('a, b, …', 'a, b')
    """
    return ", ".join([*names[:most], *["…"] * (len(names) > most)])


def duration(seconds: float) -> str:
    """A time in the two units that matter.

    >>> [duration(s) for s in (0.31, 12.34, 75, 3700)]
    ['0.3 s', '12.3 s', '1 min 15 s', '1 h 2 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(amount: float) -> str:
    """Bytes in the unit that they are told in.

    >>> [size(n) for n in (820.0, 12_340_000.0, 1.5e12)]
    ['820 B', '12.3 MB', '1,500 GB']
    """
    for unit, many in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= many:
            value = amount / many
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
    return f"{amount:.0f} B"
