"""Who won where: each document of a run's training text, and how much each source won in it.

S sources, in the recipe's order.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import Ragged
from fusellm.config import Recipe
from fusellm.progress import Progress
from fusellm.store import externalized
from fusellm.store.blocks import BLOCKS, open_corpus
from fusellm.store.externalized import PREDICTED, TARGET, open_externalized
from fusellm.store.fused import layout_of, open_fused
from fusellm.store.layout import sums_of
from fusellm.store.tables import Shard, shard_names

_EXCERPT = 60  # characters on either side of what was looked for


@dataclass
class DocumentWins:
    """One document.

    Attributes:
        name, domain: of it.
        first: number of its first block; `blocks` how many it has.
        positions: of the target, at which it is asked what comes next.
        wins: [S] positions that each source won; a position that several have a share in counts
            for each by its share.
    """

    name: str
    domain: str
    first: int
    blocks: int
    positions: int
    wins: np.ndarray


def wins_of_documents(recipe: Recipe, run: Path, progress: Progress) -> list[DocumentWins]:
    """Count the wins of a fused run, document by document.

    Of plain text all positions but a block's last count, those inside a long prefix included.

    Raises:
        StoreError: a stage is not finished, or a shard is damaged.
    """
    corpus, fused, sources = open_corpus(run), open_fused(run), len(recipe.sources)
    target, names = open_externalized(run, TARGET), shard_names(corpus, "train-")
    layouts = BLOCKS, layout_of(fused), externalized.layout_of(target)
    counted: list[DocumentWins] = []
    with progress.start("counting wins", len(names), "shards") as bar:
        for name in names:
            stages = zip((corpus, fused, target), layouts, strict=True)
            batches = (Shard(stage, name, layout).batches() for stage, layout in stages)
            for of_corpus, of_fused, of_target in zip(*batches, strict=True):
                wins, positions = _wins(of_fused, sources), _asked(of_target)
                for row, document in enumerate(of_corpus["document"]):
                    own = str(document), str(of_corpus["domain"][row])
                    if not counted or (counted[-1].name, counted[-1].domain) != own:
                        block = int(of_corpus["block"][row])
                        counted.append(DocumentWins(*own, block, 0, 0, np.zeros(sources)))
                    counted[-1].blocks += 1
                    counted[-1].positions += int(positions[row])
                    counted[-1].wins += wins[row]
            bar.advance()
    return counted


def _asked(columns: dict[str, Any]) -> np.ndarray:
    """[B] positions at which the target is asked, of a record batch of its store."""
    if PREDICTED in columns:  # of a conversation, the tokens that are learnt
        predicted = columns[PREDICTED]
        asked = sums_of(predicted.values.astype(np.int64), predicted.lengths)
    else:
        asked = np.maximum(columns["ids"].lengths - 1, 0)
    return np.where(columns["read"], asked, 0)


def _wins(columns: dict[str, Ragged], sources: int) -> np.ndarray:
    """[B, S] positions won, of a record batch of the fused store."""
    parts = columns["parts"]
    flat = {name: column.values for name, column in columns.items() if name != "block"}
    fused = Fused.of(flat)
    blocks = len(parts.lengths)
    block = np.repeat(np.arange(blocks), parts.lengths)[fused.position_of_part]
    wins = np.zeros((blocks, sources))
    np.add.at(wins, (block, fused.source.astype(np.int64)), fused.part_weights)
    return wins


@dataclass(frozen=True)
class Passage:
    """A block in which a text was found, and what stands around it."""

    block: int
    document: str
    domain: str
    before: str
    match: str
    after: str


def search_blocks(run: Path, wanted: str, most: int) -> Iterator[Passage]:
    """The first blocks of the training text whose text or document's name has `wanted` in it.

    Capital letters count as small ones.
    """
    corpus, pattern, left = open_corpus(run), re.compile(re.escape(wanted), re.IGNORECASE), most
    for name in shard_names(corpus, "train-"):
        for columns in Shard(corpus, name, BLOCKS).batches():
            for row, text in enumerate(columns["text"]):
                document, match = str(columns["document"][row]), pattern.search(text)
                if match is None and pattern.search(document) is None:
                    continue
                yield Passage(
                    int(columns["block"][row]),
                    document,
                    str(columns["domain"][row]),
                    *_around(text, match),
                )
                left -= 1
                if left == 0:
                    return


def _around(text: str, match: re.Match[str] | None) -> tuple[str, str, str]:
    """What stands before, in and after a match; the beginning of a text without one."""
    if match is None:
        return text[: 2 * _EXCERPT], "", ""
    at, end = match.span()
    return text[max(at - _EXCERPT, 0) : at], text[at:end], text[end : end + _EXCERPT]


def grouped(documents: Sequence[DocumentWins], most: int) -> list[list[DocumentWins]]:
    """Documents as at most `most` groups of neighbours, of one size but for the last.

    >>> none = np.zeros(1)
    >>> five = [DocumentWins(str(n), "prose", n, 1, 1, none) for n in range(5)]
    >>> [[one.name for one in group] for group in grouped(five, 3)]
    [['0', '1'], ['2', '3'], ['4']]
    """
    size = max(-(-len(documents) // most), 1)
    return [list(documents[n : n + size]) for n in range(0, len(documents), size)]
