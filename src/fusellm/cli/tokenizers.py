"""`fusellm tokenizers A B`: how far two tokenizers agree, before any model is loaded.

Tables that fit 80 columns, and one sentence.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fusellm.cli import draw
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.options import Json, TrustRemoteCode

if TYPE_CHECKING:
    from fusellm.explain.tokenizers import Domain, TokenizerComparison

_NO_FILES: list[Path] = []


def tokenizers(
    source: Annotated[str, typer.Argument(metavar="A", help="The source's.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="B", help="The target's.", show_default=False)],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to compare on, a domain a file; may be repeated. If not given: prose, "
            "Python and C++ of the installed packages.",
        ),
    ] = _NO_FILES,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Compare two tokenizers: what a target could learn from a source, before any model is loaded.

    A is the source's tokenizer, B the target's: each a folder, a GGUF file, a hub name or zoo/NAME.
    Shown are the tokens that both have, bytes per token, at how many of the target's positions the
    source has read the same text and how it cuts what follows, and the classes of tokens that the
    two can tell apart.
    """
    from fusellm.explain.tokenizers import builtin_texts, compare_tokenizers, texts_of
    from fusellm.models.readers import load_encoder

    terminal = Terminal(STDERR)
    pair = [load_encoder(name, trust_remote_code, terminal) for name in (source, target)]
    texts = texts_of(text) if text else builtin_texts(terminal)
    comparison = compare_tokenizers(pair[0], pair[1], texts, progress=terminal)
    if as_json:
        print(json_text(comparison.as_dict(source, target)))
        return
    _show(*_short_names(source, target), comparison)


def _short_names(source: str, target: str) -> tuple[str, str]:
    """Folders by their last part, where that tells them apart."""
    short = [Path(name).name if Path(name).is_dir() else name for name in (source, target)]
    return (short[0], short[1]) if short[0] != short[1] else (source, target)


def _show(source: str, target: str, comparison: "TokenizerComparison") -> None:
    STDOUT.show(
        "", _sides(source, target, comparison), _situations(comparison.domains), _legend(), ""
    )
    STDOUT.show(_class_counts(comparison), _class_shares(comparison))
    if comparison.classes.largest:
        STDOUT.print(_largest(comparison))
    STDOUT.show(*(_left_out(domain) for domain in comparison.domains if sum(domain.left_out)))
    STDOUT.print(Text(comparison.verdict(source, target), style="bold"))


def _sides(source: str, target: str, comparison: "TokenizerComparison") -> Table:
    a, b = f"A, source\n{source}", f"B, target\n{target}"
    sides = [Column(head, justify="right", overflow="fold") for head in (a, b)]
    shown, both = (
        draw.table("", *sides, title="Two tokenizers"),
        (comparison.source, comparison.target),
    )
    shared = (f"{s.shared_tokens:,} ({_percent(s.shared_tokens, s.text_tokens)})" for s in both)
    fallback = (f"{s.fallback_tokens} tokens" if s.fallback_tokens else "none" for s in both)
    becomes = "EOS of B" if comparison.eos_becomes_eos else "nothing"
    rows: dict[str, Iterable[str]] = {
        "tokens": (f"{side.tokens:,}" for side in both),
        "  the other has too": shared,
        "kind": (side.kind for side in both),
        "byte fallback": fallback,
        "dummy prefix": (side.dummy_prefix for side in both),
        "put before each block": (" ".join(side.prefix) or "none" for side in both),
        "EOS after a document": (side.eos or "none" for side in both),
        "  becomes": (becomes if comparison.source.eos else "", ""),
        "special tokens": (_special(side.special) for side in both),
    }
    for domain in comparison.domains:
        per_token = (f"{size:.2f}" if size else "–" for size in domain.bytes_per_token)
        rows[f"bytes a token, {domain.name}"] = per_token
    for name, cells in rows.items():
        shown.add_row(name, *(Text(cell) for cell in cells))
    return shown


def _special(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - 3:,} more" if len(tokens) > 3 else ""
    return (" ".join(tokens[:3]) + more) or "none"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _situations(domains: Sequence["Domain"]) -> Table:
    cases = [draw.right(case, header_style=look.style) for case, look in draw.SITUATIONS.items()]
    columns = (Column(no_wrap=True), Column(ratio=1, min_width=8), *cases)
    title = "The target's positions, by how the source cuts what follows"
    shown = draw.table(*columns, title=title, expand=True)
    for domain in domains:
        cells = [_percent(domain.situations[case], domain.positions) for case in draw.SITUATIONS]
        shown.add_row(domain.name, _bar(domain), *cells)
    return shown


def _bar(domain: "Domain") -> draw.Fitted:
    """Shares as one line of colours, as wide as there is room."""

    def fill(width: int) -> Text:
        text, done = Text(), 0
        for case, look in draw.SITUATIONS.items():
            done += domain.situations[case]
            until = round(width * done / domain.positions) if domain.positions else 0
            text.append(look.filling * (until - len(text)), look.style)
        return text

    return draw.Fitted(fill, 8)


def _legend() -> Table:
    from fusellm.alignment.positions import MEANINGS

    shown = Table.grid(padding=(0, 2))
    for case, look in draw.SITUATIONS.items():
        shown.add_row(Text(f"{look.filling} {case}", look.style), Text(MEANINGS[case], "dim"))
    return shown


def _class_counts(comparison: "TokenizerComparison") -> Text:
    classes = comparison.classes
    return Text.assemble(
        (f"{classes.classes:,} classes that both can tell apart", "bold italic"),
        f"\n{classes.single:,} of them are single tokens of B; {classes.target_tokens:,} tokens "
        f"of B are in a class, {classes.unclassed_tokens:,} in none",
    )


def _class_shares(comparison: "TokenizerComparison") -> Table:
    names = (f">{domain.name}" for domain in comparison.domains)
    shown = draw.table("positions whose next token is in a class", *names)
    of_own = (_percent(d.in_single_classes, d.positions) for d in comparison.domains)
    shown.add_row("of its own", *of_own)
    small = (_percent(d.in_small_classes, d.positions) for d in comparison.domains)
    shown.add_row("of at most 3 tokens", *small)
    return shown


def _largest(comparison: "TokenizerComparison") -> Table:
    columns = (Column("all begin with", no_wrap=True), ">tokens of A", ">tokens of B")
    title = "The largest classes: where A leaves B to the text"
    shown = draw.table(
        *columns, Column("among them", ratio=1, no_wrap=True), title=title, expand=True
    )
    for large in comparison.classes.largest:
        counts = (f"{large.source_tokens:,}", f"{large.target_tokens:,}")
        shown.add_row(Text(large.root), *counts, _as_many_as_fit(large.members))
    return shown


def _as_many_as_fit(words: Sequence[str]) -> draw.Fitted:
    def first(count: int) -> Text:
        return Text("  ".join([*words[:count], *["…"] * (count < len(words))]), "dim")

    return draw.Fitted(lambda room: draw.longest(first, len(words), room), 10)


def _left_out(domain: "Domain") -> Text:
    counts = [f"{n:,} by {side}" for side, n in zip("AB", domain.left_out, strict=True) if n]
    return Text(
        f"{domain.name}: blocks left out because a tokenizer changes them: {', '.join(counts)}; "
        f"the first begins {domain.left_out_example!r}",
        style="yellow",
    )
