"""Distributions of the sources on disk, and the target's tokens, shard by shard of the corpus.

docs/store-format.md has every column. N positions that predict, K entries in all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.arrays.tokens import Tokens
from fusellm.errors import StoreError
from fusellm.store.facts import about_of, vocabulary_of
from fusellm.store.layout import (
    Batch,
    Layout,
    Rule,
    Wrong,
    all_but_one,
    as_many,
    ascending,
    entries,
    id_type,
    list_field,
    only_where,
    sums_of,
    total,
    within,
    wrong_at,
)
from fusellm.store.manifest import StageFolder
from fusellm.store.quantized import (
    ERROR_NATS,
    from_drops,
    from_steps,
    probabilities,
    steps_of,
    to_drops,
    to_steps,
    to_sum_one,
)
from fusellm.store.tables import Shard

TARGET, PREDICTED = "target", "predicted"
_MOST_IDS = 2**32


def tokens_schema(vocabulary: int, chat: bool = False) -> pa.Schema:
    """Columns of tokens; ids take two bytes where the vocabulary allows.

    Args:
        chat: of conversations, of whose tokens some are predicted.
    """
    fields = [
        pa.field("block", pa.int64(), nullable=False),
        pa.field("read", pa.bool_(), nullable=False),
        list_field("ids", id_type(vocabulary)),
        list_field("bytes", pa.uint16()),
    ]
    return pa.schema([*fields, *([list_field(PREDICTED, pa.bool_())] if chat else [])])


def source_schema(vocabulary: int, scheme: str, most: int, chat: bool = False) -> pa.Schema:
    """Columns of a source.

    Args:
        scheme: "top" or "sampled".
        most: entries that a position can have.
        chat: of conversations.
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
    fields = [*tokens_schema(vocabulary, chat), list_field("kept", count), *own]
    return pa.schema([*fields, list_field("true_log_prob", pa.uint16())])


def tokens_layout(vocabulary: int | None) -> Layout:
    """What tokens must be.

    Args:
        vocabulary: ids are below it; None where it is not known, and they may be any.
    """
    if vocabulary is None:
        sizes = (1, _MOST_IDS)
        any_ids = tuple(tokens_schema(size, chat) for size in sizes for chat in (False, True))
        return Layout(any_ids, _token_rules(_MOST_IDS))
    schemas = tokens_schema(vocabulary), tokens_schema(vocabulary, chat=True)
    return Layout(schemas, _token_rules(vocabulary))


def _token_rules(vocabulary: int) -> tuple[Rule, ...]:
    return (
        within("ids", 0, vocabulary - 1),
        as_many("bytes", only_where("read", entries("ids"))),
        _prediction_follows_reading,
    )


def _prediction_follows_reading(batch: Batch) -> Wrong | None:
    """Of a conversation each token is predicted or not, and never the first one."""
    if PREDICTED not in batch:
        return None
    predicted, lengths = batch[PREDICTED], batch["bytes"]
    if not np.array_equal(predicted.offsets, lengths.offsets):
        row = int(np.argmax(np.diff(predicted.offsets) != np.diff(lengths.offsets)))
        return Wrong(row, PREDICTED, "it has not an entry for each token")
    starts = predicted.offsets[:-1][np.diff(predicted.offsets) > 0]
    first = predicted.values[starts]
    if not first.any():
        return None
    return wrong_at(batch, PREDICTED, int(starts[np.argmax(first)]), "a first token is predicted")


def positions_of(batch: Batch) -> np.ndarray:
    """[rows] how many distributions each block has: one for each token but the first one.

    Of a conversation, one for each token that is predicted.
    """
    if PREDICTED not in batch:
        return all_but_one("bytes")(batch)
    predicted = batch[PREDICTED]
    return sums_of(predicted.values.astype(np.int64), np.diff(predicted.offsets))


def source_layout(vocabulary: int, scheme: str, most: int) -> Layout:
    """What a source's distributions must be.

    Args:
        vocabulary: of its tokenizer; ids are below it.
        scheme: "top" or "sampled".
        most: entries that a position can have: k, or draws, which its counts then add up to.
    """
    own = {"top": _top_rules, "sampled": _sampled_rules}
    rules: tuple[Rule, ...] = (
        *_token_rules(vocabulary),
        as_many("kept", positions_of),
        within("kept", 1, most),
        as_many("kept_ids", total("kept")),
        within("kept_ids", 0, vocabulary - 1),
        as_many("true_log_prob", entries("kept")),
        *own[scheme](most),
    )
    schemas = (source_schema(vocabulary, scheme, most, chat) for chat in (False, True))
    return Layout(tuple(schemas), rules)


def _sampled_rules(draws: int) -> tuple[Rule, ...]:
    def add_up(batch: Batch) -> Wrong | None:
        sums = sums_of(batch["counts"].values, batch["kept"].values)
        at = int(np.argmax(sums != draws)) if len(sums) else 0
        if len(sums) == 0 or sums[at] == draws:
            return None
        what = f"those of a position add up to {sums[at]}, and there are {draws} draws"
        return wrong_at(batch, "kept", at, what)._replace(column="counts")

    return (
        ascending("kept_ids", "kept"),
        as_many("counts", entries("kept_ids")),
        within("counts", 1, draws),
        add_up,
    )


def _top_rules(most: int) -> tuple[Rule, ...]:
    def add_up(batch: Batch) -> Wrong | None:
        lengths = batch["kept"].values
        kept = probabilities(steps_of(batch["drops"].values, lengths))
        whole = sums_of(kept, lengths) + probabilities(batch["tail"].values)
        far = np.abs(np.log(np.maximum(whole, 0.5))) > ERROR_NATS
        if not far.any():
            return None
        at = int(np.argmax(far))
        what = f"masses of a position add up to {whole[at]:.4f} with its tail, and not to 1"
        return wrong_at(batch, "kept", at, what)._replace(column="drops")

    return (
        as_many("drops", entries("kept_ids")),
        as_many("tail", entries("kept")),
        add_up,
    )


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


def layout_of(folder: StageFolder, vocabulary: int | None = None) -> Layout:
    """What the shards of a source, or of the target's tokens, must be.

    Args:
        vocabulary: tokens of the tokenizer that they are read with, if one is at hand.

    Raises:
        StoreError: the manifest is not what the stage writes, or is of a larger or smaller
            vocabulary.
    """
    written = vocabulary_of(folder)
    if None not in (written, vocabulary) and written != vocabulary:
        raise StoreError(
            f"{folder.path} was made with a tokenizer of {written:,} tokens and is read with one "
            f"of {vocabulary:,}; make it anew, or put back the tokenizer"
        )
    if folder.identity.stage == f"externalize/{TARGET}":
        return tokens_layout(vocabulary or written)
    about = about_of(folder)
    kept = about["externalize"]
    sampled = kept["scheme"] == "sampled"
    return source_layout(
        about["vocabulary"], kept["scheme"], kept["draws"] if sampled else kept["k"]
    )


def require_text(
    shard: Shard, n: int, columns: Batch, numbers: np.ndarray, text_bytes: np.ndarray
) -> None:
    """Check that tokens are those of the corpus' blocks: of each that was read, to its last byte.

    Args:
        shard, n: record batch that the columns are of.
        numbers, text_bytes: [blocks] of the corpus.

    Raises:
        StoreError: they are of other blocks, or of texts of other lengths.
    """
    if not np.array_equal(columns["block"], numbers):
        what = f"it stands where the corpus has block {numbers[0]}"
        raise shard.refused(n, Wrong(0, "block", what))
    lengths = columns["bytes"]
    token_bytes = sums_of(lengths.values, np.diff(lengths.offsets))
    wrong = columns["read"] & (token_bytes != text_bytes)
    if wrong.any():
        row = int(np.argmax(wrong))
        what = f"its tokens have {token_bytes[row]:,} bytes, and its text has {text_bytes[row]:,}"
        raise shard.refused(n, Wrong(row, "bytes", what))


def require_same_blocks(shard: Shard, corpus: Shard) -> None:
    """Check that a shard is of the same blocks as the corpus' shard of its name.

    Raises:
        StoreError: it is not.
    """
    if shard.numbers != corpus.numbers:
        raise shard.damaged(
            f"it has the blocks {_span(shard.numbers)}, and the corpus has {_span(corpus.numbers)}"
        )


def _span(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]} to {numbers[1] - 1}"


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
