"""One block of a run, gathered from every store for people to look at: `fusellm inspect`.

Nothing is written, and no model is loaded: tokenizers only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.arrays.fused import Fused
from fusellm.arrays.ragged import Ragged
from fusellm.config import Recipe
from fusellm.errors import StoreError
from fusellm.fusion.fuse import rules_of
from fusellm.fusion.view import BlockView, Material, view_block
from fusellm.models.readers import Reader
from fusellm.progress import Progress
from fusellm.stages.fuse import pairings_of
from fusellm.store import fused as fused_store
from fusellm.store.blocks import BLOCKS, Block, open_corpus, read_shard, text_bytes
from fusellm.store.externalized import (
    TARGET,
    kept_of,
    layout_of,
    open_externalized,
    require_same_blocks,
    require_text,
    tokens_of,
)
from fusellm.store.fused import fused_folder, open_fused
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.tokens.encode import Encoder

PART = "train"
"""The part that sources read; validation and held_out are kept from them."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_block` found; `blocks` is how many the part has."""

    block: Block
    blocks: int
    view: BlockView


def inspect_block(
    recipe: Recipe,
    run: Path,
    readers: Mapping[str, Reader],
    number: int,
    position: int | None,
    progress: Progress,
) -> Inspection:
    """Gather one block of the part that sources read.

    Args:
        readers: the models by name; the target is "target".
        number: of the block, from 0.
        position: as `view_block` takes it.

    Raises:
        StoreError: a stage is not finished, a tokenizer is not the one it was, or there is no
            such block or position.
    """
    names = [source.name for source in recipe.sources]
    if not (fused_folder(run) / MANIFEST).exists():
        raise StoreError(f"{run} has no fused distributions yet; first: fusellm fuse {run}")
    fused, corpus = open_fused(run), open_corpus(run)
    folders = {name: open_externalized(run, name) for name in (TARGET, *names)}
    for name, folder in folders.items():
        if folder.identity.inputs.get("tokenizer") != readers[name].tokenizer_fingerprint:
            raise StoreError(
                f"the tokenizer of {name!r} is not the one that {folder.path} was made with; put "
                f"it back, or make the run anew: fusellm run {run} --redo"
            )
    encoders: dict[str, Encoder] = {name: reader.encoder for name, reader in readers.items()}
    shard, row, blocks = _place(corpus, number)
    block = read_shard(corpus, shard)[row]
    read = {
        name: _one(folder, corpus, shard, row, encoders[name]) for name, folder in folders.items()
    }
    tokens = {name: tokens_of(read[name], encoders[name].prefix_tokens) for name in folders}
    target = tokens[TARGET]
    positions = len(target.predicting)
    if position is not None and not 0 <= position < positions:
        raise _no_position(position, number, positions)
    pairings = pairings_of(recipe, readers, progress)
    readings = [pairings[name].reading(target, tokens[name], kept_of(read[name])) for name in names]
    material = Material(
        len(block.text.encode()),
        target,
        encoders[TARGET],
        names,
        readings,
        [encoders[name] for name in names],
        _fused(_row_of_fused(fused, shard, row, read[TARGET]), positions),
        rules_of(recipe.fusion),
    )
    return Inspection(block, blocks, view_block(material, position))


def _no_position(position: int, number: int, positions: int) -> StoreError:
    numbers = f", from 0 to {positions - 1}" if positions else ""
    return StoreError(f"there is no position {position}: block {number} has {positions:,}{numbers}")


def _place(corpus: StageFolder, number: int) -> tuple[str, int, int]:
    """(shard, row, blocks of the part) of a block."""
    sizes = {n: int(corpus.shards[n]["counts"]["blocks"]) for n in shard_names(corpus, f"{PART}-")}
    blocks = sum(sizes.values())
    if not 0 <= number < blocks:
        raise StoreError(
            f"there is no block {number}: the run's part {PART} has {blocks:,}, from 0 to "
            f"{blocks - 1}"
        )
    row = number
    for shard, size in sizes.items():
        if row < size:
            return shard, row, blocks
        row -= size
    raise AssertionError("a block within the part is in one of its shards")


def _one(
    folder: StageFolder, corpus: StageFolder, name: str, row: int, encoder: Encoder
) -> dict[str, Any]:
    """One block's columns as a record batch has them."""
    shard = Shard(folder, name, layout_of(folder, len(encoder.vocabulary)))
    of_corpus = Shard(corpus, name, BLOCKS)
    require_same_blocks(shard, of_corpus)
    n, _ = shard.place(row)
    blocks = of_corpus.columns(n)
    require_text(shard, n, shard.columns(n), blocks["block"], text_bytes(blocks))
    return {
        name: Ragged(np.array([0, len(value)]), value)
        if isinstance(value, np.ndarray)
        else np.array([value])
        for name, value in shard.block(row).items()
    }


def _row_of_fused(
    folder: StageFolder, name: str, row: int, target: Mapping[str, Any]
) -> dict[str, Any]:
    """One block's fused distributions, at the target's own tokens."""
    shard = Shard(folder, name, fused_store.layout_of(folder))
    columns = shard.block(row)
    if not np.array_equal(columns["ids"], target["ids"].values):
        raise shard.damaged(f"block {columns['block']} has other tokens than the target's")
    return columns


def _fused(columns: Mapping[str, Any], positions: int) -> Fused:
    return Fused(
        columns["parts"][:positions],  # a block that the target could not read has zeros
        columns["source"],
        columns["lengths"].astype(np.int64),
        columns["outcomes"].astype(np.int64),
        columns["masses"],
        columns["rest"],
    )
