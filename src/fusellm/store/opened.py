"""A source's distributions opened for programs: `fusellm.open_store`.

A store is a folder, `runs/x/externalize/<source>`, and needs nothing outside of it.

T tokens of one block, T − 1 positions that predict, or of a conversation as many as are learnt; K
entries kept at them in all.
"""

import operator
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.arrays.read_block import Distribution as Distribution
from fusellm.arrays.read_block import StoredBlock as StoredBlock
from fusellm.arrays.tokens import Tokens
from fusellm.errors import StoreError
from fusellm.store.externalized import (
    PREDICTED,
    TARGET,
    kept_of,
    layout_of,
    positions_of,
    tokens_of,
)
from fusellm.store.facts import StoreFacts, facts_of
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.text_table import few

if TYPE_CHECKING:
    from fusellm.tokens.encode import Encoder

KIND = "distributions"
_OPEN_SHARDS = 8
_DECODED_BATCHES = 2


class _Batch:
    """A decoded record batch."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.numbers: np.ndarray = columns["block"]
        self._usable: np.ndarray = columns["read"]
        self._ids: Ragged = columns["ids"]
        self._tokens: Tokens = tokens_of(columns)
        self._kept: Kept = kept_of(columns)
        self._predicted: Ragged | None = columns.get(PREDICTED)
        self._positions = offsets_of(positions_of(columns))

    def block(self, row: int, reasons: dict[int, str]) -> StoredBlock:
        """One block; its arrays are copies, so that it does not hold the whole batch."""
        tokens, number = self._tokens, int(self.numbers[row])
        usable = bool(self._usable[row])
        ids = self._ids.values[self._ids.offsets[row] : self._ids.offsets[row + 1]]
        ends = tokens.ends[tokens.offsets[row] : tokens.offsets[row + 1]].copy()
        kept = self._of(slice(*self._positions[row : row + 2]))
        reason = None if usable else reasons.get(number, "it was not read")
        places = None
        if self._predicted is not None:
            own = self._predicted.offsets[row : row + 2]
            places = np.flatnonzero(self._predicted.values[own[0] : own[1]]) - 1
        return StoredBlock(number, usable, reason, ids.astype(np.int64), ends, kept, places)

    def _of(self, positions: slice) -> Kept:
        kept = self._kept
        offsets = kept.offsets[positions.start : positions.stop + 1]
        entries = slice(offsets[0], offsets[-1])
        return Kept(
            offsets - offsets[0],
            kept.ids[entries].copy(),
            kept.log_probs[entries].copy(),
            kept.counts[entries].copy(),
            kept.tail[positions].copy(),
            kept.true_log_prob[positions].copy(),
        )


class DistributionStore:
    """A source's distributions, opened for reading.

    `len(store)` is the number of blocks; iterating gives them in order and holds a record batch
    (64 blocks) at a time; `store[number]` reads one record batch. Each record batch is verified
    before anything of it is given out. A store that is unfinished gives what is finished.
    """

    def __init__(self, folder: StageFolder) -> None:
        """Open a folder whose kind is known; programs call `open_store`."""
        self.path = folder.path
        self.facts: StoreFacts = facts_of(folder)
        self._folder, self._layout = folder, layout_of(folder)
        self._names = shard_names(folder)
        self._numbers: list[tuple[int, int]] = [
            tuple(folder.shards[name]["counts"]["numbers"]) for name in self._names
        ]
        self._reasons = {entry.block: entry.reason for entry in self.facts.aside}
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._opened)
        self._batch = lru_cache(maxsize=_DECODED_BATCHES)(self._decoded)

    def __len__(self) -> int:
        return self.facts.blocks

    def __repr__(self) -> str:
        facts = self.facts
        state = "" if facts.complete else ", unfinished"
        return f"<distributions of {facts.model!r}, {facts.blocks:,} blocks, {facts.scheme}{state}>"

    @property
    def numbers(self) -> list[range]:
        """Numbers of the blocks that are there; one range where none is missing between."""
        ranges: list[range] = []
        for first, after in self._numbers:
            if ranges and ranges[-1].stop == first:
                ranges[-1] = range(ranges[-1].start, after)
            else:
                ranges.append(range(first, after))
        return ranges

    def __iter__(self) -> Iterator[StoredBlock]:
        """All blocks in order.

        Raises:
            StoreError: a shard is missing or damaged; blocks before it have been given out.
        """
        for name in self._names:
            for n in range(self._shard(name).record_batches):
                batch = self._batch(name, n)
                for row in range(len(batch.numbers)):
                    yield batch.block(row, self._reasons)

    def __getitem__(self, number: int) -> StoredBlock:
        """The block of this number.

        Raises:
            StoreError: there is no such block, or its record batch is missing or damaged.
        """
        number = operator.index(number)
        place = bisect_right(self._numbers, number, key=lambda pair: pair[0]) - 1
        if place < 0 or number >= self._numbers[place][1]:
            raise StoreError(self._no_block(number))
        shard = self._shard(self._names[place])
        row = number - self._numbers[place][0]
        n, row = shard.place(row)
        batch = self._batch(self._names[place], n)
        assert batch.numbers[row] == number, "blocks of a shard follow one another"
        return batch.block(row, self._reasons)

    def bytes_per_token(self, batches: int = 4) -> dict[str, float]:
        """What each column takes on disk, in bytes per token; measured on some record batches.

        Raises:
            StoreError: one of these is missing or damaged.
        """
        sums: dict[str, int] = {}
        tokens = 0
        for name in self._names[:: max(1, len(self._names) // batches)][:batches]:
            shard = self._shard(name)
            n = shard.record_batches // 2
            tokens += len(shard.columns(n)["ids"].values)
            for column, size in shard.column_bytes(n).items():
                sums[column] = sums.get(column, 0) + size
        return {column: size / max(tokens, 1) for column, size in sums.items()}

    def as_dict(self) -> dict[str, Any]:
        """What `fusellm store info --json` says; `fault` is what hinders reading the store."""
        sizes: dict[str, float] = {}
        fault = None
        if missing := self.missing():
            lacking = (
                f"{len(missing)} of {self.facts.shards} shards are missing or not of their size"
            )
            fault = f"{lacking}; `fusellm store verify {self.path}` names them"
        else:
            try:
                sizes = self.bytes_per_token()
            except StoreError as error:
                fault = str(error)
        numbers = [[run.start, run.stop] for run in self.numbers]
        own = {"path": str(self.path), "numbers": numbers, "bytes_per_token": sizes, "fault": fault}
        return asdict(self.facts) | own

    def missing(self) -> list[str]:
        """Shards of the manifest that are not there or not of their size; their content is not
        verified."""
        absent = []
        for name in self._names:
            try:
                self._folder.sized_file(name)
            except StoreError:
                absent.append(name)
        return absent

    def _no_block(self, number: int) -> str:
        there = few([f"{run.start:,} to {run.stop - 1:,}" for run in self.numbers], 4)
        state = "" if self.facts.complete else " so far"
        return f"there is no block {number}: {self.path} has {there or 'none'}{state}"

    def _opened(self, name: str) -> Shard:
        return Shard(self._folder, name, self._layout, cached_batches=1)

    def _decoded(self, name: str, n: int) -> _Batch:
        # A whole batch always, so that a block is the same to the last bit however it is asked for.
        return _Batch(self._shard(name).columns(n))


def open_store(path: str | os.PathLike[str]) -> DistributionStore:
    """Open a source's distributions.

    Args:
        path: folder of one source, `runs/<name>/externalize/<source>`, wherever it has been moved.

    Raises:
        StoreError: the folder is missing, damaged, of a newer format, or holds something else,
            which is then named.

    Example::

        store = fusellm.open_store("runs/demo/externalize/python")
        for block in store:
            if block.usable:
                nats = -block.kept.true_log_prob.sum()
        store[17].at(3).masses
    """
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).exists():
        raise StoreError(_not_a_stage(folder))
    opened = StageFolder(folder)
    if opened.about.get("kind") != KIND:
        raise StoreError(_another_kind(opened))
    return DistributionStore(opened)


def block_as_dict(
    block: StoredBlock,
    position: int | None = None,
    limit: int | None = None,
    encoder: "Encoder | None" = None,
) -> dict[str, Any]:
    """A block as JSON has it: a line of `fusellm store cat --json`.

    Args:
        position: only this one.
        limit: only so many positions.
        encoder: the source's tokenizer, to give tokens beside their ids.

    Raises:
        StoreError: there is no such position.
    """
    positions = []
    for at in map(block.at, range(block.positions)[:limit] if position is None else [position]):
        row: dict[str, Any] = {
            "position": at.position,
            "true_id": at.true_id,
            "true_log_prob": round(at.true_log_prob, 7),
            "ids": at.ids.tolist(),
            "log_probs": at.log_probs.astype(float).round(7).tolist(),
        }
        own = {"counts": at.counts.tolist()} if len(at.counts) else {}
        positions.append(row | own | {"tail": float(f"{at.tail:.7g}")})
    spelled = {} if encoder is None else {"tokens": [encoder.spelled(int(i)) for i in block.ids]}
    known = {"block": block.number, "usable": block.usable, "reason": block.reason}
    tokens = {"ids": block.ids.tolist(), "ends": block.ends.tolist()}
    return known | tokens | spelled | {"positions": positions}


def stores_of(run: Path) -> list[Path]:
    """Folders in a run that hold, or will hold, a source's distributions."""
    manifests = sorted((run / "externalize").glob(f"*/{MANIFEST}"))
    return [path.parent for path in manifests if path.parent.name != TARGET]


def _not_a_stage(path: Path) -> str:
    if not path.exists():
        return f"there is no folder {path}; check the path"
    if not path.is_dir():
        return f"{path} is a file; give the folder of a source, runs/<name>/externalize/<source>"
    run = path.parent if path.name == "externalize" else path
    stores = [str(store) for store in stores_of(run)]
    if stores:
        return f"{path} holds several stages; its distributions are in {', '.join(stores)}"
    if (path / "config.json").exists():
        return f"{path} is a model, not its distributions; `fusellm externalize` makes these"
    return (
        f"{path} is not a distribution store: it has no {MANIFEST}; give the folder of a source, "
        "runs/<name>/externalize/<source>"
    )


def _another_kind(folder: StageFolder) -> str:
    stage, _, name = folder.identity.stage.partition("/")
    path = folder.path
    if stage == "externalize" and name != TARGET:
        return f"{path} has begun and nothing has been read yet; `fusellm externalize` goes on"
    what = {
        "externalize": "the target's tokens, without distributions",
        "corpus": "a run's corpus",
        "fuse": "a run's fused distributions",
        "train": "a trained model",
        "evaluate": "a run's measurements",
    }.get(stage, f"the stage {folder.identity.stage!r}")
    run = path.parents[1] if stage in ("externalize", "train") else path.parent
    stores = ", ".join(str(store) for store in stores_of(run))
    cure = stores or "runs/<name>/externalize/<source>"
    return f"{path} holds {what}; a source's distributions are in {cure}"
