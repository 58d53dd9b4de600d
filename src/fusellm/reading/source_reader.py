"""A source's model reading blocks: tokens and distributions of a shard.

On a GPU the host finishes a batch while the device computes the next one.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of, take_rows
from fusellm.config import ExternalizeSettings
from fusellm.models.heads import head_of
from fusellm.reading.batches import BatchLimit, read_blocks
from fusellm.reading.selection import Selected, Selector, kept_of_host, shifts
from fusellm.tokens.encode import Encoded

_IN_FLIGHT = 2  # batches whose copies the host has not taken yet


@dataclass(frozen=True)
class Read:
    """Blocks as a source has read them.

    Attributes:
        usable: [blocks] bool, whether the block was read and all its distributions are finite.
        kept: of all positions of the usable blocks, in the order of the blocks.
        position_offsets: [blocks+1] where each block's positions are.
        not_finite: indices of blocks with NaN or infinity.
    """

    usable: np.ndarray
    kept: Kept
    position_offsets: np.ndarray
    not_finite: list[int]


class SourceReader:
    """A loaded model, and what is kept of its distributions."""

    def __init__(
        self, model: PreTrainedModel, vocabulary: int, settings: ExternalizeSettings, seed: int
    ) -> None:
        """`vocabulary`: tokens of its tokenizer; `seed`: of the draws."""
        self._model, self._settings, self._seed = model, settings, seed
        self._limit = BatchLimit()
        self._selector = Selector(head_of(model), vocabulary, settings)

    def read(
        self,
        texts: Sequence[str],
        encoded: Sequence[Encoded],
        advance: Callable[[int], object] = lambda blocks: None,
    ) -> Read:
        """Read the blocks of a shard.

        Args:
            texts: of each block; its draws are seeded by it.
            advance: is told how many blocks more have been read.
        """
        steps = self.steps(texts, encoded)
        while True:
            try:
                advance(next(steps))
            except StopIteration as end:
                read: Read = end.value
                return read

    def steps(self, texts: Sequence[str], encoded: Sequence[Encoded]) -> Generator[int, None, Read]:
        """Read as `read` does, batch by batch.

        Yields:
            How many blocks more have been read.
        """
        readable = [block.ids if block.ends is not None else block.ids[:0] for block in encoded]

        def select(batch: list[int], hidden: torch.Tensor, true_ids: torch.Tensor) -> _Copy:
            seeds = (_seed(self._seed, texts[n]) for n in batch)
            asked = [_asked(encoded[n]) for n in batch]
            shift = shifts(seeds, [int(one.sum()) for one in asked]).to(hidden.device)
            if any(encoded[n].predicted is not None for n in batch):
                at = torch.from_numpy(np.flatnonzero(np.concatenate(asked)))
                hidden, true_ids = hidden[at.to(hidden.device)], true_ids[at.to(true_ids.device)]
            return _Copy(self._selector.select(hidden, true_ids, shift))

        budget = self._settings.batch_tokens
        copies = read_blocks(self._model, readable, budget, select, self._limit)
        batches: list[tuple[list[int], Kept]] = []
        for batch, copy in _behind(copies):
            batches.append((batch, kept_of_host(copy.take(), self._settings)))
            yield len(batch)
        yield len(texts) - sum(len(batch) for batch, _ in batches)
        return _in_order(batches, encoded)


def _asked(block: Encoded) -> np.ndarray:
    """[T − 1] bool, at which positions of a block a distribution is kept."""
    if block.predicted is None:
        return np.ones(max(len(block.ids) - 1, 0), dtype=np.bool_)
    return block.predicted[1:]


def _behind(
    copies: Iterator[tuple[list[int], "_Copy"]],
) -> Iterator[tuple[list[int], "_Copy"]]:
    """Batches, each after the device was given the next one to compute."""
    waiting: deque[tuple[list[int], _Copy]] = deque()
    for item in copies:
        waiting.append(item)
        if len(waiting) >= _IN_FLIGHT or not item[1].on_its_way:
            yield waiting.popleft()
    yield from waiting


def _seed(seed: int, text: str) -> int:
    """A block's own seed, from its text: the same block gives the same draws anywhere."""
    data = f"{seed}\n{text}".encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


class _Copy:
    """A selection on its way to the host."""

    def __init__(self, selected: Selected) -> None:
        self.on_its_way = selected.ids.is_cuda
        self._host = selected.to_host()
        self._event = torch.cuda.Event() if self.on_its_way else None
        if self._event is not None:
            self._event.record()

    def take(self) -> Selected:
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _in_order(batches: list[tuple[list[int], Kept]], encoded: Sequence[Encoded]) -> Read:
    """Batches joined, in the order of the blocks, without those that are not finite."""
    lengths = np.array([int(_asked(b).sum()) if b.ends is not None else 0 for b in encoded])
    usable = np.array([block.ends is not None for block in encoded], dtype=np.bool_)
    read = [n for batch, _ in batches for n in batch]
    joined = Kept.concat([kept for _, kept in batches])
    offsets = offsets_of(lengths[read]) if read else np.zeros(1, dtype=np.int64)
    true = np.append(joined.true_log_prob, 0.0)
    finite = np.logical_and.reduceat(np.isfinite(true), offsets)[:-1]
    not_finite = sorted(n for n, good in zip(read, finite, strict=True) if not good)
    usable[not_finite] = False
    lengths[~usable] = 0
    place = {n: row for row, n in enumerate(read)}
    rows = np.array([place[n] for n in np.nonzero(lengths)[0].tolist()], dtype=np.int64)
    positions, _ = take_rows(offsets, rows)
    return Read(usable, joined.take(positions), offsets_of(lengths), not_finite)
