"""Distributions of the sources on disk, and the target's tokens, shard by shard of the corpus.

docs/store-format.md has every column. N positions that predict, K entries in all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.align.ragged import offsets_of
from fusellm.align.tokens import Tokens
from fusellm.fusion.kept import Kept
from fusellm.store.manifest import StageFolder
from fusellm.store.quantized import from_drops, from_steps, to_drops, to_steps, to_sum_one
from fusellm.store.tables import Ragged, id_type, list_field

TARGET = "target"


def tokens_schema(vocabulary: int) -> pa.Schema:
    """Columns of tokens; ids take two bytes where the vocabulary allows."""
    return pa.schema(
        [
            pa.field("block", pa.int64(), nullable=False),
            pa.field("read", pa.bool_(), nullable=False),
            list_field("ids", id_type(vocabulary)),
            list_field("bytes", pa.uint16()),
        ]
    )


def source_schema(vocabulary: int, scheme: str, most: int) -> pa.Schema:
    """Columns of a source.

    Args:
        scheme: "top" or "sampled".
        most: entries that a position can have.
    """
    count = pa.uint8() if most < 256 else pa.uint16()
    if scheme == "sampled":
        own = [list_field("kept_ids", id_type(vocabulary)), list_field("counts", pa.uint8())]
    else:
        own = [
            list_field("kept_ids", id_type(vocabulary)),
            list_field("drops", pa.uint16()),
            list_field("tail", pa.uint16()),
        ]
    fields = [*tokens_schema(vocabulary), list_field("kept", count), *own]
    return pa.schema([*fields, list_field("true_log_prob", pa.uint16())])


def token_columns(
    blocks: np.ndarray, read: np.ndarray, ids: Ragged, ends: Ragged
) -> dict[str, Any]:
    """Columns of `tokens_schema`.

    Args:
        blocks: [blocks] number of each.
        read: [blocks] bool, whether the walk covered it; `ends` is empty where not.
        ends: byte offset where each token ends.
    """
    starts = ends.offsets[:-1][np.diff(ends.offsets) > 0]
    length = np.diff(ends.values, prepend=0)
    length[starts] = ends.values[starts]
    return {"block": blocks, "read": read, "ids": ids, "bytes": Ragged(ends.offsets, length)}


def kept_columns(kept: Kept, blocks: np.ndarray, sampled: bool) -> dict[str, Ragged]:
    """Columns that `source_schema` adds.

    Args:
        kept: of all positions of all blocks, in their order.
        blocks: [blocks+1] where each block's positions are.
        sampled: whether they are draws.
    """
    entries = kept.offsets[blocks]
    of_position = {
        "kept": np.diff(kept.offsets),
        "true_log_prob": to_steps(kept.true_log_prob),
    }
    of_entry = {"kept_ids": kept.ids}
    if sampled:
        of_entry["counts"] = kept.counts
    else:
        of_entry["drops"] = to_drops(kept.log_probs, kept.offsets)
        with np.errstate(divide="ignore"):
            of_position["tail"] = to_steps(np.log(kept.tail.astype(np.float64)))
    return {name: Ragged(blocks, values) for name, values in of_position.items()} | {
        name: Ragged(entries, values) for name, values in of_entry.items()
    }


def externalized_folder(run: Path, name: str) -> Path:
    """Folder of one source, or of the target's tokens."""
    return run / "externalize" / name


def open_externalized(run: Path, name: str) -> StageFolder:
    """One source's finished distributions, or the target's tokens.

    Raises:
        StoreError: they are missing, unfinished or damaged.
    """
    return StageFolder(externalized_folder(run, name)).require_complete(
        f"fusellm externalize {run}"
    )


def tokens_of(columns: Mapping[str, Any], prefix_tokens: int = 0) -> Tokens:
    """Tokens with boundaries, of the blocks of a record batch.

    A block that could not be read has none.

    Args:
        columns: as `Shard.batches` gives them.
        prefix_tokens: that the model's tokenizer puts before each block.
    """
    ids, length = columns["ids"], columns["bytes"]
    there = np.repeat(columns["read"].astype(np.bool_), np.diff(ids.offsets))
    sums = np.concatenate([[0], np.cumsum(length.values, dtype=np.int64)])
    ends = sums[1:] - np.repeat(sums[length.offsets[:-1]], np.diff(length.offsets))
    return Tokens(length.offsets, ids.values[there].astype(np.int64), ends, prefix_tokens)


def kept_of(columns: Mapping[str, Any]) -> Kept:
    """A source's distributions at all positions that predict, of the blocks of a record batch."""
    offsets = offsets_of(columns["kept"].values.astype(np.int64))
    true_log_prob = from_steps(columns["true_log_prob"].values)
    ids = columns["kept_ids"].values.astype(np.int64)
    nothing = np.zeros(0, dtype=np.float32)
    if "counts" in columns:
        tail = np.zeros(len(true_log_prob), dtype=np.float32)
        return Kept(offsets, ids, nothing, columns["counts"].values, tail, true_log_prob)
    log_probs, tail = to_sum_one(
        from_drops(columns["drops"].values, offsets),
        np.exp(from_steps(columns["tail"].values)),
        offsets,
    )
    return Kept(offsets, ids, log_probs, nothing.astype(np.uint8), tail, true_log_prob)
