"""What `fusellm tokenizers A B` shows: tables that fit 80 columns, and one sentence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fusellm.alignment.comparison import Comparison, Domain, Side

# Style and what a bar is drawn with, so that it reads without colours as well.
_STYLES = {
    "same": ("green", "█"),
    "several": ("cyan", "▓"),
    "beyond": ("yellow", "▒"),
    "crossed": ("magenta", "░"),
    "unaligned": ("bright_black", "·"),
}
_LEGEND = {
    "same": "both cut the target's next token alike",
    "several": "the source spells it in several tokens",
    "beyond": "the source's next token ends after it",
    "crossed": "the source's next tokens end before and after it",
    "unaligned": "the source has not read exactly what the target has",
}


def screen(source: str, target: str, found: "Comparison") -> Iterator[Table | Text]:
    """The answer for people, in tables that fit 80 columns."""
    yield Text()
    yield _sides(source, target, found)
    yield _situations(found.domains)
    yield _legend()
    yield Text()
    yield _class_counts(found)
    yield _class_shares(found)
    if found.classes.largest:
        yield _largest(found)
    for domain in found.domains:
        if sum(domain.left_out):
            yield _left_out(domain)
    yield Text(verdict(source, target, found), style="bold")


def _table(title: str | None = None, **settings: Any) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold italic",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        **settings,
    )


def _sides(source: str, target: str, found: "Comparison") -> Table:
    table = _table("Two tokenizers")
    table.add_column("")
    table.add_column(f"A, source\n{source}", justify="right", overflow="fold")
    table.add_column(f"B, target\n{target}", justify="right", overflow="fold")
    both = (found.source, found.target)
    table.add_row("tokens", *(f"{side.tokens:,}" for side in both))
    table.add_row("  the other has too", *(_share_of(side) for side in both))
    table.add_row("kind", *(side.kind for side in both))
    table.add_row("byte fallback", *(_fallback(side) for side in both))
    table.add_row("dummy prefix", *(side.dummy_prefix for side in both))
    table.add_row("put before each block", *(Text(" ".join(s.prefix) or "none") for s in both))
    table.add_row("EOS after a document", *(Text(side.eos or "none") for side in both))
    becomes = "EOS of B" if found.eos_becomes_eos else "nothing"
    table.add_row("  becomes", becomes if found.source.eos else "", "")
    table.add_row("special tokens", *(_special(side.special) for side in both))
    for domain in found.domains:
        per_token = (
            f"{domain.bytes_read / tokens:.2f}" if tokens else "–"
            for tokens in (domain.source_tokens, domain.target_tokens)
        )
        table.add_row(f"bytes a token, {domain.name}", *per_token)
    return table


def _share_of(side: "Side") -> str:
    return f"{side.shared_tokens:,} ({_percent(side.shared_tokens, side.text_tokens)})"


def _fallback(side: "Side") -> str:
    return f"{side.fallback_tokens} tokens" if side.fallback_tokens else "none"


def _special(tokens: Sequence[str]) -> Text:
    shown = " ".join(tokens[:3])
    more = f" and {len(tokens) - 3:,} more" if len(tokens) > 3 else ""
    return Text((shown + more) or "none")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _situations(domains: Sequence["Domain"]) -> Table:
    table = _table("The target's positions, by how the source cuts what follows", expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("", ratio=1, min_width=8)
    for case, (style, _) in _STYLES.items():
        table.add_column(case, justify="right", header_style=style, no_wrap=True)
    for domain in domains:
        counts = {case: domain.situations[case] for case in _STYLES}
        cells = [_percent(count, domain.positions) for count in counts.values()]
        table.add_row(domain.name, _Bar(counts), *cells)
    return table


class _Bar:
    """Shares as one line of colours, as wide as there is room."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        total, width, text = sum(self._counts.values()), options.max_width, Text()
        done = drawn = 0
        for case, count in self._counts.items():
            done += count
            until = round(width * done / total) if total else 0
            style, glyph = _STYLES[case]
            text.append(glyph * (until - drawn), style)
            drawn = until
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, options.max_width)


def _legend() -> Table:
    grid = Table.grid(padding=(0, 2))
    for case, meaning in _LEGEND.items():
        style, glyph = _STYLES[case]
        grid.add_row(Text(f"{glyph} {case}", style), Text(meaning, "dim"))
    return grid


def _class_counts(found: "Comparison") -> Text:
    classes = found.classes
    return Text.assemble(
        (f"{classes.classes:,} classes that both can tell apart", "bold italic"),
        f"\n{classes.single:,} of them are single tokens of B; {classes.target_tokens:,} tokens "
        f"of B are in a class, {classes.unclassed_tokens:,} in none",
    )


def _class_shares(found: "Comparison") -> Table:
    table = _table()
    table.add_column("positions whose next token is in a class")
    for domain in found.domains:
        table.add_column(domain.name, justify="right")
    for label, count in (
        ("of its own", [domain.in_single_classes for domain in found.domains]),
        ("of at most 3 tokens", [domain.in_small_classes for domain in found.domains]),
    ):
        shares = (_percent(n, d.positions) for n, d in zip(count, found.domains, strict=True))
        table.add_row(label, *shares)
    return table


def _largest(found: "Comparison") -> Table:
    table = _table("The largest classes: where A leaves B to the text", expand=True)
    table.add_column("all begin with", no_wrap=True)
    table.add_column("tokens of A", justify="right")
    table.add_column("tokens of B", justify="right")
    table.add_column("among them", ratio=1)
    for large in found.classes.largest:
        table.add_row(
            Text(large.root),
            f"{large.source_tokens:,}",
            f"{large.target_tokens:,}",
            _Words(large.members),
        )
    return table


class _Words:
    """As many words as fit one line."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        shown, room = [], options.max_width - 2
        for word in self._words:
            room -= cell_len(word) + 2
            if room < 0:
                shown.append("…")
                break
            shown.append(word)
        yield Text("  ".join(shown), "dim")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)


def _left_out(domain: "Domain") -> Text:
    counts = [
        f"{count:,} by {letter}"
        for letter, count in zip("AB", domain.left_out, strict=True)
        if count
    ]
    return Text(
        f"{domain.name}: blocks left out because a tokenizer changes them: {', '.join(counts)}; "
        f"the first begins {domain.left_out_example!r}",
        style="yellow",
    )


def verdict(source: str, target: str, found: "Comparison") -> str:
    """What the comparison means, in one sentence."""
    read = [domain for domain in found.domains if domain.positions]
    if not read:
        return f"One of the two changes every block of this text: {target} cannot use {source}."
    if found.same:
        return (
            f"{source} and {target} cut every text alike: every position of {target} can be used, "
            "token by token."
        )
    shares = sorted(domain.aligned / domain.positions for domain in read)
    low, high = (f"{100 * share:.0f}" for share in (shares[0], shares[-1]))
    span = f"{low} %" if low == high else f"{low} to {high} %"
    left_out = any(sum(domain.left_out) for domain in found.domains)
    return (
        f"At {span} of {target}'s positions {source} has read the same text, so what it knows can "
        "be used there; at the others the target learns from the text alone"
        + (", as in the blocks left out." if left_out else ".")
    )
