"""What `fusellm inspect` shows: a block in a grid of boundaries, and one position closely.

Colour says nothing here that a letter, a sign or a frame does not say too.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fusellm.cli.inspect_grid import GOES_ON, SEPARATOR, Grid, GridRow, Strip, grid, visible
from fusellm.cli.inspect_lists import fused_list, kept_list, source_letter, source_style

if TYPE_CHECKING:
    from fusellm.config import Recipe
    from fusellm.fusion.view import BlockView, SourceView
    from fusellm.inspection import Inspection

SITUATIONS = {
    "same": ("=", "green", "both cut the next token alike"),
    "several": ("+", "cyan", "the source spells it in several tokens"),
    "beyond": (">", "yellow", "the source's next token ends after it"),
    "crossed": ("×", "magenta", "the source's tokens end before and after it, not at its end"),
    "unaligned": ("≠", "bright_black", "the source has not read the same text"),
}
_NOBODY = "–"
_CHOSEN = "▼"
_LEVELS = "▁▂▃▄▅▆▇█"
_LABEL_WIDTH = 14
_DIM = (SEPARATOR, GOES_ON, *visible(" \n\t"))
_PANEL_WIDTH = 35
_TAIL_BYTES = 40


def screen(run: str, recipe: "Recipe", found: "Inspection") -> Iterator[RenderableType]:
    """The answer for people."""
    view = found.view
    yield _head(run, recipe, found)
    yield _sources(view)
    yield from _left_out(view)
    yield _Bands(found.block.text, view)
    yield _legend(view)
    if view.at is None:
        yield Text("No position of this block predicts anything.", style="bold")
        return
    yield _read_so_far(found)
    yield _Panels(recipe, view)
    elsewhere = f"Look elsewhere: --position 0 to {view.positions - 1}"
    yield Text(f"{elsewhere}, --block 0 to {found.blocks - 1}", "dim")


def _head(run: str, recipe: "Recipe", found: "Inspection") -> Table:
    block, fusion, kept = found.block, recipe.fusion, recipe.externalize
    over = f"a window of {fusion.window_bytes} bytes to each side"
    over = over if fusion.granularity == "window" else "the whole block"
    scheme = f"{kept.draws} draws" if kept.scheme == "sampled" else f"top {kept.k}"
    paper = ", as the authors" if fusion.compatibility == "paper" else ""
    said = {
        "block": Text.assemble((str(block.number), "bold"), f" of {found.blocks:,}, from 0"),
        "run": Text(run),
        "document": Text(visible(block.document)),
        "domain": Text(f"{visible(block.domain)}, {len(block.text.encode()):,} bytes"),
        "strategy": Text(f"{fusion.strategy}{paper}{', healed' if fusion.heals else ''}"),
        "function": Text(f"{fusion.function}, sources compared over {over}"),
        "kept": Text(f"{scheme} at each position"),
    }
    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim", no_wrap=True)
    head.add_column(overflow="fold")
    head.add_row()
    for name, value in said.items():
        head.add_row(name, value)
    return head


def _sources(view: "BlockView") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True, max_width=_LABEL_WIDTH)
    for name in ("tokens", *SITUATIONS):
        sign, style, _ = SITUATIONS.get(name, ("", "", ""))
        table.add_column(f"{name}\n{sign}", justify="right", header_style=style, no_wrap=True)
    table.add_column("wins", justify="right", no_wrap=True)
    table.add_column("bits\na byte", justify="right", no_wrap=True)
    for s, source in enumerate(view.sources):
        named = [situation.name.lower() for situation in source.situations]
        counts = [str(named.count(name)) for name in SITUATIONS]
        row = [str(len(source.tokens.ids)), *counts]
        if not source.tokens.read:
            row = ["left out", *["–"] * len(SITUATIONS)]
        share = sum(source.weights)
        bits = "–" if source.bits_per_byte is None else f"{source.bits_per_byte:.3f}"
        table.add_row(_label(s, source), *row, f"{share:.4g}", bits)
    table.add_row(Text("target", "bold"), str(len(view.target.ids)), *[""] * 7)
    return table


def _label(s: int, source: "SourceView") -> Text:
    name = source.name
    room = _LABEL_WIDTH - 2
    name = name if cell_len(name) <= room else name[: room - 1] + "…"
    return Text(f"{source_letter(s)} {name}", source_style(s))


def _left_out(view: "BlockView") -> Iterator[Text]:
    readings = [("the target", view.target)]
    readings += [(f"{source_letter(s)} {x.name}", x.tokens) for s, x in enumerate(view.sources)]
    for name, tokens in readings:
        if not tokens.read:
            yield Text(
                f"{name} could not read this block: its tokenizer changes the text, so no boundary "
                "is known, and the block is left out for it.",
                style="bold yellow",
            )


class _Bands:
    """The grid of boundaries, in bands as wide as there is room."""

    def __init__(self, text: str, view: "BlockView") -> None:
        self._view = view
        labels: list[Text] = [Text("target" if view.target.read else "text", "bold")]
        whole = Strip([len(text.encode())])
        strips = [_strip(view.target.ends, view.target.spelled) if view.target.read else whole]
        for s, source in enumerate(view.sources):
            if source.tokens.read:
                labels.append(_label(s, source))
                strips.append(_strip(source.tokens.ends, source.tokens.spelled))
        self._grid = grid(text, strips)
        self._labels = labels
        self._indent = max(max(map(len, labels)), len("position")) + 2
        columns = self._grid.rows[0].first[1:]
        self._columns = dict(zip(range(view.positions), columns, strict=False))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        drawn = self._grid
        for first, after in drawn.lines(max(options.max_width - self._indent, 20)):
            inside = {n: c - first for n, c in self._columns.items() if first <= c < after}
            width = after - first
            if inside:
                yield self._line(Text("position", "dim"), self._ruler(inside, width))
            yield self._line(self._labels[0], _cells(drawn, drawn.rows[0], first, after, "bold"))
            if inside:
                for said, marks in self._marks(inside):
                    yield self._line(Text(said, "dim"), marks)
            for label, row in zip(self._labels[1:], drawn.rows[1:], strict=True):
                yield self._line(label, _cells(drawn, row, first, after, ""))
            yield Text()

    def _line(self, label: Text, body: Text) -> Text:
        line = label.copy()
        line.append(" " * (self._indent - cell_len(line.plain)))
        line = Text.assemble(line, body, no_wrap=True, overflow="crop")
        line.rstrip()
        return line

    def _ruler(self, inside: dict[int, int], width: int) -> Text:
        """Numbers of as many positions as find room, the chosen one before all others."""
        at = self._view.at
        chosen = at.position if at is not None else None
        numbers = {n: f"{_CHOSEN}{n}" if n == chosen else str(n) for n in inside}
        taken = [False] * (width + 1)
        shown = {}
        for n in sorted(inside, key=lambda n: (n != chosen, n)):
            first, after = inside[n], inside[n] + len(numbers[n])
            if n == chosen and after > width:  # at a line's end it points from the other side
                first, after = inside[n] + 1 - len(numbers[n]), inside[n] + 1
                numbers[n] = f"{n}{_CHOSEN}"
            if after <= width and not any(taken[max(first - 1, 0) : after + 1]):
                taken[first:after] = [True] * (after - first)
                shown[first] = (numbers[n], "bold reverse" if n == chosen else "dim")
        return _placed(shown)

    def _marks(self, inside: dict[int, int]) -> Iterator[tuple[str, Text]]:
        view = self._view
        wins, cuts = {}, {}
        for n, column in inside.items():
            winner = view.winner(n)
            if winner is None:
                wins[column] = (_NOBODY, "dim")
                continue
            wins[column] = (source_letter(winner), source_style(winner))
            situation = view.sources[winner].situations[n].name.lower()
            cuts[column] = SITUATIONS[situation][:2]
        yield "wins", _placed(wins)
        yield "cut", _placed(cuts)
        if not shares_are_split(view):
            return
        for s, source in enumerate(view.sources):
            levels = {
                column: (_LEVELS[min(int(source.weights[n] * 8), 7)], source_style(s))
                for n, column in inside.items()
                if source.weights[n] > 0
            }
            yield f"share {source_letter(s)}", _placed(levels)


def shares_are_split(view: "BlockView") -> bool:
    """Whether several sources have a share in one distribution."""
    shares = zip(*(source.weights for source in view.sources), strict=True)
    return any(sum(weight > 0 for weight in weights) > 1 for weights in shares)


def _strip(ends: Sequence[int], spelled: Sequence[str]) -> Strip:
    starts = [0, *ends[:-1]]
    empty = {n: spelled[n] for n, (a, b) in enumerate(zip(starts, ends, strict=True)) if a == b}
    return Strip(ends, empty)


def _placed(marks: dict[int, tuple[str, str]]) -> Text:
    text, column = Text(), 0
    for first in sorted(marks):
        shown, style = marks[first]
        text.append(" " * (first - column))
        text.append(shown, style)
        column = first + len(shown)
    return text


def _cells(drawn: Grid, row: GridRow, first: int, after: int, style: str) -> Text:
    columns = set(drawn.boundaries.values())
    edges = {first} if first > 0 else set()
    edges |= {after - 1} if after < drawn.width else set()
    # A gap at the edge of a line says that the token goes on in the next.
    shown = [
        GOES_ON if row.cells[column] == " " and column in edges & columns else row.cells[column]
        for column in range(first, after)
    ]
    text = Text()
    for is_dim, run in groupby(shown, key=lambda cell: cell in _DIM):
        text.append("".join(run), "dim" if is_dim else style)
    return text


def _legend(view: "BlockView") -> Table:
    legend = Table.grid(padding=(0, 2))
    who = Text()
    for s, source in enumerate(view.sources):
        who.append(f"{source_letter(s)} {source.name}", source_style(s))
        who.append("   ")
    who.append(f"{_NOBODY} no source: the target learns from the text alone")
    numbers = f"a number stands over the token that comes next; {_CHOSEN} is looked at below"
    legend.add_row(Text("position", "dim"), Text(numbers))
    legend.add_row(Text("wins", "dim"), who)
    if shares_are_split(view):
        legend.add_row(Text("share", "dim"), Text("the taller, the larger its weight"))
    for n, (name, (sign, style, meaning)) in enumerate(SITUATIONS.items()):
        row = Text.assemble((f"{sign} {name}", style), f"  {meaning}")
        legend.add_row(Text("cut" if n == 0 else "", "dim"), row)
    legend.add_row(
        Text("text", "dim"),
        Text(f"· space   ⏎ line end   → tab   \\x1b bytes and controls   {GOES_ON} goes on"),
    )
    return legend


def _read_so_far(found: "Inspection") -> Text:
    at = found.view.at
    assert at is not None
    data = found.block.text.encode()[: at.read_bytes]
    tail = data[-_TAIL_BYTES:].decode("utf-8", "ignore")
    before = "…" if len(data) > _TAIL_BYTES else ""
    read = Text.assemble(
        "\n",
        (f"Position {at.position}", "bold"),
        (f" of {found.view.positions:,}, from 0; {at.read_bytes:,} bytes read\n", "dim"),
        ("has read   ", "dim"),
        f"{before}{visible(tail)}" if tail else "nothing yet",
        ("\ncomes next ", "dim"),
        (f"{SEPARATOR}{visible(at.next_spelled)}{SEPARATOR}", "bold"),
        ("  marked ✓ below; equal numbers tie a token to what it becomes\n", "dim"),
    )
    read.overflow = "fold"
    return read


class _Panels:
    """Every source's distribution and the fused one, side by side as far as there is room."""

    def __init__(self, recipe: "Recipe", view: "BlockView") -> None:
        self._recipe, self._view = recipe, view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        panels = [self._panel(s) for s in range(len(self._view.sources))]
        panels.append(self._fused())
        most = max(options.max_width // _PANEL_WIDTH, 1)
        rows = -(-len(panels) // most)
        columns = -(-len(panels) // rows)
        grid_ = Table.grid(expand=True, padding=(0, 1, 0, 0))
        for _ in range(columns):
            grid_.add_column(ratio=1)
        for n in range(0, len(panels), columns):
            grid_.add_row(*panels[n : n + columns])
        yield grid_

    def _panel(self, s: int) -> Panel:
        view = self._view
        source, at = view.sources[s], view.at
        assert at is not None
        weight, before = source.weights[at.position], at.before[s]
        won = view.winner(at.position) == s
        title = Text(f" {source_letter(s)} {source.name} ", source_style(s))
        if weight > 0:
            title.append("wins " if weight > 0.9995 else f"weight {weight:.2f} ", "bold")
        sampled = self._recipe.externalize.scheme == "sampled"
        body: RenderableType
        if not source.tokens.read:
            body = Text("could not read this block", "yellow")
        elif before is None:
            why = "not aligned: no position of it has read exactly this text"
            if at.read_bytes in source.tokens.ends[:-1]:
                why = "not aligned, though it has read this text"
                if self._recipe.fusion.heals and at.read_bytes > 0:
                    why = "says only what the target would not cut off here"
            if weight > 0:
                why = "not aligned: by the authors' rule all mass is on the token just read"
            body = Text(why)
        else:
            body = Group(self._why(s), kept_list(before, at, sampled, source_style(s)))
        return Panel(
            body,
            title=title,
            title_align="left",
            box=box.HEAVY if won else box.ROUNDED,
            border_style=source_style(s) if won else "dim",
        )

    def _why(self, s: int) -> Text:
        view, settings = self._view, self._recipe.fusion
        source, at = view.sources[s], view.at
        assert at is not None
        before = at.before[s]
        assert before is not None
        situation = source.situations[at.position].name.lower()
        sign, style, _ = SITUATIONS[situation]
        per_token = settings.cross_entropy == "nats_per_token"
        unit = "nats a token" if per_token else "bits a byte"
        where = "around" if settings.granularity == "window" else "in the block"
        following = SEPARATOR.join(visible(token) for token in before.next_spelled)
        return Text.assemble(
            (f"{sign} {situation}", style),
            ": next it reads ",
            (f"{SEPARATOR}{following}{SEPARATOR}\n", "bold"),
            f"{source.cross_entropy[at.position]:.3f} {unit} {where}\n",
        )

    def _fused(self) -> Panel:
        at = self._view.at
        assert at is not None
        body: RenderableType
        if at.fused:
            body = fused_list(at, [source.name for source in self._view.sources])
        else:
            body = Text("no source is aligned: the target learns from the text alone here", "dim")
        title = Text(" fused: to be learned ", "bold")
        return Panel(body, title=title, title_align="left", box=box.DOUBLE)
