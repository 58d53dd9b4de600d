"""`fusellm view`: an explorer of a fused run, in the browser or as files."""

import time
import webbrowser
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from fusellm.cli.console import STDERR, STDOUT, Terminal
from fusellm.cli.options import RunFolder, TrustRemoteCode, folder
from fusellm.errors import ArgumentError, StoreError
from fusellm.recipe_file import open_recipe

if TYPE_CHECKING:
    from fusellm.view.opened import OpenedRun

_EXPORTED = 20
_OPENING = 30.0  # seconds that a browser has to read the file that leads it to the address


def _blocks(given: str, most: int) -> list[int]:
    """The numbers that `0-9,40` names, of a run of so many blocks."""
    numbers: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise typer.BadParameter(f"{part!r} is no block and no range; give such as 0-9,40")
        if int(ends[1]) >= most:
            raise StoreError(
                f"--blocks {part.strip()}: there is no block {int(ends[1])}; the run has {most:,}, "
                f"from 0 to {most - 1}"
            )
        numbers += range(int(ends[0]), int(ends[1]) + 1)
    return numbers


_Block = Annotated[
    int | None,
    typer.Option("--block", metavar="N", min=0, help="Open at this block, not at the overview."),
]
_Port = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="Of this machine; 0 takes a free one.")
]
_Browser = Annotated[
    bool, typer.Option("--browser/--no-browser", help="Whether to open a browser.")
]
_AsksModels = Annotated[
    bool,
    typer.Option(
        "--predictions/--no-predictions",
        help="Whether to load the target, CLM and fused model, when a block is looked at, and say "
        "what each predicts.",
    ),
]
_Export = Annotated[
    Path | None,
    typer.Option(
        "--export",
        metavar="FOLDER",
        parser=folder,
        help="Write pages that need no server, and stop; a folder that is new, or an earlier "
        "export.",
    ),
]
_Blocks = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        metavar="RANGES",
        help=f"Of an export: which blocks, such as 0-9,40; {_EXPORTED} spread over the run if not "
        "given.",
    ),
]


def view(
    run: RunFolder,
    block: _Block = None,
    port: _Port = 0,
    browser: _Browser = True,
    predictions: _AsksModels = True,
    export: _Export = None,
    blocks: _Blocks = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Look through a fused run in the browser: who knew what, and what became of it.

    Every model's tokens of a block on one grid of bytes; of each position what the sources said
    before and after the vocabulary map, the fused distribution, and what the target, the CLM
    baseline and the fused model predict there; which source won where; how far the tokenizers
    agree.

    The server listens on this machine alone, and its address has a token in it: whoever has the
    address can read the run. From elsewhere: `ssh -L PORT:127.0.0.1:PORT HOST`, with --port PORT.
    Ctrl-C ends it. Nothing is written to the run.

    Examples: `fusellm view runs/demo`; `fusellm view runs/demo --export pages --blocks 0-19`.
    """
    if not run.is_dir():
        raise StoreError(f"{run} is not a run: it is no folder; give the folder of a run")
    if blocks is not None and export is None:
        raise ArgumentError("--blocks is of an export: give --export FOLDER as well")
    if export is not None and (block is not None or port):
        raise ArgumentError("--block and --port are of the server, and --export starts none")
    recipe = open_recipe(run)
    from fusellm.store.run_folder import require_no_rounds
    from fusellm.view.opened import OpenedRun

    require_no_rounds(run)
    opened = OpenedRun(recipe, run, asks_models=predictions, trusted=trust_remote_code)
    if export is not None:
        _export(opened, export, blocks)
    else:
        _serve(opened, block, port, browser)


def _export(opened: "OpenedRun", folder: Path, given: str | None) -> None:
    from fusellm.view.export import export

    if given is None:
        count = min(_EXPORTED, opened.blocks)
        numbers = [n * opened.blocks // count for n in range(count)]
    else:
        numbers = _blocks(given, opened.blocks)
    pages = export(opened, folder, numbers, Terminal(STDERR))
    STDOUT.say(f"{len(pages)} pages; open {folder / 'index.html'}")


def _serve(opened: "OpenedRun", block: int | None, port: int, browser: bool) -> None:
    from fusellm.view.pages import page_of_block
    from fusellm.view.server import Explorer

    if block is not None and block >= opened.blocks:
        raise StoreError(
            f"there is no block {block}: the run has {opened.blocks:,}, from 0 to "
            f"{opened.blocks - 1}"
        )
    try:
        server = Explorer(opened, port)
    except OSError as error:
        raise ArgumentError(
            f"--port {port} cannot be listened on: {error.strerror}; give another, or none"
        ) from None
    address = server.address + ("" if block is None else page_of_block(block))
    with server:
        print(address, flush=True)
        STDERR.say("Ctrl-C ends it")
        if browser and STDOUT.is_terminal:
            # In a thread: a browser in the terminal ends before the call does.
            Thread(target=_open, args=[address], daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            STDERR.say("ended")


def _open(address: str) -> None:
    """Open an address in the browser, through a file that only this user can read.

    On a command line anybody on this machine would see its token.
    """
    with TemporaryDirectory(prefix="fusellm-view-") as folder:
        page = Path(folder) / "open.html"
        where = escape(address)
        page.write_text(
            f'<meta http-equiv="refresh" content="0; url={where}"><a href="{where}">{where}</a>',
            encoding="utf-8",
        )
        webbrowser.open(page.as_uri())
        time.sleep(_OPENING)
