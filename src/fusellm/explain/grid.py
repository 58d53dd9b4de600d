"""Token boundaries of several tokenizers in one grid: what is one boundary is one column.

A grid has one row a tokenizer. A token's box begins at its first byte and ends at its boundary:

    │The│·mod el│·return s│
    │The│·mod│el│·return│s│

A column is kept for every boundary of any row; where a row has none there, its box has a gap. A
character that some row cuts is shown as its bytes in that row. Tokens that read nothing (BOS, EOS,
a dummy prefix standing alone) stand in columns of their own.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from rich.cells import cell_len

SEPARATOR = "│"
GOES_ON = "┊"
_SHOWN = {" ": "·", "\n": "⏎", "\t": "→"}
_BYTE_WIDTH = 4  # of \xNN
# Two regional indicators are one flag, and a skin tone melts into what stands before it.
_MELTING = (*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400))


def visible(text: str) -> str:
    """A text as it is shown: white space as signs, and no character that moves the cursor.

    >>> visible("a b\\n\\t\\x1b"), visible("é数")
    ('a·b⏎→\\\\x1b', 'é数')
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if character.isprintable() and cell_len(character) > 0 and ord(character) not in _MELTING:
        return character
    if unicodedata.category(character) == "Mn" and cell_len("◌" + character) == 1:
        return "◌" + character
    return ascii(character)[1:-1]


@dataclass(frozen=True)
class Strip:
    """One tokenizer's reading.

    Attributes:
        ends: boundaries in bytes, one a token, non-decreasing.
        empty: what tokens that read nothing are called, by the token's place.
    """

    ends: Sequence[int]
    empty: Mapping[int, str] = field(default_factory=dict)

    def tokens(self) -> list[tuple[int, int, int]]:
        """(place, first byte, boundary) of each token."""
        return [(n, a, b) for n, (a, b) in enumerate(pairwise([0, *self.ends]))]

    def slots(self) -> dict[int, int]:
        """By boundary, columns that the tokens without bytes take, a separator each."""
        taken: dict[int, int] = {}
        for n, start, end in self.tokens():
            if start == end:
                taken[end] = taken.get(end, 0) + cell_len(self.name(n)) + 1
        return taken

    def name(self, place: int) -> str:
        """What a token that reads nothing is called."""
        return visible(self.empty.get(place, ""))


@dataclass(frozen=True)
class GridRow:
    """A drawn row.

    Attributes:
        cells: what stands in each column; nothing where a wide character goes on.
        first: the column of each token's first cell.
        last: the column of the separator that closes each token.
    """

    cells: list[str]
    first: list[int]
    last: list[int]

    def put(self, column: int, text: str) -> None:
        """Write characters from a column on."""
        for character in text:
            width = cell_len(character)
            if width == 0:  # it stands on what is before it
                self.cells[column - 1] += character
                continue
            self.cells[column : column + width] = [character, *[""] * (width - 1)]
            column += width


@dataclass(frozen=True)
class Grid:
    """Rows of one width.

    Attributes:
        boundaries: the column of the separator of each boundary that any row has.
        cuts: columns of separators of the first row, where a line is best broken.
    """

    rows: list[GridRow]
    boundaries: dict[int, int]
    cuts: list[int]

    @property
    def width(self) -> int:
        """Columns."""
        return len(self.rows[0].cells)

    def lines(self, width: int) -> list[tuple[int, int]]:
        """[first, after last) columns of lines of at most `width`, which ends at least one cell.

        A line that ends at a boundary shows it again where the next one begins.
        """
        lines, start = [], 0
        while start + width < self.width:
            end, again = self._break(start, start + width)
            lines.append((start, end))
            start = end - again
        return [*lines, (start, self.width)]

    def _break(self, start: int, limit: int) -> tuple[int, int]:
        """(column after the last one, 1 if this one is shown again)."""
        for columns in (self.cuts, sorted(self.boundaries.values())):
            inside = [column for column in columns if start < column < limit]
            if inside and inside[-1] - start > (limit - start) // 2:
                return inside[-1] + 1, 1
        end = limit
        while end > start + 1 and any(row.cells[end] == "" for row in self.rows):
            end -= 1
        return end, 0


class _Layout:
    """Where every byte and boundary stands."""

    def __init__(self, text: str, strips: Sequence[Strip]) -> None:
        self.data = text.encode()
        self.total = len(self.data)
        self.boundaries: dict[int, int] = {}
        self.columns: list[int] = []  # of each byte
        self.characters: list[tuple[int, int, str]] = []  # of each byte: first, after, as shown
        taken = [strip.slots() for strip in strips]
        cuts = {0, self.total, *(end for strip in strips for end in strip.ends)}
        slots = {cut: max(one.get(cut, 0) for one in taken) for cut in cuts}
        column = 0
        for character in text:
            first, shown = len(self.columns), _visible(character)
            after = first + len(character.encode())
            is_cut = not cuts.isdisjoint(range(first + 1, after))
            for offset in range(first, after):
                if offset in cuts:
                    self.boundaries[offset] = column + slots[offset]
                    column += slots[offset] + 1
                self.columns.append(column)
                self.characters.append((first, after, shown))
                if is_cut or offset == first:
                    column += _BYTE_WIDTH if is_cut else cell_len(shown)
        self.boundaries[self.total] = column
        self.width = column + 1 + slots[self.total]


def grid(text: str, strips: Sequence[Strip]) -> Grid:
    """Draw the readings of a text, one row each.

    Args:
        text: not empty.
        strips: one or more; lines are broken at the boundaries of the first where that is
            possible. A strip without tokens gives an empty row.

    >>> drawn = grid("a modelé", [Strip([1, 7, 9]), Strip([0, 1, 5, 8, 9], {0: "<s>"})])
    >>> for row in drawn.rows:
    ...     print("".join(row.cells))
        │a│·mod el│é        │
    │<s>│a│·mod│el \\xc3│\\xa9│
    """
    layout = _Layout(text, strips)
    rows = [_row(strip, layout) for strip in strips]
    cuts = sorted(set(layout.boundaries.values()) & set(rows[0].last))
    return Grid(rows, layout.boundaries, cuts)


def _row(strip: Strip, layout: _Layout) -> GridRow:
    row, slots = GridRow([" "] * layout.width, [], []), strip.slots()
    for end, tokens in groupby(strip.tokens(), key=lambda token: token[2]):
        # Tokens without bytes stand before their boundary, and after it at the text's end.
        close = layout.boundaries[end] - (slots.get(end, 0) if end < layout.total else 0)
        for place, start, _ in tokens:
            begin = layout.boundaries[start] + 1
            if start == end:
                begin, close = close + 1, close + 1 + cell_len(strip.name(place))
                row.put(begin, strip.name(place))
            else:
                _put_text(row, start, end, layout)
            if start == end == layout.total and place + 1 == len(strip.ends):
                close = layout.width - 1
            row.put(begin - 1, SEPARATOR)
            row.put(close, SEPARATOR)
            row.first.append(begin)
            row.last.append(close)
    return row


def _put_text(row: GridRow, start: int, end: int, layout: _Layout) -> None:
    for offset in range(start, end):
        first, after, shown = layout.characters[offset]
        if start > first or after > end:
            row.put(layout.columns[offset], f"\\x{layout.data[offset]:02x}")
        elif offset == first:
            row.put(layout.columns[offset], shown)
