"""externalize: each source's next-token distributions over the corpus, once per source.

One shard of the corpus gives one shard here. The target is tokenized too, without distributions.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.config import Recipe
from fusellm.errors import NumericsError
from fusellm.fusion.kept import Kept
from fusellm.models.batches import hidden_of_blocks
from fusellm.models.distributions import keep
from fusellm.models.heads import head_of
from fusellm.models.load import Located, default_device, load_model
from fusellm.progress import Progress
from fusellm.store.blocks import Block, open_corpus, read_shard
from fusellm.store.externalized import SOURCE_SCHEMA, TARGET, TOKENS_SCHEMA, externalized_folder
from fusellm.store.manifest import Identity, StageFolder, StageWriter
from fusellm.store.tables import shard_names, write_table
from fusellm.tokens.encode import Encoded, Encoder


def identity_of_source(
    recipe: Recipe, name: str, located: Located, tokenizer: str, corpus: str
) -> Identity:
    """What one source's distributions are made from.

    Args:
        tokenizer, corpus: fingerprints.
    """
    sampled = recipe.externalize.scheme == "sampled"
    read = {"scheme", "draws"} if sampled else {"scheme", "k", "mass"}
    settings: dict[str, Any] = {
        "externalize": recipe.externalize.model_dump(include=read),
        "dtype": located.settings.dtype,
    }
    if sampled:
        settings["seed"] = recipe.seed
    inputs = {"weights": located.fingerprint, "tokenizer": tokenizer, "corpus": corpus}
    return Identity(f"externalize/{name}", settings, inputs)


def identity_of_target(tokenizer: str, corpus: str) -> Identity:
    """What the target's tokens are made from."""
    return Identity(f"externalize/{TARGET}", {}, {"tokenizer": tokenizer, "corpus": corpus})


def run_target(run: Path, identity: Identity, encoder: Encoder, progress: Progress) -> None:
    """Tokenize the corpus for the target."""
    corpus = open_corpus(run)
    with StageWriter.open(externalized_folder(run, TARGET), identity) as folder:
        if folder.complete:
            return
        names = shard_names(corpus, "train-")
        with progress.start("tokenizing for the target", len(names), "shards") as bar:
            for name in names:
                if name not in folder.shards:
                    blocks = read_shard(corpus, name)
                    encoded = encoder.encode([b.text for b in blocks], [b.last for b in blocks])
                    columns = _token_columns(blocks, encoded)
                    write_table(folder, name, columns, TOKENS_SCHEMA, _token_counts(encoded))
                bar.advance()
        folder.finish(_sum_counts(folder))


def run_source(
    recipe: Recipe,
    run: Path,
    name: str,
    located: Located,
    identity: Identity,
    encoder: Encoder,
    progress: Progress,
) -> None:
    """Read one source's distributions.

    Raises:
        NumericsError: the model gives NaN or infinity; finished shards are kept.
    """
    corpus = open_corpus(run)
    with StageWriter.open(externalized_folder(run, name), identity) as folder:
        if folder.complete:
            return
        names = shard_names(corpus, "train-")
        blocks_in_all = sum(corpus.shards[shard]["counts"]["blocks"] for shard in names)
        model = load_model(located, default_device())
        with progress.start(f"reading {name}", blocks_in_all, "blocks") as bar:
            for shard in names:
                blocks = read_shard(corpus, shard)
                if shard in folder.shards:
                    bar.advance(len(blocks))
                    continue
                encoded = encoder.encode([b.text for b in blocks], [b.last for b in blocks])
                kept = _distributions(recipe, name, model, encoder, blocks, encoded, bar.advance)
                columns = _token_columns(blocks, encoded) | _kept_columns(encoded, kept)
                counts = _token_counts(encoded) | {"kept": sum(len(k.ids) for k in kept.values())}
                write_table(folder, shard, columns, SOURCE_SCHEMA, counts)
        folder.finish(_sum_counts(folder))


def _distributions(
    recipe: Recipe,
    name: str,
    model: PreTrainedModel,
    encoder: Encoder,
    blocks: list[Block],
    encoded: list[Encoded],
    advance: Any,
) -> dict[int, Kept]:
    head = head_of(model)
    has_token = torch.zeros(head.weight.shape[0], dtype=torch.bool, device=model.device)
    has_token[: len(encoder.vocabulary)] = True
    readable = [block.ids if block.ends is not None else block.ids[:0] for block in encoded]
    kept: dict[int, Kept] = {}
    batches = hidden_of_blocks(model, readable, recipe.externalize.batch_tokens)
    for n, hidden, true_ids in batches:
        block = blocks[n]
        try:
            kept[n] = keep(
                hidden,
                true_ids,
                head,
                has_token,
                recipe.externalize,
                _seed(recipe.seed, block),
            )
        except NumericsError:
            raise NumericsError(
                f"source {name!r} gives NaN or infinity on block {block.number} (document "
                f"{block.document!r}); try another dtype than {model.dtype} for it, or check its "
                "weights. Finished shards are kept"
            ) from None
        advance()
    advance(len(blocks) - len(kept))
    return kept


def _seed(seed: int, block: Block) -> int:
    """The block's own seed, from its text: the same block gives the same draws anywhere."""
    data = f"{seed}\n{block.text}".encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def _token_columns(blocks: list[Block], encoded: list[Encoded]) -> dict[str, list[Any]]:
    nothing = np.zeros(0, dtype=np.int64)
    return {
        "block": [block.number for block in blocks],
        "read": [block.ends is not None for block in encoded],
        "ids": [block.ids for block in encoded],
        "ends": [nothing if block.ends is None else block.ends for block in encoded],
    }


def _kept_columns(encoded: list[Encoded], kept: Mapping[int, Kept]) -> dict[str, list[Any]]:
    nothing = np.zeros(0)
    empty = Kept(np.zeros(1, dtype=np.int64), *[nothing] * 5)
    rows = [kept.get(n, empty) for n in range(len(encoded))]
    return {
        "kept": [np.diff(row.offsets) for row in rows],
        "kept_ids": [row.ids for row in rows],
        "log_probs": [row.log_probs for row in rows],
        "counts": [row.counts for row in rows],
        "tail": [row.tail for row in rows],
        "true_log_prob": [row.true_log_prob for row in rows],
    }


def _token_counts(encoded: list[Encoded]) -> dict[str, Any]:
    unread = [n for n, block in enumerate(encoded) if block.ends is None]
    return {
        "tokens": sum(len(block.ids) for block in encoded),
        "walk_failed": len(unread),
    }


def _sum_counts(folder: StageFolder) -> dict[str, int]:
    keys = {key for shard in folder.shards.values() for key in shard["counts"]}
    return {
        key: sum(shard["counts"].get(key, 0) for shard in folder.shards.values())
        for key in sorted(keys)
    }
