"""`fusellm store`: what is in a run's folders, whether it is whole, and what a source said where.

Nothing that a store holds reaches the terminal unescaped. Heavy imports are made inside the
functions, so that `--help` answers at once.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fusellm.cli import draw
from fusellm.cli.console import STDERR, STDOUT, Terminal
from fusellm.cli.options import Json
from fusellm.errors import StoreError
from fusellm.explain.grid import visible
from fusellm.text_table import counted

if TYPE_CHECKING:
    from fusellm.store.facts import StoreFacts
    from fusellm.store.opened import Distribution, DistributionStore, StoredBlock
    from fusellm.store.verify import Verified
    from fusellm.tokens.encode import Encoder

store_app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Look into a run's folders: what is there, whether it is whole, what a source said where. "
        "docs/store-format.md describes every file; programs read a source's distributions with "
        "fusellm.open_store."
    ),
)

Source = Annotated[
    Path,
    typer.Argument(
        help="A source's distributions: runs/NAME/externalize/SOURCE, or that folder wherever it "
        "has been moved.",
        show_default=False,
    ),
]
_LISTED_POSITIONS = 20
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        metavar="N",
        help=f"Most positions of a block; {_LISTED_POSITIONS} if not given, and with --json all.",
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="Folder, hub name or zoo/NAME of the source's tokenizer, to show tokens in place "
        "of ids, where the store's model is not at hand.",
    ),
]
_MOST_ASIDE, _MOST_FAULTS = 8, 30
_READ_CELLS = 61
_TRUE = "✓"


@store_app.command()
def info(path: Source, as_json: Json = False) -> None:
    """Show what a source's distributions were made from, and how many there are.

    The model with its commit and the digest of its weights, what is kept of each distribution,
    counts, sizes, and the blocks that were put aside with the reason. Also of an unfinished store.
    No shard is read but for the sizes of columns, which are measured on a few.

    Example: `fusellm store info runs/demo/externalize/python`
    """
    from fusellm.explain.store import described, sizes_by_kind
    from fusellm.store.opened import open_store

    store = open_store(path)
    told = store.as_dict()
    if as_json:
        print(json.dumps(told))
        return
    STDOUT.say(Text(plain(str(store.path)), "bold"))
    STDOUT.print(draw.facts((name, plain(value)) for name, value in described(store).items()))
    if told["fault"] is not None:
        STDOUT.say(Text(plain(told["fault"]), "bold yellow"))
    if told["bytes_per_token"]:
        columns = (Column("columns", style="dim"), ">")
        sizes = draw.table("bytes a token, measured on some record batches", *columns)
        for row in sizes_by_kind(told["bytes_per_token"]):
            sizes.add_row(*row)
        STDOUT.print(sizes)
    _show_aside(store.facts)


def plain(text: str) -> str:
    """A text with its spaces, and no character that moves the cursor.

    >>> plain("a b\\x1b[2J")
    'a b\\\\x1b[2J'
    """
    return " ".join(visible(part) for part in text.split(" "))


def _show_aside(told: "StoreFacts") -> None:
    for reason, count in Counter(entry.reason for entry in told.aside).most_common():
        STDOUT.say(Text(f"put aside, {count:,}: {plain(reason)}", "yellow"))
        shown = Table.grid(padding=(0, 2))
        for entry in [entry for entry in told.aside if entry.reason == reason][:_MOST_ASIDE]:
            shown.add_row("", f"block {entry.block}", Text(plain(entry.document)))
        STDOUT.print(shown)
        if count > _MOST_ASIDE:
            STDOUT.say(Text(f"  and {count - _MOST_ASIDE:,} more (--json has all)", "dim"))


@store_app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(help="A run, or the folder of one of its stages.", show_default=False),
    ],
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Take damaged files out of the manifest, so that the stage makes these anew.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every file of a run or a stage, and name each that is not what was written.

    Files that are missing, cut short or damaged are named with their record batches. The exit code
    is 1 if there are any, and 0 if there are none.

    With `--repair` these files are taken out of the manifest and off the disk. The same command
    that made the stage then makes them anew, and no others.

    Example: `fusellm store verify runs/demo`, and where it names files of externalize:
    `fusellm store verify runs/demo --repair`, then `fusellm externalize runs/demo`.
    """
    from fusellm.store.verify import bytes_to_verify, stage_paths, verify_stage
    from fusellm.store.verify import repair as repair_stage

    folders = stage_paths(path)
    total = sum(bytes_to_verify(folder) for folder in folders)
    with Terminal(STDERR).start("verifying", total / 1e6, "MB") as bar:
        stages = [verify_stage(folder, lambda size: bar.advance(size / 1e6)) for folder in folders]
    bad = [stage for stage in stages if stage.faults]
    taken_out = {stage.path: repair_stage(stage) for stage in bad} if repair else {}
    if as_json:
        rows = [
            asdict(stage) | {"path": str(stage.path), "taken_out": taken_out.get(stage.path, [])}
            for stage in stages
        ]
        faults = sum(len(stage.faults) for stage in stages)
        print(json.dumps({"path": str(path), "whole": not bad, "faults": faults, "stages": rows}))
    else:
        _show_verified(path, stages, taken_out if repair else None)
    if bad:
        raise typer.Exit(1)


def _show_verified(
    path: Path, stages: Sequence["Verified"], taken_out: Mapping[Path, Sequence[str]] | None
) -> None:
    """Print what was found in each stage, and what to do; `taken_out` if it was repaired."""
    shown = draw.table("stage", ">files", ">size", "found")
    for stage in stages:
        said = Text(f"{len(stage.faults):,} not as written", "bold red")
        if not stage.faults:
            said = Text("whole" if stage.complete else "whole so far, unfinished", "green")
        size = f"{stage.bytes / 1e6:,.1f} MB"
        shown.add_row(Text(plain(stage.stage)), f"{stage.files:,}", size, said)
    STDOUT.print(shown, soft_wrap=True)
    bad = [stage for stage in stages if stage.faults]
    if not bad:
        files = sum(stage.files for stage in stages)
        STDOUT.say(Text(f"All {files:,} files are what was written.", "green"))
    for stage in bad:
        _show_faults(stage)
    if taken_out is None and any(stage.repairable for stage in bad):
        STDOUT.say(
            f"To take them out of the manifest: fusellm store verify {plain(str(path))} "
            "--repair\nThe command of the stage then makes these anew, and no others."
        )
    for stage in bad:
        if taken_out and taken_out[stage.path]:
            told = stage.repaired(len(taken_out[stage.path]))
            STDOUT.say("\n".join(map(plain, told.splitlines())))
    if any(len(stage.repairable) < len(stage.faults) for stage in bad):
        STDOUT.say(
            "A manifest cannot be repaired: move its folder away, and the stage makes all of it "
            "anew."
        )


def _show_faults(stage: "Verified") -> None:
    for fault in stage.faults[:_MOST_FAULTS]:
        place = plain(str(stage.path / fault.file))
        STDOUT.say(Text.assemble((place, "bold"), f"  {plain(fault.what)}"))
    if len(stage.faults) > _MOST_FAULTS:
        more = len(stage.faults) - _MOST_FAULTS
        STDOUT.say(Text(f"and {more:,} more (--json has all)", "dim"))
    if stage.is_emptied:
        said = f"All shards of {plain(stage.stage)} are gone, as after `fusellm clean --stores`."
        STDOUT.say(Text(said, "yellow"))


@store_app.command()
def cat(
    path: Source,
    block: Annotated[
        int | None,
        typer.Option(
            "--block",
            metavar="N",
            help="Which block, by its number; if not given the first, and with --json all.",
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            "--position",
            metavar="P",
            help="Only what is said after the block's token P, from 0, in full.",
        ),
    ] = None,
    limit: Limit = None,
    tokenizer: TokenizerName = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines on stdout, one a block.")
    ] = False,
) -> None:
    """List what a source said of a block's tokens, position by position.

    A row is a position: how many bytes have been read, the token that was read last, the one that
    truly follows with the probability that the source gave it, the kept tokens from the most
    probable on, and the mass of what was not kept.

    With `--json` every block is one line that other programs can read: its token ids, where they
    end, and at each position ids, log-probabilities (nats), counts of draws, and the tail.

    Example: `fusellm store cat runs/demo/externalize/python --block 40`, then with
    `--position 12` for one position in full.
    """
    from fusellm.models.readers import encoder_of_store
    from fusellm.store.opened import block_as_dict, open_store

    store = open_store(path)
    encoder = encoder_of_store(store.path, store.facts, tokenizer, Terminal(STDERR))
    if as_json:
        for one in store if block is None else [store[block]]:
            print(json.dumps(block_as_dict(one, position, limit, encoder)))
        return
    if len(store) == 0:
        raise StoreError(f"{path} has no blocks yet; `fusellm externalize` goes on with it")
    chosen = store[store.numbers[0].start if block is None else block]
    _show_block(store, chosen, position, limit or _LISTED_POSITIONS, encoder)


def _show_block(
    store: "DistributionStore",
    block: "StoredBlock",
    position: int | None,
    most: int,
    encoder: "Encoder | None",
) -> None:
    """Print a block's positions, or one of them in full; ids where no tokenizer is at hand."""
    ends = int(block.ends[-1]) if len(block.ends) else 0
    sizes = {"tokens": len(block.ids), "positions": block.positions, "bytes": ends}
    counts = ", ".join(counted(f"{count:,}", unit) for unit, count in sizes.items())
    of = f"  {counts}  of {plain(store.facts.model)}, {store.facts.scheme}"
    STDOUT.print(Text.assemble(("block ", "dim"), (str(block.number), "bold"), of))

    words = [_word(id_, encoder) for id_ in block.ids]
    if not block.usable:
        why = f"not usable: {plain(block.reason or '')}; it has no distributions"
        STDOUT.print(Text(why, "yellow"))
        STDOUT.print(Text(" ".join(words[:most]), "dim"))
    elif position is not None:
        until = _until(words[: position + 1], "" if encoder is not None else " ")
        _show_position(block, block.at(position), encoder, until)
    else:
        STDOUT.print(_positions(block, most, encoder))
        if block.positions > most:
            more = f"{block.positions - most:,} more positions: --limit {block.positions}"
            STDOUT.print(Text(f"{more}, or one in full: --position P", "dim"))


def _word(id_: int, encoder: "Encoder | None") -> str:
    """An id as it is shown: as a token, where the tokenizer is at hand."""
    return str(id_) if encoder is None else visible(encoder.spelled(int(id_)))


def _positions(block: "StoredBlock", most: int, encoder: "Encoder | None") -> Table:
    shown = draw.table(
        draw.right("", style="dim"),
        draw.right("bytes", style="dim"),
        draw.right("read", max_width=16, overflow="ellipsis"),
        Column("next", no_wrap=True, max_width=16, overflow="ellipsis"),
        draw.right("p"),
        Column("kept, from the most probable on", no_wrap=True, ratio=1, min_width=16),
        draw.right("tail"),
        expand=True,
    )
    for at in map(block.at, range(min(block.positions, most))):
        read, follows = Text(_word(at.token, encoder)), Text(_word(at.true_id, encoder), "bold")
        place, likely = (
            (str(at.position), str(at.read_bytes)),
            draw.number(math.exp(at.true_log_prob)),
        )
        tail = "–" if len(at.counts) else draw.number(at.tail)
        shown.add_row(*place, read, follows, likely, _kept(at, encoder), tail)
    return shown


def _kept(at: "Distribution", encoder: "Encoder | None") -> draw.Fitted:
    """As many kept tokens with their probabilities as fit one line."""

    words = [
        (_word(at.ids[n], encoder), at.ids[n] == at.true_id, draw.number(float(at.masses[n])))
        for n in _by_mass(at)
    ]

    def first(count: int) -> Text:
        text = Text(no_wrap=True)
        for word, true, mass in words[:count]:
            text.append(word, "bold" if true else "").append(f" {mass}  ", "dim")
        return text.append(f"+{len(words) - count}" if count < len(words) else "", "dim")

    return draw.Fitted(lambda room: draw.longest(first, len(words), room), 16)


def _until(words: Sequence[str], glue: str) -> str:
    """The end of what has been read, in whole tokens that fit beside the rest of the line."""

    def last(count: int) -> str:
        return ("…" if count < len(words) else "") + glue.join(words[-count:])

    return draw.longest(last, len(words), _READ_CELLS)


def _show_position(
    block: "StoredBlock", at: "Distribution", encoder: "Encoder | None", until: str
) -> None:
    read = f" of {block.positions:,}, after {at.read_bytes:,} bytes: "
    place = (str(at.position), "bold")
    STDOUT.print(Text.assemble(("position ", "dim"), place, read, (until, "italic")))
    given = f"  p {draw.number(math.exp(at.true_log_prob))}, {-at.true_log_prob:.3f} nats"
    STDOUT.print(Text.assemble(("next ", "dim"), (_word(at.true_id, encoder), "bold"), given))
    names = ("p", "nats", "draws", "")
    shown = draw.table(
        "",
        draw.right("id"),
        Column("token" if encoder is not None else "", no_wrap=True),
        *map(draw.right, names),
    )
    shown.columns[-1].justify = "left"
    for n in _by_mass(at):
        mark, mass = _TRUE if at.ids[n] == at.true_id else "", float(at.masses[n])
        draws = str(at.counts[n]) if len(at.counts) else "–"
        told = (
            draw.number(mass),
            f"{-float(at.log_probs[n]):.3f}",
            draws,
            draw.share_bar(mass, 24),
        )
        token = "" if encoder is None else _word(at.ids[n], encoder)
        shown.add_row(mark, str(at.ids[n]), Text(token), *told)
    if not len(at.counts):
        told = (draw.number(at.tail), "", "–", draw.share_bar(at.tail, 24))
        shown.add_row("", "", Text("not kept", "italic"), *told)
    STDOUT.print(shown)


def _by_mass(at: "Distribution") -> list[int]:
    return sorted(range(len(at.ids)), key=lambda n: (-at.masses[n], at.ids[n]))
