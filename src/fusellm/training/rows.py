"""The rows that a training reads, from the fused store or the target's tokens, and their order.

Both stores give the same blocks in the same order. A token all of whose bytes are context is read
and not predicted, by neither loss; nor is one that the tokenizer puts before a text, nor of a
conversation what its template and the others say. T positions of a block.

A store that is kept in memory is shuffled as a whole. A larger one is read by windows of record
batches, in a shuffled order, each shuffled in itself, so that each is read about once an epoch.
"""

import sys
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from fusellm.arrays.ragged import offsets_of
from fusellm.errors import ArgumentError, CorpusError, StoreError
from fusellm.store import externalized
from fusellm.store import fused as fused_store
from fusellm.store.blocks import BLOCKS, CONTEXT, CONVERSATION, context_of, text_bytes
from fusellm.store.externalized import (
    PREDICTED,
    TARGET,
    open_externalized,
    require_same_blocks,
    require_text,
)
from fusellm.store.fused import open_fused
from fusellm.store.layout import Layout
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, folder_bytes, shard_names
from fusellm.tokens.context import is_context_token

FILLER = sys.maxsize
"""Number of a row that is read and predicts nothing, where processes have rows left over."""
_OPEN_ROWS = 256  # rows that packing may still add to
_CACHED_WHOLE_BYTES = 256 << 20  # smaller stores are kept in memory once read
_WINDOW_BATCHES = 32  # record batches, of at most 64 blocks each
_KEPT_WINDOWS = 2  # a packed row may end in the window after its own


class TokenContext:
    """Which of the target's tokens are context."""

    def __init__(self, corpus: StageFolder, tokens: StageFolder, names: Sequence[str]) -> None:
        """Open shards of the corpus, and of the target's tokens.

        Raises:
            StoreError: one is missing or damaged.
        """
        layout = externalized.layout_of(tokens)
        self._blocks = [Shard(corpus, name, BLOCKS, None) for name in names]
        self._tokens = [Shard(tokens, name, layout, None) for name in names]

    def of(self, shard: int, row: int) -> np.ndarray:
        """[T] bool of a block; of one that the target cannot tell as bytes, all or nothing."""
        tokens = self._tokens[shard].block(row)
        if PREDICTED in tokens:
            read = tokens["read"]
            return ~tokens[PREDICTED] if read else np.ones(len(tokens["ids"]), dtype=np.bool_)
        block = self._blocks[shard].block(row)
        spans = context_of(block)
        if not tokens["read"]:
            return np.full(len(tokens["ids"]), bool(spans))
        ends = np.cumsum(tokens["bytes"], dtype=np.int64)
        return is_context_token(ends, spans, len(block["text"].encode()))

    def forget(self, shard: int, batch: int) -> None:
        """Keep a record batch no longer."""
        self._blocks[shard].forget(batch)
        self._tokens[shard].forget(batch)

    def predicted(self, first: int) -> np.ndarray:
        """[blocks] tokens of each block that are predicted, from the one of number `first` on.

        Raises:
            StoreError: tokens and texts are not of the same blocks.
        """
        counts = []
        for n, (blocks, tokens) in enumerate(zip(self._blocks, self._tokens, strict=True)):
            require_same_blocks(tokens, blocks)
            for batch in range(blocks.record_batches):
                columns = blocks.columns(batch)
                place = columns["block"], text_bytes(columns)
                require_text(tokens, batch, tokens.columns(batch), *place)
            counts += [int((~self.of(n, row)[first:]).sum()) for row in range(len(blocks))]
            for batch in range(blocks.record_batches):
                self.forget(n, batch)
        return np.array(counts, dtype=np.int64)

    def lengths(self) -> np.ndarray:
        """[blocks] tokens of each block."""
        return np.concatenate([shard.lengths("ids") for shard in self._tokens])


class Blocks(Protocol):
    """Blocks of text as a training reads them, by their numbers.

    Attributes:
        lengths: [blocks] tokens of each.
        predicted: [blocks] of these, those that are predicted.
        windows: [blocks] the window that each is read in.
    """

    lengths: np.ndarray
    predicted: np.ndarray
    windows: np.ndarray

    def block(self, number: int) -> dict[str, Any]:
        """The columns of one block; with `context`, which of its tokens are read only."""


class StoredBlocks:
    """Blocks of a run's stores, of which a large one is never in memory as a whole."""

    def __init__(
        self,
        folder: StageFolder,
        layout: Layout,
        corpus_shards: Sequence[str],
        context: TokenContext | None = None,
        seed: int = 0,
        prefix_tokens: int = 0,
    ) -> None:
        self._shards = [Shard(folder, name, layout, None) for name in corpus_shards]
        self._whole = folder_bytes(folder.path) < _CACHED_WHOLE_BYTES
        self._kept: dict[tuple[int, int], None] = {}  # record batches, the last used last
        self._starts = offsets_of(np.array([len(shard) for shard in self._shards]))
        self.lengths = np.concatenate([shard.lengths("ids") for shard in self._shards])
        self._context, self._prefix_tokens = context, prefix_tokens
        if context is not None and not np.array_equal(context.lengths(), self.lengths):
            raise StoreError(
                f"{folder.path} has blocks of other lengths than the target's tokens; make it anew"
            )
        first = max(prefix_tokens, 1)  # a block's first token is never predicted
        self.predicted = self.lengths - first if context is None else context.predicted(first)
        self.windows = self._drawn_windows(seed)

    def _drawn_windows(self, seed: int) -> np.ndarray:
        """[blocks] the window that each is read in."""
        if self._whole:
            return np.zeros(len(self.lengths), dtype=np.int64)
        batch: list[int] = []
        count = 0
        for shard in self._shards:
            batch += [count + shard.place(row)[0] for row in range(len(shard))]
            count += shard.record_batches
        turn = np.argsort(np.random.default_rng(seed).permutation(count))
        window: np.ndarray = turn[batch] // _WINDOW_BATCHES
        return window

    def block(self, number: int) -> dict[str, Any]:
        """The columns of one block."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[shard])
        self._keep(shard, self._shards[shard].place(row)[0])
        block = self._shards[shard].block(row)
        context = None if self._context is None else self._context.of(shard, row)
        return with_context(block, self._prefix_tokens, context)

    def _keep(self, shard: int, batch: int) -> None:
        """Keep a record batch in memory, and of a large store as many as are read by turns."""
        self._kept.pop((shard, batch), None)
        self._kept[shard, batch] = None
        if self._whole or len(self._kept) <= _KEPT_WINDOWS * _WINDOW_BATCHES:
            return
        shard, batch = next(iter(self._kept))
        del self._kept[shard, batch]
        self._shards[shard].forget(batch)
        if self._context is not None:
            self._context.forget(shard, batch)


def with_context(
    block: dict[str, Any], prefix_tokens: int, context: np.ndarray | None = None
) -> dict[str, Any]:
    """A block with which of its tokens are read only: context, and what is put before each text.

    Args:
        context: [T] bool.
    """
    if context is None and prefix_tokens <= 1:  # a block's first token is never predicted
        return block
    read_only = np.arange(len(block["ids"])) < prefix_tokens
    if context is not None:
        read_only |= context
    return block | {CONTEXT: read_only}


class Rows(Dataset[list[dict[str, Any]]]):
    """Rows of a training batch: each a list of blocks, one or packed.

    Blocks that predict nothing, of one token or all context, are left out.

    Attributes:
        lengths: [blocks] tokens of each block.
        rows: the blocks of each row, by number.
        packed: whether a row may have several.
    """

    def __init__(self, blocks: Blocks, seed: int = 0) -> None:
        self._blocks, self._seed = blocks, seed
        self.lengths, self._windows = blocks.lengths, blocks.windows
        self.rows: list[list[int]] = [[int(n)] for n in np.nonzero(blocks.predicted > 0)[0]]
        self.packed = False

    def windows(self) -> np.ndarray:
        """[rows] the window that each begins in."""
        return self._windows[[row[0] for row in self.rows]]

    def pack(self, row_tokens: int, *, longer_alone: bool = False) -> Self:
        """Put several blocks, in a seeded order, into rows of at most `row_tokens`.

        Each goes into the row, of those last begun, that it fills best.

        Args:
            longer_alone: give a longer block a row of its own, as recipes have it.

        Raises:
            ArgumentError: a block is longer than a row, and is not to have one of its own.
        """
        if not longer_alone:
            self._require_room(row_tokens)
        chance = np.random.default_rng(self._seed)
        blocks = np.array([n for row in self.rows for n in row])
        windows = self._windows[blocks]
        order = np.concatenate([chance.permutation(blocks[of]) for of in _by_window(windows)])
        packed: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (tokens of room, row), ascending
        for n in order.tolist():
            length = int(self.lengths[n])
            place = bisect_left(rooms, (length, 0))
            if place < len(rooms):
                room, row = rooms.pop(place)
            else:
                room, row = row_tokens, len(packed)
                packed.append([])
            packed[row].append(n)
            insort(rooms, (room - length, row))
            if len(rooms) > _OPEN_ROWS:
                rooms.pop(0)
        self.rows, self.packed = packed, True
        return self

    def _require_room(self, row_tokens: int) -> None:
        longest = self.longest_text
        if row_tokens < longest:
            raise ArgumentError(
                f"row_tokens is {row_tokens}, and the longest text has {longest} tokens, for which "
                f"no row has room; give row_tokens={longest} or more, or cut the texts"
            )

    def select(self, indices: Iterable[int]) -> Self:
        """These rows alone, in their order; to hold some of them out."""
        chosen = copy(self)
        chosen.rows = [self.rows[n] for n in indices]
        chosen.__dict__.pop("_shortest", None)
        return chosen

    @property
    def longest_text(self) -> int:
        """Tokens of the longest block of all rows."""
        return int(self.lengths[list(chain.from_iterable(self.rows))].max(initial=0))

    def row_tokens(self) -> list[int]:
        """Tokens of each row, without padding."""
        return [int(self.lengths[row].sum()) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if index == FILLER:
            block = self._blocks.block(self._shortest)
            return [block | {CONTEXT: np.ones(len(block["ids"]), dtype=np.bool_)}]
        return [self._blocks.block(n) for n in self.rows[index]]

    @cached_property
    def _shortest(self) -> int:
        return int(min((n for row in self.rows for n in row), key=lambda n: self.lengths[n]))


def stored_blocks(
    run: Path,
    corpus: StageFolder,
    fused: bool,
    seed: int = 0,
    vocabulary: int | None = None,
    prefix_tokens: int = 0,
) -> StoredBlocks:
    """A run's blocks as its target reads them.

    Args:
        fused: with their fused distributions, or the tokens alone, as the CLM baseline reads them.
        seed: of the windows that a large store is read in.
        vocabulary: tokens of the target's tokenizer, if it is at hand.
        prefix_tokens: that it puts before each block.

    Raises:
        CorpusError: there is nothing to predict.
        StoreError: something is unfinished or damaged.
    """
    if fused:
        folder = open_fused(run)
        layout = fused_store.layout_of(folder, vocabulary)
    else:
        folder = open_externalized(run, TARGET)
        layout = externalized.layout_of(folder, vocabulary)
    names = shard_names(corpus, "train-")
    context = None
    if names and {CONTEXT, CONVERSATION} & set(Shard(corpus, names[0], BLOCKS).schema.names):
        context = TokenContext(corpus, open_externalized(run, TARGET), names)
    blocks = StoredBlocks(folder, layout, names, context, seed, prefix_tokens)
    if not (blocks.predicted > 0).any():
        raise CorpusError(
            f"no block of {corpus.path} has a token to predict: each is one token, or all context; "
            "check context_fields of corpus.documents"
        )
    return blocks


def _by_window(windows: np.ndarray) -> list[np.ndarray]:
    """The indices of each window's entries, ascending, window by window.

    >>> [indices.tolist() for indices in _by_window(np.array([3, 0, 3, 0]))]
    [[1, 3], [0, 2]]
    """
    order = np.argsort(windows, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(windows[order])) + 1)


class RowOrder(Sampler[int]):
    """Rows in an order that is a function of seed and epoch, whichever epoch was read before.

    Several processes take batches in turn. So that each has as many, and none reads a row twice,
    the last ones are filled up with rows that predict nothing.
    """

    def __init__(self, windows: np.ndarray, seed: int, step_rows: int, processes: int = 1) -> None:
        """Order the rows of a training.

        Args:
            windows: [rows] that they are read in.
            step_rows: that all processes read at a time.
        """
        self._rows, self._seed = len(windows), seed
        self._windows = _by_window(windows)
        self._filler = -self._rows % step_rows if processes > 1 else 0
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows + self._filler

    def __iter__(self) -> Iterator[int]:
        yield from self._order(torch.Generator().manual_seed(self._seed + self._epoch))
        yield from [FILLER] * self._filler

    def _order(self, generator: torch.Generator) -> list[int]:
        rows: list[int] = []
        for window in self._shuffled_windows(generator):
            rows += window[torch.randperm(len(window), generator=generator).numpy()].tolist()
        return rows

    def _shuffled_windows(self, generator: torch.Generator) -> list[np.ndarray]:
        if len(self._windows) == 1:
            return self._windows
        order = torch.randperm(len(self._windows), generator=generator).tolist()
        return [self._windows[n] for n in order]


class RowsInOrder(RowOrder):
    """Rows as they come, in each epoch."""

    def _order(self, generator: torch.Generator) -> list[int]:
        return list(range(self._rows))


class RowsOfLikeLength(RowOrder):
    """Rows in a seeded order in which each batch has rows of like length, so that little is padded.

    The batches themselves come in random order, not from long to short.
    """

    def __init__(
        self,
        row_tokens: Sequence[int],
        windows: np.ndarray,
        batch_rows: int,
        seed: int,
        step_rows: int = 1,
        processes: int = 1,
    ) -> None:
        """Order the rows of a training.

        Args:
            windows: [rows] that they are read in.
            batch_rows: of like length.
        """
        super().__init__(windows, seed, step_rows, processes)
        self._row_tokens, self._batch_rows = row_tokens, batch_rows

    def _order(self, generator: torch.Generator) -> list[int]:
        size = self._batch_rows
        rows: list[int] = []
        left_over: list[int] = []
        for window in self._shuffled_windows(generator):
            lengths = [self._row_tokens[row] for row in window.tolist()]
            order = window[get_length_grouped_indices(lengths, size, generator=generator)].tolist()
            whole = len(order) // size
            for batch in torch.randperm(whole, generator=generator).tolist():
                rows += order[batch * size : (batch + 1) * size]
            left_over += order[whole * size :]
        return rows + left_over
