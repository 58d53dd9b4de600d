"""Token boundaries of several tokenizers in one grid: what is one boundary is one column.

A grid has one row a tokenizer. A token's box begins at its first byte and ends at its boundary:

    │The│·mod el│·return s│
    │The│·mod│el│·return│s│

A column is kept for every boundary of any row; where a row has none there, its box has a gap. A
character that some row cuts is shown as its bytes in that row. Tokens that read nothing (BOS, EOS,
a dummy prefix standing alone) stand in columns of their own.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rich.cells import cell_len

SEPARATOR = "│"
GOES_ON = "┊"
_SHOWN = {" ": "·", "\n": "⏎", "\t": "→"}
_BYTE_WIDTH = 4  # of \xNN
_JOINING = range(0x1F1E6, 0x1F200)  # regional indicators: two of them are one flag
_MODIFIERS = range(0x1F3FB, 0x1F400)  # skin tones: they melt into what stands before them


def visible(text: str) -> str:
    """A text as it is shown: white space as signs, and no character that moves the cursor.

    >>> visible("a b\\n\\t\\x1b"), visible("é数")
    ('a·b⏎→\\\\x1b', 'é数')
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    code = ord(character)
    alone = cell_len(character) > 0 and code not in _JOINING and code not in _MODIFIERS
    if character.isprintable() and alone:
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
        starts = [0, *self.ends[:-1]]
        return [(n, a, b) for n, (a, b) in enumerate(zip(starts, self.ends, strict=True))]

    @cached_property
    def empty_at(self) -> dict[int, list[tuple[int, str]]]:
        """(place, name) of the tokens that read nothing, by their boundary and in order."""
        found: dict[int, list[tuple[int, str]]] = {}
        for n, start, end in self.tokens():
            if start == end:
                found.setdefault(end, []).append((n, visible(self.empty.get(n, ""))))
        return found

    def slot(self, offset: int) -> int:
        """Columns that the tokens without bytes take at a boundary, a separator each."""
        return sum(cell_len(name) + 1 for _, name in self.empty_at.get(offset, []))


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
        found, start = [], 0
        while start + width < self.width:
            end, again = self._break(start, start + width)
            found.append((start, end))
            start = end - again
        return [*found, (start, self.width)]

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
        total = len(text.encode())
        cuts = {0, total, *(end for strip in strips for end in strip.ends)}
        self.total = total
        self.slots = {
            cut: width for cut in cuts if (width := max(strip.slot(cut) for strip in strips))
        }
        self.boundaries: dict[int, int] = {}
        self.of_byte: list[int] = []
        self.characters: dict[int, tuple[int, str]] = {}  # by first byte: bytes, as it is shown
        column = offset = 0

        def boundary() -> None:
            nonlocal column
            if offset in cuts:
                column += self.slots.get(offset, 0) if offset < total else 0
                self.boundaries[offset] = column
                column += 1

        for character in text:
            size, shown = len(character.encode()), _visible(character)
            self.characters[offset] = (size, shown)
            is_cut = not cuts.isdisjoint(range(offset + 1, offset + size))
            for n in range(size):
                boundary()
                self.of_byte.append(column)
                if is_cut:
                    column += _BYTE_WIDTH
                elif n == 0:
                    column += cell_len(shown)
                offset += 1
        boundary()
        self.width = column + self.slots.get(total, 0)


def grid(text: str, strips: Sequence[Strip]) -> Grid:
    """Draw the readings of a text, one row each.

    Args:
        strips: one or more; lines are broken at the boundaries of the first where that is
            possible. A strip without tokens gives an empty row.

    >>> drawn = grid("a modelé", [Strip([1, 7, 9]), Strip([0, 1, 5, 8, 9], {0: "<s>"})])
    >>> for row in drawn.rows:
    ...     print("".join(row.cells))
        │a│·mod el│é        │
    │<s>│a│·mod│el \\xc3│\\xa9│
    """
    layout = _Layout(text, strips)
    rows = [_row(text.encode(), strip, layout) for strip in strips]
    whole = set(layout.boundaries.values())
    cuts = sorted(whole & set(rows[0].last))
    return Grid(rows, layout.boundaries, cuts)


def _row(data: bytes, strip: Strip, layout: _Layout) -> GridRow:
    cells, first, last = [" "] * layout.width, [], []

    def put(column: int, shown: str) -> None:
        for character in shown:
            width = cell_len(character)
            if width == 0:  # it stands on what is before it
                cells[column - 1] += character
                continue
            cells[column : column + width] = [character, *[""] * (width - 1)]
            column += width

    for place, start, end in strip.tokens():
        if start == end:
            begin, close = _place_of_empty(strip, place, layout)
            put(begin, visible(strip.empty.get(place, "")))
            put(begin - 1, SEPARATOR)
        else:
            begin, close = layout.boundaries[start] + 1, layout.boundaries[end]
            if end < layout.total:
                close -= strip.slot(end)
            put(begin - 1, SEPARATOR)
            _put_text(data, start, end, layout, put)
        put(close, SEPARATOR)
        first.append(begin)
        last.append(close)
    return GridRow(cells, first, last)


def _place_of_empty(strip: Strip, place: int, layout: _Layout) -> tuple[int, int]:
    """(first column, closing column): before the boundary, but after it at the text's end."""
    end = strip.ends[place]
    names = strip.empty_at[end]
    at = [n for n, _ in names].index(place)
    before = sum(cell_len(name) + 1 for _, name in names[:at])
    own = cell_len(names[at][1])
    if end == layout.total and layout.total > 0:
        begin = layout.boundaries[end] + 1 + before
        is_last = at + 1 == len(names)
        return begin, layout.width - 1 if is_last else begin + own
    begin = layout.boundaries[end] - strip.slot(end) + 1 + before
    return begin, begin + own


def _put_text(
    data: bytes, start: int, end: int, layout: _Layout, put: Callable[[int, str], None]
) -> None:
    offset = start
    while offset < end:
        size, shown = layout.characters.get(offset, (0, ""))
        if size and offset + size <= end:
            put(layout.of_byte[offset], shown)
            offset += size
        else:
            put(layout.of_byte[offset], f"\\x{data[offset]:02x}")
            offset += 1
