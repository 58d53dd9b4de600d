"""`fusellm store`: what is in a run's folders, whether it is whole, and what a source said where.

Heavy imports are made inside the functions, so that `--help` answers at once.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fusellm.cli.console import STDERR, SafeConsole, Terminal
from fusellm.cli.options import Json
from fusellm.errors import FusellmError, StoreError

if TYPE_CHECKING:
    from fusellm.store.opened import DistributionStore, StoredBlock
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
BlockNumber = Annotated[
    int | None,
    typer.Option(
        "--block",
        metavar="N",
        help="Which block, by its number; if not given the first, and with --json all.",
    ),
]
PositionNumber = Annotated[
    int | None,
    typer.Option(
        "--position",
        metavar="P",
        help="Only what is said after the block's token P, from 0, in full.",
    ),
]
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
        help="Folder, hub name or zoo/NAME of the source's tokenizer, to show tokens in place of "
        "ids, where the store's model is not at hand.",
    ),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines on stdout, one a block.")]


@store_app.command()
def info(path: Source, as_json: Json = False) -> None:
    """Show what a source's distributions were made from, and how many there are.

    The model with its commit and the digest of its weights, what is kept of each distribution,
    counts, sizes, and the blocks that were put aside with the reason. Also of an unfinished store.
    No shard is read but for the sizes of columns, which are measured on a few.

    Example: `fusellm store info runs/demo/externalize/python`
    """
    from fusellm.cli.store_screen import info_screen
    from fusellm.store.opened import open_store

    store = open_store(path)
    per_token, fault = _sizes(store)
    if as_json:
        print(json.dumps(_facts_object(store, per_token, fault)))
        return
    console = SafeConsole()
    for part in info_screen(store, per_token, fault):
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))


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
    from fusellm.cli.store_screen import verify_screen

    console = SafeConsole()
    found, out = _verified(path, repair, Terminal(STDERR))
    if as_json:
        print(json.dumps(_verified_object(path, found, out)))
    else:
        for part in verify_screen(path, found, out):
            console.print(part, highlight=False, soft_wrap=True)
    if any(stage.faults for stage in found):
        raise typer.Exit(1)


def _verified(
    path: Path, repair: bool, terminal: Terminal
) -> tuple[list["Verified"], dict[Path, list[str]] | None]:
    """(what was found, files taken out by folder; None where no repair was asked for)."""
    from fusellm.store.verify import bytes_to_verify, stage_paths, verify_stage
    from fusellm.store.verify import repair as repair_stage

    folders = stage_paths(path)
    total = sum(bytes_to_verify(folder) for folder in folders)
    with terminal.start("verifying", total / 1e6, "MB") as bar:
        found = [verify_stage(folder, lambda size: bar.advance(size / 1e6)) for folder in folders]
    if not repair:
        return found, None
    return found, {stage.path: repair_stage(stage) for stage in found if stage.faults}


@store_app.command()
def cat(
    path: Source,
    block: BlockNumber = None,
    position: PositionNumber = None,
    limit: Limit = None,
    tokenizer: TokenizerName = None,
    as_json: JsonLines = False,
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
    from fusellm.cli.store_screen import cat_screen
    from fusellm.store.opened import open_store

    store = open_store(path)
    encoder = _encoder(store, tokenizer, Terminal(STDERR))
    if as_json:
        blocks: Iterator[StoredBlock] = iter(store) if block is None else iter([store[block]])
        for found in blocks:
            print(json.dumps(_block_object(found, position, limit, encoder)))
        return
    if len(store) == 0:
        raise StoreError(f"{path} has no blocks yet; `fusellm externalize` goes on with it")
    chosen = store[store.numbers[0].start if block is None else block]
    console = SafeConsole()
    for part in cat_screen(store, chosen, position, limit or _LISTED_POSITIONS, encoder):
        console.print(part, highlight=False)


def _encoder(store: "DistributionStore", given: str | None, terminal: Terminal) -> "Encoder | None":
    """The tokenizer that the store was made with, if it is at hand.

    Raises:
        FusellmError: the one that was given is not it, or cannot be loaded.
    """
    from fusellm.store.identity import tokenizer_fingerprint

    expected = store.facts.identity.inputs.get("tokenizer")
    if given is not None:
        from fusellm.cli.tokenizers import load_encoder

        encoder = load_encoder(given, False, terminal, store.facts.vocabulary)
        if tokenizer_fingerprint(encoder) != expected:
            raise StoreError(
                f"--tokenizer {given} is not the one that {store.path} was made with, so its ids "
                "would be shown as other tokens; give that of its model, "
                f"{store.facts.model!r}"
            )
        return encoder
    try:
        own = _own_encoder(store)
    except FusellmError as error:
        terminal.say(f"ids are shown, and with --tokenizer NAME tokens: {error}")
        return None
    if tokenizer_fingerprint(own) != expected:
        terminal.say(
            f"ids are shown: the tokenizer of {store.facts.model} is not the one that the store "
            "was made with; --tokenizer NAME gives another"
        )
        return None
    return own


def _own_encoder(store: "DistributionStore") -> "Encoder":
    """The tokenizer of the model that the store names; none of its code is run.

    Raises:
        FusellmError: it cannot be loaded.
    """
    from fusellm.config import ModelSettings
    from fusellm.models.readers import reader_of

    facts = store.facts
    return reader_of(ModelSettings(model=facts.model, revision=facts.commit)).encoder


def _sizes(store: "DistributionStore") -> tuple[dict[str, float], str | None]:
    """(bytes per token of each column, what hinders reading the store)."""
    missing = store.missing()
    if missing:
        few = f"{len(missing)} of {store.facts.shards} shards are missing or not of their size"
        return {}, f"{few}; `fusellm store verify {store.path}` names them"
    try:
        return store.bytes_per_token(), None
    except StoreError as error:
        return {}, str(error)


def _facts_object(
    store: "DistributionStore", per_token: dict[str, float], fault: str | None
) -> dict[str, Any]:
    """What `info --json` prints."""
    return asdict(store.facts) | {
        "path": str(store.path),
        "numbers": [[run.start, run.stop] for run in store.numbers],
        "bytes_per_token": per_token,
        "fault": fault,
    }


def _verified_object(
    path: Path, found: list["Verified"], out: dict[Path, list[str]] | None
) -> dict[str, Any]:
    """What `verify --json` prints."""
    rows = []
    for stage in found:
        row = asdict(stage) | {"path": str(stage.path)}
        rows.append(row | {"taken_out": (out or {}).get(stage.path, [])})
    return {
        "path": str(path),
        "whole": not any(stage.faults for stage in found),
        "faults": sum(len(stage.faults) for stage in found),
        "stages": rows,
    }


def _block_object(
    block: "StoredBlock", position: int | None, limit: int | None, encoder: "Encoder | None"
) -> dict[str, Any]:
    """A line of `cat --json`."""
    numbers = range(block.positions)[:limit] if position is None else [position]
    positions = []
    for number in numbers:
        at = block.at(number)
        row: dict[str, Any] = {
            "position": number,
            "true_id": at.true_id,
            "true_log_prob": round(at.true_log_prob, 7),
            "ids": at.ids.tolist(),
            "log_probs": at.log_probs.astype(float).round(7).tolist(),
        }
        own = {"counts": at.counts.tolist()} if len(at.counts) else {}
        positions.append(row | own | {"tail": float(f"{at.tail:.7g}")})
    spelled = {} if encoder is None else {"tokens": [encoder.spelled(int(i)) for i in block.ids]}
    return {
        "block": block.number,
        "usable": block.usable,
        "reason": block.reason,
        "ids": block.ids.tolist(),
        "ends": block.ends.tolist(),
        **spelled,
        "positions": positions,
    }
