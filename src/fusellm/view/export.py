"""The explorer as files: pages that need no server, with all that they show in them."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from fusellm.errors import StoreError
from fusellm.explain.documents import DocumentWins, Passage
from fusellm.progress import Progress
from fusellm.store.blocks import BLOCKS, open_corpus
from fusellm.store.files import make_folder, write_text
from fusellm.store.tables import Shard, shard_names
from fusellm.view.data import position_data
from fusellm.view.opened import OpenedRun
from fusellm.view.pages import Pages, asset, page_of_block, page_of_tokenizer

_BEGINNING = 400  # characters of a block, to search in
MARK = ".fusellm-view"
"""A file that says that a folder is an export, which another may replace."""


def export(
    opened: OpenedRun, folder: Path, blocks: Sequence[int], progress: Progress
) -> list[Path]:
    """Write the pages of some blocks, with the overview and the tokenizers.

    Args:
        folder: a new or empty one, or an earlier export, which is replaced once the new one is
            whole.
        blocks: their numbers.

    Returns:
        The pages.

    Raises:
        StoreError: the folder has something else in it, or there is no such block.
    """
    require_free(folder)
    folder = folder.resolve()
    blocks = sorted(set(blocks))
    beyond = [n for n in blocks if not 0 <= n < opened.blocks]
    if beyond:
        raise StoreError(
            f"there is no block {beyond[0]}: the run has {opened.blocks:,}, from 0 to "
            f"{opened.blocks - 1}"
        )
    documents = opened.documents.wait()
    opened.inspector.wait()
    assert documents is not None
    make_folder(folder.parent)
    fresh = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    make_folder(fresh)
    try:
        pages = Pages(opened, blocks)
        _write_blocks(opened, pages, fresh, blocks, progress)
        _write_others(opened, pages, fresh, documents, blocks, progress)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sorted(folder.glob("*.html"))


def require_free(folder: Path) -> None:
    """Check that nothing of somebody's is lost by writing to a folder.

    Raises:
        StoreError: it is a file, or has something else in it.
    """
    if folder.is_symlink() or folder.resolve() == Path.cwd():
        raise StoreError(
            f"--export {folder} is a link or the current folder, which cannot be replaced when the "
            "pages are whole; give a new folder"
        )
    is_free = folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))
    if folder.exists() and not is_free:
        raise StoreError(
            f"--export {folder} is there and is no earlier export; give a new folder, or empty it"
        )


def _write_blocks(
    opened: OpenedRun, pages: Pages, folder: Path, blocks: Sequence[int], progress: Progress
) -> None:
    with progress.start("exporting", len(blocks), "blocks") as bar:
        for number in blocks:
            answers = opened.block(number).answers
            for answer in range(answers) if answers else [None]:
                page = _page(opened, pages, number, answer)
                write_text(folder / page_of_block(number, answer), page)
            bar.advance()


def _page(opened: OpenedRun, pages: Pages, number: int, answer: int | None) -> str:
    view, inspector = opened.block(number, answer), opened.inspector.wait()
    assert inspector is not None
    positions = [
        position_data(view, inspector.position(number, position, answer))
        for position in range(view.positions)
    ]
    predictions = opened.predictions(number, answer).wait() if opened.asks_models else None
    return pages.block(view, positions, predictions)


def _write_others(
    opened: OpenedRun,
    pages: Pages,
    folder: Path,
    documents: Sequence[DocumentWins],
    blocks: Sequence[int],
    progress: Progress,
) -> None:
    names = [source.name for source in opened.recipe.sources]
    with progress.start("comparing tokenizers", len(names), "sources") as bar:
        for place, name in enumerate(names):
            compared = opened.comparison(name).wait()
            assert compared is not None
            write_text(folder / page_of_tokenizer(place), pages.tokenizer(place, compared))
            bar.advance()
    beginnings = _beginnings(opened.run, frozenset(blocks))
    write_text(folder / "index.html", pages.index(documents, beginnings))
    for name in ("view.css", "view.js"):
        write_text(folder / name, asset(name))
    write_text(folder / MARK, "pages of `fusellm view --export`\n")


def _beginnings(run: Path, blocks: frozenset[int]) -> list[Passage]:
    """The beginnings of some blocks, in their order."""
    corpus, beginnings = open_corpus(run), []
    for name in shard_names(corpus, "train-"):
        shard = Shard(corpus, name, BLOCKS)
        for number in range(*shard.numbers):
            if number in blocks:
                row = shard.block(number - shard.numbers[0])
                where = number, row["document"], row["domain"]
                beginnings.append(Passage(*where, row["text"][:_BEGINNING], "", ""))
    return beginnings
