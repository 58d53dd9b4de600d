"""Distributions as lists of tokens with bars, before and after a vocabulary map."""

import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fusellm.cli.inspect_grid import visible

if TYPE_CHECKING:
    from fusellm.fusion.view import At, Before, Outcome

_KEPT_ROWS, _OUTCOME_ROWS, _SHARE_ROWS = 10, 8, 6
_BAR_WIDTH = 6
_EIGHTHS = " ▏▎▍▌▋▊▉"
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_TRUE = "✓"


def source_letter(s: int) -> str:
    """A letter for a source, by its place in the recipe; numbers after z.

    >>> source_letter(0), source_letter(26)
    ('a', '27')
    """
    return string.ascii_lowercase[s] if s < 26 else str(s + 1)


def source_style(s: int) -> str:
    """A colour for a source, by its place in the recipe."""
    return _COLOURS[s % len(_COLOURS)]


def bar(probability: float, width: int = _BAR_WIDTH) -> str:
    """A probability as a bar; never empty where there is any.

    >>> bar(0.5, 4), bar(1.0, 4), bar(0.001, 4), bar(0.0, 4)
    ('██', '████', '▏', '')
    """
    eighths = round(probability * width * 8)
    eighths = max(eighths, 1) if probability > 0 else 0
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def number(probability: float) -> str:
    """A probability in three decimals.

    >>> number(0.0314), number(1.0), number(0.0001), number(0.0)
    ('.031', '1.00', '<.001', '.000')
    """
    if probability > 0.9995:
        return f"{probability:.2f}"
    if 0 < probability < 0.0005:
        return "<.001"
    return f"{probability:.3f}".removeprefix("0")


def outcome_label(tokens: Sequence[str], room: int, first: str | None = None) -> str:
    """A set of target tokens in so many columns: the token, or some and how many more.

    Args:
        tokens: the shortest first; it stands for the class and is always shown.
        first: the one to show next, where it is among them.

    >>> outcome_label([" re", " rep", " red"], 40), outcome_label(["x"], 9)
    ('{·re ·rep ·red}', 'x')
    >>> outcome_label([" re", " rep", " repl", " reply"], 17, " reply")
    '{·re ·reply … +2}'
    """
    ordered = list(tokens[:1])
    ordered += [first] if first in tokens[1:] and first is not None else []
    ordered += [token for token in tokens[1:] if token != first]
    if len(ordered) <= 1:
        return _fit(visible(ordered[0]) if ordered else "nothing", room)
    label = ""
    for count in range(1, len(ordered) + 1):
        inside = " ".join(visible(token) for token in ordered[:count])  # tokens' own are shown ·
        more = len(ordered) - count
        longer = "{" + inside + (f" … +{more:,}" if more else "") + "}"
        if label and cell_len(longer) > room:
            break
        label = longer
    return _fit(label, room)


def _fit(text: str, room: int) -> str:
    if cell_len(text) <= room:
        return text
    while text and cell_len(text) > max(room - 1, 0):
        text = text[:-1]
    return text + "…"


class _Label:
    """An outcome's tokens, as many as there is room for."""

    def __init__(self, tokens: Sequence[str], true: str | None, style: str = "") -> None:
        self._tokens, self._true, self._style = tokens, true, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(outcome_label(self._tokens, options.max_width, self._true), self._style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(6, options.max_width)


class _List:
    """Distributions row by row, under heads."""

    def __init__(self) -> None:
        self._parts: list[Text | Table] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        yield from self._parts

    def head(self, said: str, style: str) -> None:
        """Begin a distribution, with bars of this style."""
        self._style = style
        self._table = _table()
        gap = "\n" if self._parts else ""
        self._parts += [Text(gap + said, "bold italic"), self._table]

    def entry(self, mark: str, label: Text | _Label, probability: float, style: str = "") -> None:
        true = mark.startswith(_TRUE)
        self._table.add_row(
            Text(mark, "bold" if true else "dim"),
            label,
            Text(number(probability), "bold" if true else style),
            Text(bar(probability), style or self._style),
        )

    def aside(self, said: str, probability: float) -> None:
        """Mass that belongs to no single row."""
        self.entry("", Text(said, "dim italic"), probability, "dim")

    def absent(self, said: str) -> None:
        """Where the true next token would stand."""
        self._table.add_row(Text(_TRUE, "bold"), Text(said, "italic"), "", "")


def _table() -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(justify="right", width=3, no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", width=5, no_wrap=True)
    table.add_column(width=_BAR_WIDTH, no_wrap=True)
    return table


def kept_list(before: "Before", at: "At", sampled: bool, style: str) -> _List:
    """A source's distribution: what it kept, and what that becomes, told by numbers."""
    rows = _List()
    rank = {outcome.number: n for n, outcome in enumerate(before.becomes, start=1)}
    word = "healed" if before.healed else "kept"
    rows.head(f"{word}: {_count(len(before.kept), 'token')} of its own", style)
    for entry in before.kept[:_KEPT_ROWS]:
        true = entry.outcome is not None and entry.outcome == before.true_outcome
        place = "–" if entry.outcome is None else str(rank.get(entry.outcome, ""))
        rows.entry((_TRUE if true else "") + place, Text(visible(entry.spelled)), entry.probability)
    rest = before.kept[_KEPT_ROWS:]
    if rest:
        rows.aside(f"{len(rest):,} more", sum(entry.probability for entry in rest))
    if not sampled:
        rows.aside("not kept", before.tail)
    if [entry.spelled for entry in before.kept] == ["".join(o.spelled) for o in before.becomes]:
        rows.head("becomes: the same tokens", style)
    else:
        rows.head(f"becomes: {_count(len(before.becomes), 'outcome')}", style)
        _outcomes(rows, before.becomes, at.next_spelled, _OUTCOME_ROWS)
    if before.nowhere > 0.0005:
        rows.aside("– becomes nothing", before.nowhere)
    if not any(outcome.true for outcome in before.becomes):
        why = "not drawn" if sampled else "not kept"
        why = "no outcome" if before.true_outcome is None else why
        rows.absent(f"{visible(at.next_spelled)}: {why}")
    return rows


def fused_list(at: "At", names: Sequence[str]) -> _List:
    """The fused distribution, a source's part after another's."""
    rows = _List()
    shown = _KEPT_ROWS if len(at.fused) == 1 else _SHARE_ROWS
    for share in at.fused:
        who = f"{source_letter(share.source)} {names[share.source]}"
        rows.head(f"of {who}, weight {share.weight:.2f}", source_style(share.source))
        _outcomes(rows, share.outcomes, at.next_spelled, shown)
        if share.rest > 0.0005:
            rows.aside("in no outcome", share.rest)
    if not any(outcome.true for share in at.fused for outcome in share.outcomes):
        rows.absent(f"{visible(at.next_spelled)}: in none of these")
    return rows


def _outcomes(rows: _List, outcomes: Sequence["Outcome"], true: str, most: int) -> None:
    """The first of them, and the true next token's wherever it stands."""
    shown = [n for n, outcome in enumerate(outcomes) if n < most or outcome.true]
    for n in shown:
        outcome = outcomes[n]
        mark = (_TRUE if outcome.true else "") + str(n + 1)
        label: Text | _Label = _Label(outcome.spelled, true if outcome.true else None)
        if outcome.leftover:
            label = Text("tokens that have no class", "italic")
        rows.entry(mark, label, outcome.probability)
    rest = [outcome.probability for n, outcome in enumerate(outcomes) if n not in shown]
    if rest:
        rows.aside(f"{len(rest):,} more", sum(rest))


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
