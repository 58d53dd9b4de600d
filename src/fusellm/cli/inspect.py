"""`fusellm inspect`: a block in a grid of boundaries, and one position closely.

Colour says nothing here that a letter, a sign or a frame does not say too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from fusellm.cli import draw
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.options import Json, RunFolder
from fusellm.errors import StoreError
from fusellm.explain import views
from fusellm.explain.grid import GOES_ON, SEPARATOR, Grid, GridRow, Strip, grid, visible
from fusellm.recipe_file import open_recipe
from fusellm.text_table import counted

if TYPE_CHECKING:
    from fusellm.config import Recipe

_NOBODY, _CHOSEN, _TRUE, _SPLIT = "–", "▼", "✓", "÷"
_LEVELS = "▁▂▃▄▅▆▇█"
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_DIM = (SEPARATOR, GOES_ON, *visible(" \n\t"))
_LABEL_WIDTH, _PANEL_WIDTH, _BAR_WIDTH = 14, 35, 6
_TAIL_BYTES = 40
_ASKED = 300  # characters of what stands before an answer
_KEPT_ROWS, _OUTCOME_ROWS, _SHARE_ROWS = 10, 8, 6


def inspect(
    run: RunFolder,
    block: Annotated[
        int, typer.Option("--block", metavar="N", help="Which of part train, from 0.")
    ],
    position: Annotated[
        int | None,
        typer.Option(
            "--position",
            metavar="P",
            help="Look closely at what comes after the target's token P, from 0; an instructive "
            "one if not given.",
        ),
    ] = None,
    answer: Annotated[
        int | None,
        typer.Option(
            "--answer",
            metavar="A",
            help="Of a conversation: which of the assistant's answers, from 0; the first if not "
            "given.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one block of a fused run: every model's tokens, and what became of a distribution.

    The target's tokens stand over each source's, so that equal boundaries are in one column. Marks
    say which source won at each of the target's positions and how it cuts what comes next. Below,
    one position closely: what each source says, what that becomes in the target's tokens, and the
    fused distribution.

    Example: `fusellm inspect runs/demo --block 40`, then with `--position 12` for the position
    that is numbered 12.
    """
    if not run.is_dir():
        raise StoreError(f"{run} is not a run: it is no folder; give the folder of a run")
    recipe = open_recipe(run)
    from fusellm.explain.block import inspect_block
    from fusellm.models.readers import readers_of
    from fusellm.store.run_folder import require_no_rounds

    require_no_rounds(run)
    view = inspect_block(recipe, run, readers_of(recipe), block, position, Terminal(STDERR), answer)
    if as_json:
        print(json_text({"run": str(run)} | asdict(view)))
        return
    STDOUT.show("", _head(str(run), recipe, view), _sources(view), *_left_out(view))
    if view.asked:
        asked = view.asked if len(view.asked) <= _ASKED else "…" + view.asked[-_ASKED:]
        STDOUT.show(Text(visible(asked), "dim"), "")
    STDOUT.show(*_bands(view, STDOUT.width), _legend(view))
    if view.at is None:
        STDOUT.print(Text("No position of this block predicts anything.", style="bold"))
        return
    STDOUT.show(_read_so_far(view, view.at), _panels(view, view.at, STDOUT.width))
    elsewhere = f"Look elsewhere: --position 0 to {view.positions - 1}"
    if view.answers > 1:
        elsewhere += f", --answer 0 to {view.answers - 1}"
    STDOUT.print(Text(f"{elsewhere}, --block 0 to {view.blocks - 1}", "dim"))


def _head(run: str, recipe: "Recipe", view: "views.BlockView") -> Table:
    said: dict[str, str | Text] = {
        "block": Text.assemble((str(view.block), "bold"), f" of {view.blocks:,}, from 0"),
        "run": run,
        "document": visible(view.document),
        "domain": f"{visible(view.domain)}, {view.bytes:,} bytes",
    }
    if view.answer is not None:
        said["answer"] = Text.assemble((str(view.answer), "bold"), f" of {view.answers:,}, from 0")
    return draw.facts((said | views.settings_in_words(recipe)).items())


def _sources(view: "views.BlockView") -> Table:
    looks = [
        draw.right(f"{name}\n{s.sign}", header_style=s.style) for name, s in draw.SITUATIONS.items()
    ]
    measures = (draw.right("wins"), draw.right("bits\na byte"))
    shown = draw.table("source", draw.right("tokens\n"), *looks, *measures, padding=(0, 1, 0, 0))
    for s, source in enumerate(view.sources):
        row = [str(source.situations.count(name)) for name in draw.SITUATIONS]
        row = [str(len(source.tokens.ids)), *row]
        if not source.tokens.read:
            row = ["left out", *["–"] * len(draw.SITUATIONS)]
        bits = "–" if source.bits_per_byte is None else f"{source.bits_per_byte:.3f}"
        shown.add_row(_label(s, source.name), *row, f"{sum(source.weights):.4g}", bits)
    shown.add_row(Text("target", "bold"), str(len(view.target.ids)))
    return shown


def _name(s: int, name: str) -> str:
    """A source with a letter, by its place in the recipe; numbers after z."""
    return f"{views.letter_of(s)} {name}"


def _style(s: int) -> str:
    return _COLOURS[s % len(_COLOURS)]


def _label(s: int, name: str) -> Text:
    return Text(_fit(_name(s, name), _LABEL_WIDTH), _style(s))


def _fit(text: str, room: int) -> str:
    shown = Text(text)
    shown.truncate(room, overflow="ellipsis")
    return shown.plain


def _left_out(view: "views.BlockView") -> Iterator[Text]:
    readings = {"the target": view.target}
    readings |= {_name(s, source.name): source.tokens for s, source in enumerate(view.sources)}
    for name, tokens in readings.items():
        if not tokens.read:
            yield Text(
                f"{name} could not read this: its tokenizer changes the text, or its context ends "
                "before, so no boundary is known, and it is left out for it.",
                style="bold yellow",
            )


def _bands(view: "views.BlockView", width: int) -> Iterator[Text]:
    """The grid of boundaries, in bands as wide as there is room."""
    rows = [(Text("target", "bold"), view.target.strip)]
    if not view.target.read:
        rows = [(Text("text", "bold"), Strip([view.bytes]))]
    for s, source in enumerate(view.sources):
        if source.tokens.read:
            rows.append((_label(s, source.name), source.tokens.strip))
    drawn = grid(view.text, [strip for _, strip in rows])
    labels = [label for label, _ in rows]
    indent = max(*(len(label) for label in labels), len("position")) + 2

    def line(label: Text, body: Text) -> Text:
        gap = " " * (indent - cell_len(label.plain))
        joined = Text.assemble(label, gap, body, no_wrap=True, overflow="crop")
        joined.rstrip()
        return joined

    columns = list(enumerate(drawn.rows[0].first[1 : view.positions + 1]))
    for first, after in drawn.lines(max(width - indent, 20)):
        inside = {n: column - first for n, column in columns if first <= column < after}
        if inside:
            yield line(Text("position", "dim"), _ruler(view, inside, after - first))
        yield line(labels[0], _cells(drawn, drawn.rows[0], first, after, "bold"))
        if inside:
            for said, marks in _marks(view, inside):
                yield line(Text(said, "dim"), marks)
        for label, row in zip(labels[1:], drawn.rows[1:], strict=True):
            yield line(label, _cells(drawn, row, first, after, ""))
        yield Text()


def _ruler(view: "views.BlockView", inside: dict[int, int], width: int) -> Text:
    """Numbers of as many positions as find room, the chosen one before all others."""
    chosen = None if view.at is None else view.at.position
    taken, shown = [False] * (width + 1), {}
    for n in sorted(inside, key=lambda n: (n != chosen, n)):
        said = f"{_CHOSEN}{n}" if n == chosen else str(n)
        first, after = inside[n], inside[n] + len(said)
        if n == chosen and after > width:  # at a line's end it points from the other side
            first, after, said = inside[n] + 1 - len(said), inside[n] + 1, f"{n}{_CHOSEN}"
        if after <= width and not any(taken[max(first - 1, 0) : after + 1]):
            taken[first:after] = [True] * (after - first)
            shown[first] = (said, "bold reverse" if n == chosen else "dim")
    return _placed(shown)


def _marks(view: "views.BlockView", inside: dict[int, int]) -> Iterator[tuple[str, Text]]:
    """Who wins, how that source cuts the text, and the shares where there are several."""
    names = [source.name for source in view.sources]
    wins, cuts = {}, {}
    for n, column in inside.items():
        winner, wins[column] = view.winners[n], (_NOBODY, "dim")
        if winner is not None:
            s = names.index(winner)
            wins[column] = (views.letter_of(s), _style(s))
            cuts[column] = draw.SITUATIONS[view.sources[s].situations[n]][:2]
    yield "wins", _placed(wins)
    yield "cut", _placed(cuts)
    if view.is_split:
        for s, source in enumerate(view.sources):
            levels = {
                column: (_LEVELS[min(int(source.weights[n] * 8), 7)], _style(s))
                for n, column in inside.items()
                if source.weights[n] > 0
            }
            yield f"share {views.letter_of(s)}", _placed(levels)


def _placed(marks: dict[int, tuple[str, str]]) -> Text:
    text = Text()
    for first in sorted(marks):
        text.append(" " * (first - len(text)))
        text.append(*marks[first])
    return text


def _cells(drawn: Grid, row: GridRow, first: int, after: int, style: str) -> Text:
    edges = {first if first > 0 else -1, after - 1 if after < drawn.width else -1}
    edges &= set(drawn.boundaries.values())
    # A gap at the edge of a line says that the token goes on in the next.
    shown = [
        GOES_ON if row.cells[column] == " " and column in edges else row.cells[column]
        for column in range(first, after)
    ]
    text = Text()
    for is_dim, run in groupby(shown, key=lambda cell: cell in _DIM):
        text.append("".join(run), "dim" if is_dim else style)
    return text


def _legend(view: "views.BlockView") -> Table:
    from fusellm.alignment.positions import MEANINGS

    who = [(f"{_name(s, source.name)}   ", _style(s)) for s, source in enumerate(view.sources)]
    nobody = f"{_NOBODY} no source: the target learns from the text alone"
    numbers = f"a number stands over the token that comes next; {_CHOSEN} is looked at below"
    signs = f"· space   ⏎ line end   → tab   \\x1b bytes and controls   {GOES_ON} goes on"
    cuts = [
        ("", Text.assemble((f"{look.sign} {name}", look.style), f"  {MEANINGS[name]}"))
        for name, look in draw.SITUATIONS.items()
    ]
    share = [("share", Text("the taller, the larger its weight"))] if view.is_split else []
    rows = [("position", Text(numbers)), ("wins", Text.assemble(*who, nobody)), *share]
    return draw.facts([*rows, ("cut", cuts[0][1]), *cuts[1:], ("text", Text(signs))])


def _read_so_far(view: "views.BlockView", at: "views.PositionView") -> Text:
    data = view.text.encode()[: at.read_bytes]
    tail = data[-_TAIL_BYTES:].decode("utf-8", "ignore")
    before = "…" if len(data) > _TAIL_BYTES else ""
    return Text.assemble(
        ("\nPosition " + str(at.position), "bold"),
        (f" of {view.positions:,}, from 0; {at.read_bytes:,} bytes read\n", "dim"),
        ("has read   ", "dim"),
        f"{before}{visible(tail)}" if tail else "nothing yet",
        ("\ncomes next ", "dim"),
        (f"{SEPARATOR}{visible(at.next_spelled)}{SEPARATOR}", "bold"),
        ("  marked ✓ below; equal numbers tie a token to what it becomes\n", "dim"),
        overflow="fold",
    )


def _panels(view: "views.BlockView", at: "views.PositionView", width: int) -> Table:
    """Every source's distribution and the fused one, side by side as far as there is room."""
    panels = [*(_panel(view, at, s) for s in range(len(view.sources))), _fused(view, at)]
    rows = -(-len(panels) // max(width // _PANEL_WIDTH, 1))
    columns = -(-len(panels) // rows)
    sides = (Column(ratio=1) for _ in range(columns))
    side_by_side = Table.grid(*sides, expand=True, padding=(0, 1, 0, 0))
    for n in range(0, len(panels), columns):
        side_by_side.add_row(*panels[n : n + columns])
    return side_by_side


def _panel(view: "views.BlockView", at: "views.PositionView", s: int) -> Panel:
    source = view.sources[s]
    weight, won = source.weights[at.position], view.winners[at.position] == source.name
    title = Text(f" {_name(s, source.name)} ", _style(s))
    if source.referee:
        title.append("referee ", "italic")
    if weight > 0:
        title.append("wins " if weight > 0.9995 else f"weight {weight:.2f} ", "bold")
    frame, style = (box.HEAVY, _style(s)) if won else (box.ROUNDED, "dim")
    return Panel(_said(view, at, s), title=title, title_align="left", box=frame, border_style=style)


def _said(view: "views.BlockView", at: "views.PositionView", s: int) -> RenderableType:
    """What a source says at the chosen position, or why it says nothing."""
    before = at.before[s]
    if before is not None:
        return Group(_why(view, at, before, s), *_kept_list(view, at, before, s).parts)
    return Text(view.silence(at, s), "" if view.sources[s].tokens.read else "yellow")


def _why(view: "views.BlockView", at: "views.PositionView", before: "views.Before", s: int) -> Text:
    situation = view.sources[s].situations[at.position]
    unit = "nats a token" if view.recipe["cross_entropy"] == "nats_per_token" else "bits a byte"
    where = "around" if view.recipe["granularity"] == "window" else "in the block"
    following = SEPARATOR.join(visible(token) for token in before.next_spelled)
    return Text.assemble(
        (f"{draw.SITUATIONS[situation].sign} {situation}", draw.SITUATIONS[situation].style),
        ": next it reads ",
        (f"{SEPARATOR}{following}{SEPARATOR}\n", "bold"),
        f"{view.sources[s].cross_entropy[at.position]:.3f} {unit} {where}\n",
    )


class _List:
    """Distributions row by row, under heads: lists of tokens with bars."""

    def __init__(self, next_spelled: str) -> None:
        self.parts: list[Text | Table] = []
        self._next = next_spelled

    def head(self, said: str, style: str) -> None:
        """Begin a distribution, with bars of this style."""
        self._style = style
        self._table = Table.grid(
            draw.right(width=3),
            Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            draw.right(width=5),
            Column(width=_BAR_WIDTH, no_wrap=True),
            padding=(0, 1, 0, 0),
            expand=True,
        )
        self.parts += [Text(("\n" if self.parts else "") + said, "bold italic"), self._table]

    def entry(self, mark: str, label: RenderableType, share: float, style: str = "") -> None:
        true = mark.startswith(_TRUE)
        self._table.add_row(
            Text(mark, "bold" if true else "dim"),
            label,
            Text(draw.number(share), "bold" if true else style),
            Text(draw.share_bar(share, _BAR_WIDTH), style or self._style),
        )

    def aside(self, said: str, share: float) -> None:
        """Mass that belongs to no single row."""
        self.entry("", Text(said, "dim italic"), share, "dim")

    def more(self, left: Sequence["views.OutcomeView | views.Entry"]) -> None:
        """The rows for which there is no room."""
        if left:
            self.aside(f"{len(left):,} more", sum(one.probability for one in left))

    def absent(self, why: str) -> None:
        """Where the true next token would stand."""
        said = Text(f"{visible(self._next)}: {why}", "italic")
        self._table.add_row(Text(_TRUE, "bold"), said, "", "")

    def outcomes(self, outcomes: Sequence["views.OutcomeView"], most: int) -> None:
        """The first of them, and the true next token's wherever it stands."""
        for n, outcome in enumerate(outcomes, start=1):
            if n <= most or outcome.true:
                mark = (_TRUE if outcome.true else "") + str(n)
                self.entry(mark, _outcome(outcome, self._next), outcome.probability)
        self.more([outcome for outcome in outcomes[most:] if not outcome.true])


def _outcome(outcome: "views.OutcomeView", next_spelled: str) -> Text | draw.Fitted:
    if outcome.leftover:
        return Text("tokens that have no class", "italic")
    true = next_spelled if outcome.true else None
    return draw.Fitted(lambda room: Text(outcome_label(outcome.spelled, room, true)), 6)


def _kept_list(
    view: "views.BlockView", at: "views.PositionView", before: "views.Before", s: int
) -> _List:
    """A source's distribution: what it kept, and what that becomes, told by numbers."""
    rows, sampled = _List(at.next_spelled), view.recipe["scheme"] == "sampled"
    rank = {outcome.number: n for n, outcome in enumerate(before.becomes, start=1)}
    word = "healed" if before.healed else "kept"
    rows.head(f"{word}: {counted(f'{len(before.kept):,}', 'tokens')} of its own", _style(s))
    for entry in before.kept[:_KEPT_ROWS]:
        true = entry.outcome is not None and entry.outcome == before.true_outcome
        place = "–" if entry.outcome is None else str(rank.get(entry.outcome, _SPLIT))
        rows.entry((_TRUE if true else "") + place, Text(visible(entry.spelled)), entry.probability)
    rows.more(before.kept[_KEPT_ROWS:])
    if not sampled:
        rows.aside("not kept", before.tail)
    if [entry.spelled for entry in before.kept] == ["".join(o.spelled) for o in before.becomes]:
        rows.head("becomes: the same tokens", _style(s))
    else:
        rows.head(f"becomes: {counted(f'{len(before.becomes):,}', 'outcomes')}", _style(s))
        rows.outcomes(before.becomes, _OUTCOME_ROWS)
    if before.nowhere > 0.0005:
        rows.aside("– becomes nothing", before.nowhere)
    split = [entry.probability for entry in before.kept if entry.outcome not in {None, *rank}]
    if split:
        rows.aside(f"{_SPLIT} split along the text", sum(split))
    if not any(outcome.true for outcome in before.becomes):
        why = "not drawn" if sampled else "not kept"
        rows.absent("no outcome" if before.true_outcome is None else why)
    return rows


def _fused(view: "views.BlockView", at: "views.PositionView") -> Panel:
    """The fused distribution, a source's part after another's."""
    names = [source.name for source in view.sources]
    rows = _List(at.next_spelled)
    for share in at.fused:
        s = names.index(share.source)
        rows.head(f"of {_name(s, share.source)}, weight {share.weight:.2f}", _style(s))
        rows.outcomes(share.outcomes, _KEPT_ROWS if len(at.fused) == 1 else _SHARE_ROWS)
        if share.rest > 0.0005:
            rows.aside("in no outcome", share.rest)
    if at.fused and not any(outcome.true for share in at.fused for outcome in share.outcomes):
        rows.absent("in none of these")
    nobody = Text("no source is aligned: the target learns from the text alone here", "dim")
    body = Group(*rows.parts) if at.fused else nobody
    title = Text(" fused: to be learned ", "bold")
    return Panel(body, title=title, title_align="left", box=box.DOUBLE)


def outcome_label(tokens: Sequence[str], room: int, true: str | None = None) -> str:
    """A set of target tokens in so many columns: the token, or some and how many more.

    Args:
        tokens: the shortest first; it stands for the class and is always shown.
        true: the one to show next, where it is among them.

    >>> outcome_label([" re", " rep", " red"], 40), outcome_label(["x"], 9)
    ('{·re ·rep ·red}', 'x')
    >>> outcome_label([" re", " rep", " repl", " reply"], 17, " reply")
    '{·re ·reply … +2}'
    """
    ordered = [*tokens[:1], *sorted(tokens[1:], key=lambda token: token != true)]
    words = [visible(token) for token in ordered]  # their own spaces are shown as ·
    if len(words) <= 1:
        return _fit("".join(words) or "nothing", room)

    def first(count: int) -> str:
        more = f" … +{len(words) - count:,}" if count < len(words) else ""
        return "{" + " ".join(words[:count]) + more + "}"

    return _fit(draw.longest(first, len(words), room), room)
