"""What `fusellm store` shows. Nothing that a store holds reaches the terminal unescaped."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fusellm.cli.console import counted
from fusellm.cli.inspect_grid import visible
from fusellm.cli.inspect_lists import bar, number

if TYPE_CHECKING:
    from fusellm.store.facts import StoreFacts
    from fusellm.store.opened import Distribution, DistributionStore, StoredBlock
    from fusellm.store.verify import Verified
    from fusellm.tokens.encode import Encoder

_GROUPS = {
    "tokens": ("block", "read", "ids", "bytes"),
    "kept ids": ("kept", "kept_ids"),
    "probabilities": ("drops", "counts", "tail"),
    "true next token": ("true_log_prob",),
}
_MOST_ASIDE, _MOST_FAULTS = 8, 30
_READ_CELLS = 60
_TRUE = "✓"


def plain(text: str) -> str:
    """A text with its spaces, and no character that moves the cursor.

    >>> plain("a b\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    return " ".join(visible(part) for part in text.split(" "))


# info


def info_screen(
    store: "DistributionStore", per_token: Mapping[str, float], fault: str | None
) -> Iterator[Table | Text]:
    """A store's facts; `fault` is what hinders reading it."""
    facts = store.facts
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(store):
        grid.add_row(name, Text(plain(value)))
    yield Text(plain(str(store.path)), "bold")
    yield grid
    if fault is not None:
        yield Text(plain(fault), "bold yellow")
    if per_token:
        yield _sizes(per_token)
    if facts.aside:
        yield from _aside(facts)


def _facts(store: "DistributionStore") -> Iterator[tuple[str, str]]:
    facts = store.facts
    revision = f" at {facts.revision}" if facts.revision else ""
    yield "source", facts.identity.stage.removeprefix("externalize/")
    yield "model", f"{facts.model}{revision}"
    yield "architecture", facts.architecture
    if facts.commit:
        yield "commit", facts.commit[:12]
    yield "weights", f"sha256 {facts.weights_sha256[:12]}…"
    yield "tokenizer", f"{facts.vocabulary:,} tokens, {facts.identity.inputs['tokenizer'][:12]}…"
    yield "corpus", f"{facts.identity.inputs['corpus'][:12]}…"
    yield "read in", f"{facts.dtype}, on {facts.device}"
    yield "kept", _scheme(facts)
    state = "finished" if facts.complete else "unfinished; `fusellm externalize` goes on with it"
    yield "state", state
    runs = [f"{run.start:,} to {run.stop - 1:,}" for run in store.numbers]
    numbers = f", {', '.join(runs[:3])}{', …' if len(runs) > 3 else ''}" if runs else ""
    yield "blocks", f"{facts.blocks:,}{numbers}"
    if facts.aside:
        yield "put aside", f"{len(facts.aside):,} of them, which have no distributions"
    yield "tokens", f"{facts.tokens:,}"
    yield "positions", f"{facts.positions:,}"
    if facts.positions:
        yield "kept a position", f"{facts.kept / facts.positions:.2f} tokens"
    size = f"{facts.bytes / 1e6:,.2f} MB in {counted(f'{facts.shards:,}', 'shards')}"
    yield "size", f"{size}, {facts.bytes / max(facts.tokens, 1):.2f} bytes a token"
    versions = (f"{name} {facts.software.get(name, '?')}" for name in ("fusellm", "transformers"))
    yield "written by", f"{', '.join(versions)}, in {facts.seconds:,.0f} s"


def _scheme(facts: "StoreFacts") -> str:
    if facts.scheme == "sampled":
        return f"{facts.draws} draws at each position, with their counts"
    until = "" if facts.mass is None else f", no more than reach {facts.mass:g}"
    step = f"log-probabilities to {facts.error_nats:.4f} nat"
    return f"the {facts.k} most probable tokens{until}, and the mass of the rest; {step}"


def _sizes(per_token: Mapping[str, float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("bytes a token, measured on some record batches")
    table.add_column("columns", style="dim")
    table.add_column("", justify="right")
    for group, columns in _GROUPS.items():
        there = [column for column in columns if column in per_token]
        table.add_row(group, " ".join(there), f"{sum(per_token[c] for c in there):.2f}")
    return table


def _aside(facts: "StoreFacts") -> Iterator[Table | Text]:
    for reason, count in Counter(entry.reason for entry in facts.aside).most_common():
        yield Text(f"put aside, {count:,}: {plain(reason)}", "yellow")
        table = Table.grid(padding=(0, 2))
        mine = [entry for entry in facts.aside if entry.reason == reason]
        for entry in mine[:_MOST_ASIDE]:
            table.add_row("", f"block {entry.block}", Text(plain(entry.document)))
        yield table
        if len(mine) > _MOST_ASIDE:
            yield Text(f"  and {len(mine) - _MOST_ASIDE:,} more (--json has all)", "dim")


# verify


def verify_screen(
    path: Path, found: Sequence["Verified"], out: Mapping[Path, Sequence[str]] | None
) -> Iterator[Table | Text]:
    """What was found in each stage, and what to do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "files", "size", "found"):
        table.add_column(column, justify="right" if column in ("files", "size") else "left")
    for stage in found:
        said = Text(f"{len(stage.faults):,} not as written", "bold red")
        if not stage.faults:
            said = Text("whole" if stage.complete else "whole so far, unfinished", "green")
        size = f"{stage.bytes / 1e6:,.1f} MB"
        table.add_row(Text(plain(stage.stage)), f"{stage.files:,}", size, said)
    yield table
    bad = [stage for stage in found if stage.faults]
    if not bad:
        yield Text(f"All {sum(s.files for s in found):,} files are what was written.", "green")
        return
    for stage in bad:
        yield from _faults(stage)
    if out is None:
        if any(stage.repairable for stage in bad):
            yield Text(
                f"To take them out of the manifest: fusellm store verify {plain(str(path))} "
                "--repair\nThe command of the stage then makes these anew, and no others."
            )
    else:
        yield from _repaired(bad, out)
    if any(not fault.repairable for stage in bad for fault in stage.faults):
        yield Text(
            "A manifest cannot be repaired: move its folder away, and the stage makes all of it "
            "anew."
        )


def _faults(stage: "Verified") -> Iterator[Text]:
    for fault in stage.faults[:_MOST_FAULTS]:
        place = plain(str(stage.path / fault.file))
        yield Text.assemble((place, "bold"), f"  {plain(fault.what)}")
    if len(stage.faults) > _MOST_FAULTS:
        yield Text(f"and {len(stage.faults) - _MOST_FAULTS:,} more (--json has all)", "dim")
    if stage.complete and len(stage.faults) > 1 and _are_gone(stage):
        yield Text(
            f"All shards of {plain(stage.stage)} are gone, as after `fusellm clean --stores`.",
            "yellow",
        )


def _are_gone(stage: "Verified") -> bool:
    missing = sum(fault.what == "missing" for fault in stage.faults)
    return missing == len(stage.faults) and not any(stage.path.glob("*.arrow"))


def _repaired(bad: Sequence["Verified"], out: Mapping[Path, Sequence[str]]) -> Iterator[Text]:
    for stage in bad:
        count = len(out.get(stage.path, []))
        if not count:
            continue
        command, _, inner = stage.stage.partition("/")
        run = stage.path.parents[1] if inner else stage.path.parent
        place = str(run) if (run / "recipe.yaml").exists() else "RECIPE"
        anew = f"makes {'it' if count == 1 else 'them'} anew, and no others"
        if command == "train":
            anew = "trains this model again from the beginning"
        files = f"{count} file" + ("" if count == 1 else "s")
        yield Text(
            f"{plain(stage.stage)}: {files} taken out. This {anew}:\n"
            f"    fusellm {plain(command)} {plain(place)}"
        )


# cat


def cat_screen(
    store: "DistributionStore",
    block: "StoredBlock",
    position: int | None,
    most: int,
    encoder: "Encoder | None",
) -> Iterator[Table | Text]:
    """A block's positions, or one of them in full."""
    words = _Words(encoder)
    ends = int(block.ends[-1]) if len(block.ends) else 0
    yield Text.assemble(
        ("block ", "dim"),
        (str(block.number), "bold"),
        f"  {counted(f'{len(block.ids):,}', 'tokens')}, "
        f"{counted(f'{block.positions:,}', 'positions')}, {counted(f'{ends:,}', 'bytes')}",
        f"  of {plain(store.facts.model)}, {store.facts.scheme}",
    )
    if not block.usable:
        yield Text(f"not usable: {plain(block.reason or '')}; it has no distributions", "yellow")
        yield Text(" ".join(words.one(int(id_)) for id_ in block.ids[:most]), "dim")
        return
    if position is not None:
        yield from _position(block, block.at(position), words)
        return
    yield _positions(block, most, words)
    if block.positions > most:
        yield Text(
            f"{block.positions - most:,} more positions: --limit {block.positions}, or one in "
            "full: --position P",
            "dim",
        )


class _Words:
    """Ids as they are shown: as tokens, where the tokenizer is at hand."""

    def __init__(self, encoder: "Encoder | None") -> None:
        self._encoder = encoder
        self.are_tokens = encoder is not None

    def one(self, id_: int) -> str:
        """One token."""
        return str(id_) if self._encoder is None else visible(self._encoder.spelled(id_))

    def until(self, block: "StoredBlock", position: int) -> str:
        """The end of what has been read at a position."""
        glue = "" if self.are_tokens else " "
        shown = ""
        for id_ in reversed(block.ids[: position + 1].tolist()):
            longer = self.one(id_) + (glue + shown if shown else "")
            if cell_len(longer) > _READ_CELLS:
                return "…" + shown
            shown = longer
        return shown


def _positions(block: "StoredBlock", most: int, words: _Words) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in ("", "bytes"):
        table.add_column(name, justify="right", no_wrap=True, style="dim")
    table.add_column("read", justify="right", no_wrap=True, max_width=16, overflow="ellipsis")
    table.add_column("next", no_wrap=True, max_width=16, overflow="ellipsis")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("kept, from the most probable on", no_wrap=True, ratio=1, min_width=16)
    table.add_column("tail", justify="right", no_wrap=True)
    for n in range(min(block.positions, most)):
        at = block.at(n)
        table.add_row(
            str(n),
            str(at.read_bytes),
            Text(words.one(at.token)),
            Text(words.one(at.true_id), "bold"),
            number(math.exp(at.true_log_prob)),
            _Kept(at, words),
            "–" if len(at.counts) else number(at.tail),
        )
    return table


class _Kept:
    """As many kept tokens with their probabilities as fit one line."""

    def __init__(self, at: "Distribution", words: _Words) -> None:
        self._at, self._words = at, words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        text, order = Text(no_wrap=True), _by_mass(self._at)
        for place, n in enumerate(order):
            id_ = int(self._at.ids[n])
            word, mass = self._words.one(id_), number(float(self._at.masses[n]))
            more = len(order) - place
            room = options.max_width - (len(f"+{more}") if more > 1 else 0)
            if text.cell_len + cell_len(word) + len(mass) + 3 > room and place:
                text.append(f"+{more}", "dim")
                break
            text.append(word, "bold" if id_ == self._at.true_id else "")
            text.append(f" {mass}  ", "dim")
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(16, options.max_width)


def _position(block: "StoredBlock", at: "Distribution", words: _Words) -> Iterator[Table | Text]:
    yield Text.assemble(
        ("position ", "dim"),
        (str(at.position), "bold"),
        f" of {block.positions:,}, after {at.read_bytes:,} bytes: ",
        (words.until(block, at.position), "italic"),
    )
    yield Text.assemble(
        ("next ", "dim"),
        (words.one(at.true_id), "bold"),
        f"  p {number(math.exp(at.true_log_prob))}, {-at.true_log_prob:.3f} nats",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "id", "token" if words.are_tokens else "", "p", "nats", "draws", ""):
        table.add_column(name, justify="left" if name in ("", "token") else "right", no_wrap=True)
    for n in _by_mass(at):
        id_ = int(at.ids[n])
        table.add_row(
            _TRUE if id_ == at.true_id else "",
            str(id_),
            Text(words.one(id_) if words.are_tokens else ""),
            number(float(at.masses[n])),
            f"{-float(at.log_probs[n]):.3f}",
            str(at.counts[n]) if len(at.counts) else "–",
            bar(float(at.masses[n]), 24),
        )
    if not len(at.counts):
        table.add_row(
            "", "", Text("not kept", "italic"), number(at.tail), "", "–", bar(at.tail, 24)
        )
    yield table


def _by_mass(at: "Distribution") -> list[int]:
    return sorted(range(len(at.ids)), key=lambda n: (-at.masses[n], at.ids[n]))
