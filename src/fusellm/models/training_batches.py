"""Training batches from the fused store, and from the target's tokens for the CLM baseline.

Both give the same blocks in the same order. A token all of whose bytes are context is read and not
predicted, by neither loss. B rows, T positions, N positions that predict.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from fusellm.align.ragged import offsets_of, take_rows
from fusellm.errors import CorpusError
from fusellm.models.objective_forward import IGNORED
from fusellm.store.blocks import CONTEXT, context_of
from fusellm.store.externalized import TARGET, open_externalized
from fusellm.store.fused import open_fused, read_members
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, folder_bytes, shard_names
from fusellm.tokens.context import context_tokens

FILLER = -1
"""Number of a row that is read and predicts nothing, where processes have rows left over."""
_OPEN_ROWS = 256  # rows that packing may still add to
_CACHED_WHOLE_BYTES = 256 << 20  # smaller stores are kept in memory once read


class TokenContext:
    """Which of the target's tokens are context."""

    def __init__(self, corpus: StageFolder, tokens: StageFolder, names: Sequence[str]) -> None:
        """Open shards of the corpus, and of the target's tokens."""
        self._blocks = [Shard(corpus, name) for name in names]
        self._tokens = [Shard(tokens, name) for name in names]

    def of(self, shard: int, row: int) -> np.ndarray:
        """[T] bool of a block; of one that the target cannot tell as bytes, all or nothing."""
        block, tokens = self._blocks[shard].block(row), self._tokens[shard].block(row)
        spans = context_of(block)
        if not tokens["read"]:
            return np.full(len(tokens["ids"]), bool(spans))
        ends = np.cumsum(tokens["bytes"], dtype=np.int64)
        return context_tokens(ends, spans, len(block["text"].encode()))

    def predicted(self) -> np.ndarray:
        """[blocks] tokens of each block that are predicted."""
        places = ((n, row) for n, shard in enumerate(self._blocks) for row in range(len(shard)))
        return np.array([int((~self.of(*place)[1:]).sum()) for place in places], dtype=np.int64)


class Rows(Dataset[list[dict[str, Any]]]):
    """Rows of a training batch: each a list of blocks, one or packed.

    Blocks that predict nothing, of one token or all context, are left out.
    """

    def __init__(
        self,
        folder: StageFolder,
        corpus_shards: Sequence[str],
        context: TokenContext | None = None,
    ) -> None:
        keep_all = folder_bytes(folder.path) < _CACHED_WHOLE_BYTES
        self._shards = [Shard(folder, name, None if keep_all else 4) for name in corpus_shards]
        self._starts = offsets_of(np.array([len(shard) for shard in self._shards]))
        self.lengths = np.concatenate([shard.lengths("ids") for shard in self._shards])
        self._context = context
        predicted = self.lengths - 1 if context is None else context.predicted()
        self.rows: list[list[int]] = [[int(n)] for n in np.nonzero(predicted > 0)[0]]

    def pack(self, row_tokens: int, seed: int) -> "Rows":
        """Put several blocks, in a seeded order, into rows of at most `row_tokens`.

        Each goes into the row, of those last begun, that it fills best. A longer block has a row
        of its own.
        """
        order = np.random.default_rng(seed).permutation([row[0] for row in self.rows])
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
        self.rows = packed
        return self

    def row_tokens(self) -> list[int]:
        """Tokens of each row, without padding."""
        return [int(self.lengths[row].sum()) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if index == FILLER:
            block = self._block(min(self.rows, key=lambda row: int(self.lengths[row].sum()))[0])
            return [block | {CONTEXT: np.ones(len(block["ids"]), dtype=np.bool_)}]
        return [self._block(n) for n in self.rows[index]]

    def _block(self, number: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = number - int(self._starts[shard])
        block = self._shards[shard].block(row)
        return block if self._context is None else block | {CONTEXT: self._context.of(shard, row)}


def clm_rows(run: Path, corpus: StageFolder) -> Rows:
    """Rows for the CLM baseline.

    Raises:
        CorpusError: there is nothing to predict.
    """
    return _rows(open_externalized(run, TARGET), run, corpus)


def fused_rows(run: Path, corpus: StageFolder) -> Rows:
    """Rows with fused distributions.

    Raises:
        CorpusError: there is nothing to predict.
    """
    return _rows(open_fused(run), run, corpus)


def _rows(folder: StageFolder, run: Path, corpus: StageFolder) -> Rows:
    names = shard_names(corpus, "train-")
    context = None
    if names and CONTEXT in Shard(corpus, names[0]).schema.names:
        context = TokenContext(corpus, open_externalized(run, TARGET), names)
    rows = Rows(folder, names, context)
    if not len(rows):
        raise CorpusError(
            f"no block of {corpus.path} has a token to predict: each is one token, or all context; "
            "check context_fields of corpus.documents"
        )
    return rows


def _predicted(block: Mapping[str, Any]) -> np.ndarray:
    """[T-1] bool, whether each token but the first is predicted."""
    context = block.get(CONTEXT)
    return np.ones(len(block["ids"]) - 1, dtype=np.bool_) if context is None else ~context[1:]


class RowOrder(Sampler[int]):
    """Rows in an order that is a function of seed and epoch, whichever epoch was read before.

    Several processes take batches in turn. So that each has as many, and none reads a row twice,
    the last ones are filled up with rows that predict nothing.
    """

    def __init__(self, rows: int, seed: int, step_rows: int, processes: int = 1) -> None:
        """Order the rows of a training.

        Args:
            step_rows: that all processes read at a time.
        """
        self._rows, self._seed = rows, seed
        self._filler = -rows % step_rows if processes > 1 else 0
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
        found: list[int] = torch.randperm(self._rows, generator=generator).tolist()
        return found


class RowsOfLikeLength(RowOrder):
    """Rows in a seeded order in which each batch has rows of like length, so that little is padded.

    The batches themselves come in random order, not from long to short.
    """

    def __init__(
        self,
        row_tokens: Sequence[int],
        batch_rows: int,
        seed: int,
        step_rows: int = 1,
        processes: int = 1,
    ) -> None:
        """Order the rows of a training.

        Args:
            batch_rows: of like length.
        """
        super().__init__(len(row_tokens), seed, step_rows, processes)
        self._row_tokens, self._batch_rows = row_tokens, batch_rows

    def _order(self, generator: torch.Generator) -> list[int]:
        size = self._batch_rows
        order = get_length_grouped_indices(self._row_tokens, size, generator=generator)
        whole = len(order) // size
        batches = torch.randperm(whole, generator=generator).tolist()
        shuffled: list[int] = [
            row for batch in batches for row in order[batch * size : (batch + 1) * size]
        ]
        shuffled += order[whole * size :]
        return shuffled


class OutcomeTable:
    """The outcomes of all sources as sets of target ids, in one numbering."""

    def __init__(
        self,
        folder: StageFolder,
        sources: Sequence[str],
        renormalize: bool,
        temperature: float = 1.0,
    ) -> None:
        """Read the sets.

        Args:
            renormalize: whether what was not kept is scaled away.
            temperature: by which renormalized distributions are flattened.
        """
        tables = [read_members(folder, source) for source in sources]
        self._base = offsets_of(np.array([len(offsets) - 1 for offsets, _ in tables]))
        self._offsets = offsets_of(np.concatenate([np.diff(offsets) for offsets, _ in tables]))
        self._members = np.concatenate([members for _, members in tables])
        self._renormalize, self._temperature = renormalize, temperature

    def outcomes(
        self, blocks: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """What the fused store says of the predicted positions of the blocks, in order.

        Returns:
            (the fields of `Outcomes`, [N] float64 mass that is kept at each position)
        """

        def column(name: str, kind: type[np.generic]) -> np.ndarray:
            return np.concatenate([block[name] for block in blocks]).astype(kind)

        parts, lengths = column("parts", np.int64), column("lengths", np.int64)
        source, outcome = column("source", np.int64), column("outcomes", np.int64)
        mass, rest = column("masses", np.float64), column("rest", np.float64)
        wanted = np.concatenate([_predicted(block) for block in blocks])
        if not wanted.all():
            of_part = np.repeat(wanted, parts)
            of_outcome = np.repeat(of_part, lengths)
            outcome, mass = outcome[of_outcome], mass[of_outcome]
            source, rest, lengths = source[of_part], rest[of_part], lengths[of_part]
            parts = parts[wanted]
        part = np.repeat(np.arange(len(lengths)), lengths)
        position = np.repeat(np.arange(len(parts)), parts)
        part_mass = np.bincount(part, weights=mass, minlength=len(lengths))
        kept = np.bincount(position, weights=part_mass, minlength=len(parts))
        if self._renormalize:
            mass = flattened(mass, part, part_mass + rest, self._temperature)
            rest = np.zeros_like(rest)
        entries, place = take_rows(self._offsets, self._base[source[part]] + outcome)
        fields = {
            "present": kept > 0,
            "position": position,
            "rest": rest.astype(np.float32),
            "part": part,
            "mass": mass.astype(np.float32),
            "member_outcome": place,
            "member_id": self._members[entries],
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in fields.items()}
        return tensors, kept


def flattened(
    mass: np.ndarray, part: np.ndarray, of_part: np.ndarray, temperature: float
) -> np.ndarray:
    """[M] masses of each part, to the power of 1 / temperature, scaled to sum to `of_part`.

    Args:
        mass: [M] of outcomes.
        part: [M] the part of each, ascending.
        of_part: [R] what the masses of a part are to sum to.

    >>> flattened(np.array([0.4, 0.1]), np.array([0, 0]), np.array([1.0]), 1.0).round(3).tolist()
    [0.8, 0.2]
    >>> flattened(np.array([0.4, 0.1]), np.array([0, 0]), np.array([1.0]), 2.0).round(3).tolist()
    [0.667, 0.333]
    """
    if temperature != 1.0:
        mass = mass ** (1 / temperature)
    sums = np.bincount(part, weights=mass, minlength=len(of_part))
    scaled: np.ndarray = mass * (of_part / np.where(sums > 0, sums, 1.0))[part]
    return scaled


@dataclass(frozen=True)
class BatchCounts:
    """What a batch holds, known where it is made, so that no device is asked.

    Attributes:
        blocks: numbers of its blocks, within the part train.
        tokens: without padding.
        predicted: tokens that are predicted.
        fused: of these, those with a fused distribution.
        kept_mass: sum over these of the mass that the fused store has kept.
    """

    blocks: list[int]
    tokens: int
    predicted: int
    fused: int = 0
    kept_mass: float = 0.0


class Collator:
    """Rows of blocks to a batch.

    Padded rows have an attention mask; packed rows have positions that begin anew with each
    block, by which transformers keeps the blocks apart.
    """

    def __init__(self, table: OutcomeTable | None, packed: bool) -> None:
        self._table, self._packed = table, packed

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The inputs of the objective's forward, and "counts", a `BatchCounts`."""
        longest = max(sum(len(block["ids"]) for block in row) for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        positions = np.tile(np.arange(longest), (len(rows), 1))
        for r, row in enumerate(rows):
            start = 0
            for block in row:
                stop = start + len(block["ids"])
                ids[r, start:stop] = block["ids"]
                labels[r, start + 1 : stop] = np.where(
                    _predicted(block), ids[r, start + 1 : stop], IGNORED
                )
                mask[r, start:stop] = 1
                positions[r, start:] = np.arange(longest - start)
                start = stop
            positions[r, start:] = np.arange(longest - start)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **(
                {"position_ids": torch.from_numpy(positions)}
                if self._packed
                else {"attention_mask": torch.from_numpy(mask)}
            ),
        }
        blocks = [block for row in rows for block in row]
        real = [block for block in blocks if _predicted(block).any()]
        numbers = [int(block["block"]) for block in real]
        tokens = sum(len(block["ids"]) for block in real)
        counts = BatchCounts(numbers, tokens, int((labels != IGNORED).sum()))
        if self._table is not None:
            batch["outcomes"], kept = self._table.outcomes(blocks)
            counts = replace(counts, fused=int((kept > 0).sum()), kept_mass=float(kept.sum()))
        batch["counts"] = counts
        return batch
