"""Tables and counts as plain text."""

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
