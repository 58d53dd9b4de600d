"""Fused distributions on disk: one a target position, in parts, each with the source it is of."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.errors import StoreError
from fusellm.store.layout import (
    Batch,
    Layout,
    Wrong,
    all_but_one,
    as_many,
    ascending,
    entries,
    id_type,
    list_field,
    sums_of,
    total,
    within,
    wrong_at,
)
from fusellm.store.manifest import SHARD_SUFFIX, StageFolder
from fusellm.store.tables import Shard, write_table
from fusellm.store.writer import StageWriter

_SETS_SCHEMA = pa.schema([(name, pa.list_(pa.int64())) for name in ("starts", "stops", "ids")])
_SETS = "outcomes-"
_SUM_ERROR = 1e-4
"""How far the masses of a position may be from 1: float32 and many of them."""


def fused_schema(vocabulary: int, outcomes: int) -> pa.Schema:
    """Columns of fused distributions.

    Args:
        vocabulary: of the target.
        outcomes: most that a source has.
    """
    return pa.schema(
        [
            pa.field("block", pa.int64(), nullable=False),
            list_field("ids", id_type(vocabulary)),
            list_field("parts", pa.uint8()),
            list_field("source", pa.int8()),
            list_field("lengths", pa.uint16()),
            list_field("outcomes", id_type(outcomes)),
            list_field("masses", pa.float32()),
            list_field("rest", pa.float32()),
        ]
    )


def fused_layout(vocabulary: int, sets: Sequence[OutcomeSets]) -> Layout:
    """What fused distributions must be.

    Args:
        vocabulary: of the target; ids are below it.
        sets: the outcomes of each source.
    """
    limits = np.array([len(of_source) for of_source in sets])
    every, base = OutcomeSets.concat(sets), offsets_of(limits)

    def outcomes_are_of_their_source(batch: Batch) -> Wrong | None:
        numbers = batch["outcomes"].values
        beyond = numbers >= np.repeat(limits[batch["source"].values], batch["lengths"].values)
        if not beyond.any():
            return None
        at = int(np.argmax(beyond))
        return wrong_at(batch, "outcomes", at, f"its source has no outcome {numbers[at]}")

    def outcomes_with_mass_have_ids(batch: Batch) -> Wrong | None:
        lengths, numbers = batch["lengths"].values, batch["outcomes"].values
        numbered = np.repeat(base[batch["source"].values], lengths) + numbers
        lost = (every.starts == every.stops)[numbered] & (batch["masses"].values > 0)
        if not lost.any():
            return None
        at = int(np.argmax(lost))
        return wrong_at(batch, "outcomes", at, f"{numbers[at]} has mass and no ids")

    def outcomes_are_apart(batch: Batch) -> Wrong | None:
        lengths, numbers = batch["lengths"].values, batch["outcomes"].values
        at = every.overlapping(np.repeat(base[batch["source"].values], lengths) + numbers, lengths)
        if at < 0:
            return None
        return wrong_at(batch, "outcomes", at, f"{numbers[at]} has ids of another of its part")

    rules = (
        within("ids", 0, vocabulary - 1),
        as_many("parts", all_but_one("ids")),
        as_many("source", total("parts")),
        within("source", 0, len(limits) - 1),
        ascending("source", "parts"),
        as_many("lengths", total("parts")),
        as_many("outcomes", total("lengths")),
        outcomes_are_of_their_source,
        outcomes_are_apart,
        as_many("masses", entries("outcomes")),
        within("masses", 0, 1 + _SUM_ERROR),
        outcomes_with_mass_have_ids,
        as_many("rest", total("parts")),
        within("rest", 0, 1 + _SUM_ERROR),
        _masses_add_up,
    )
    return Layout((fused_schema(vocabulary, int(limits.max())),), rules)


def _masses_add_up(batch: Batch) -> Wrong | None:
    parts = batch["parts"].values
    of_part = sums_of(batch["masses"].values, batch["lengths"].values) + batch["rest"].values
    whole = sums_of(of_part, parts)
    far = (np.abs(whole - 1) > _SUM_ERROR) & (parts > 0)
    if not far.any():
        return None
    at = int(np.argmax(far))
    what = f"masses of a position add up to {whole[at]:.4f} with what is in none, and not to 1"
    return wrong_at(batch, "parts", at, what)._replace(column="masses")


def layout_of(folder: StageFolder, vocabulary: int | None = None) -> Layout:
    """What the shards of a run's fused distributions must be, by their sources' outcomes.

    Args:
        vocabulary: tokens of the target's tokenizer, if it is at hand.

    Raises:
        StoreError: the outcomes of a source are missing or damaged.
    """
    names = folder.identity.settings.get("sources")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise StoreError(f"{folder.path} does not say which sources were fused; make it anew")
    sets = [read_sets(folder, name, vocabulary) for name in names]
    tokens = [len(of_source.ids) for of_source in sets]
    if min(tokens) != max(tokens):
        raise StoreError(f"{folder.path} has outcomes of several target tokenizers; make it anew")
    return fused_layout(tokens[0], sets)


def fused_folder(run: Path) -> Path:
    """Folder of a run's fused distributions."""
    return run / "fuse"


def open_fused(run: Path) -> StageFolder:
    """A run's finished fused distributions.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    return StageFolder(fused_folder(run)).require_complete(f"fusellm fuse {run}")


def is_sets(name: str) -> bool:
    """Whether a shard has a source's outcomes as sets of target ids."""
    return name.startswith(_SETS)


def sets_layout(vocabulary: int | None = None) -> Layout:
    """What a source's outcomes must be: stretches of an order of all target ids.

    Args:
        vocabulary: of the target; None where it is not known.
    """

    def stretches(batch: Batch) -> Wrong | None:
        starts, stops, ids = (batch[name].values for name in ("starts", "stops", "ids"))
        size = len(ids) if vocabulary is None else vocabulary
        if len(starts) != len(stops) or (starts < 0).any() or (stops < starts).any():
            return Wrong(0, "stops", "they are not as many as starts, each behind its own")
        if (stops > size).any():
            return Wrong(0, "stops", f"{int(stops.max())} is beyond the {size:,} ids")
        if not np.array_equal(np.sort(ids), np.arange(size)):
            return Wrong(0, "ids", f"they are not all ids below {size:,}, each once")
        return None

    return Layout((_SETS_SCHEMA,), (stretches,))


def read_sets(folder: StageFolder, source: str, vocabulary: int | None = None) -> OutcomeSets:
    """A source's outcomes.

    Args:
        vocabulary: tokens of the target's tokenizer, if it is at hand.

    Raises:
        StoreError: they are missing or damaged, or of another vocabulary.
    """
    shard = Shard(folder, sets_shard(source), sets_layout(vocabulary))
    if len(shard) != 1:
        raise folder.damaged(sets_shard(source), f"it has {len(shard)} rows, and one belongs")
    row = shard.block(0)
    return OutcomeSets(row["starts"], row["stops"], row["ids"])


def write_sets(folder: StageWriter, source: str, sets: OutcomeSets) -> None:
    """Write a source's outcomes."""
    columns = {"starts": [sets.starts], "stops": [sets.stops], "ids": [sets.ids]}
    write_table(folder, sets_shard(source), columns, _SETS_SCHEMA)


def sets_shard(source: str) -> str:
    """Name of the shard with a source's outcomes."""
    return f"{_SETS}{source}{SHARD_SUFFIX}"
