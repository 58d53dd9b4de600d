"""One shard's work: from the corpus' blocks to the bytes of a shard, wherever it is done.

Three parts that can run at a time on three shards: `prepare`, `read` and `finish`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusellm.arrays.ragged import Ragged
from fusellm.config import Recipe
from fusellm.models.load import Located, load_model
from fusellm.reading.allocator import keep_flat
from fusellm.reading.source_reader import Read, SourceReader
from fusellm.store.blocks import Block, digest_of_blocks, encode_blocks
from fusellm.store.externalized import PREDICTED, kept_columns, source_schema, token_columns
from fusellm.store.tables import EncodedShard, encode_table
from fusellm.tokens.encode import Encoded, Encoder

NOT_FINITE = "NaN or infinity in its distributions"
WALK_FAILED = "its tokenizer changes the text"


@dataclass(frozen=True)
class TokenizedShard:
    """A shard's blocks as the source's tokenizer cuts them."""

    blocks: list[Block]
    encoded: list[Encoded]


@dataclass(frozen=True)
class Done:
    """A shard before it is written, and what was counted.

    `counts["aside"]` has [number, document, reason] of each block that could not be read.
    """

    shard: EncodedShard
    counts: dict[str, Any]


class Worker:
    """A source with its model loaded."""

    def __init__(
        self, recipe: Recipe, located: Located, encoder: Encoder, device: torch.device
    ) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded as asked.
        """
        keep_flat()
        self._encoder = encoder
        vocabulary, settings = len(encoder.vocabulary), recipe.externalize
        model = load_model(located, device)
        self._reader = SourceReader(model, vocabulary, settings, recipe.seed)
        self._sampled = settings.scheme == "sampled"
        most = settings.draws if self._sampled else settings.k
        chat = recipe.corpus.has_conversations
        self._schema = source_schema(vocabulary, settings.scheme, most, chat)

    def prepare(self, blocks: list[Block]) -> TokenizedShard:
        """Tokenize a shard's blocks."""
        return TokenizedShard(blocks, encode_blocks(self._encoder, blocks))

    def steps(self, prepared: TokenizedShard) -> Generator[int, None, Read]:
        """Run the model; yields how many blocks more have been read."""
        return self._reader.steps([block.text for block in prepared.blocks], prepared.encoded)

    def read(self, prepared: TokenizedShard) -> Read:
        """Run the model."""
        return self._reader.read([block.text for block in prepared.blocks], prepared.encoded)

    def finish(self, prepared: TokenizedShard, read: Read) -> Done:
        """Encode the shard."""
        columns = columns_of_tokens(prepared.blocks, prepared.encoded, read.usable)
        kept = kept_columns(read.kept, read.position_offsets, self._sampled)
        aside = [
            [block.number, block.document, _reason(encoded, n in read.not_finite)]
            for n, (block, encoded) in enumerate(
                zip(prepared.blocks, prepared.encoded, strict=True)
            )
            if not read.usable[n]
        ]
        counts = token_counts(prepared.encoded) | {
            "kept": len(read.kept.ids),
            "positions": len(read.kept.tail),
            "not_finite": len(read.not_finite),
            "texts": digest_of_blocks(prepared.blocks),
            "aside": aside,
        }
        return Done(encode_table(columns | kept, self._schema), counts)


def _reason(encoded: Encoded, not_finite: bool) -> str:
    return NOT_FINITE if not_finite else encoded.reason or WALK_FAILED


def device_name(device: torch.device) -> str:
    """What a device is called: a GPU by its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def columns_of_tokens(
    blocks: Sequence[Block], encoded: Sequence[Encoded], usable: np.ndarray | None = None
) -> dict[str, Any]:
    """Columns of `tokens_schema`.

    Args:
        usable: [blocks] bool, which have been read; by default all that the walk covered.
    """
    covered = np.array([block.ends is not None for block in encoded], dtype=np.bool_)
    usable = covered if usable is None else usable
    nothing = np.zeros(0, dtype=np.int64)
    ends = [
        nothing if block.ends is None or not ok else block.ends
        for block, ok in zip(encoded, usable, strict=True)
    ]
    columns = token_columns(
        np.array([block.number for block in blocks], dtype=np.int64),
        usable,
        Ragged.of([block.ids for block in encoded]),
        Ragged.of(ends),
    )
    if any(block.conversation is not None for block in blocks):
        none = np.zeros(0, dtype=np.bool_)
        columns[PREDICTED] = Ragged.of(
            [
                none if block.predicted is None or not ok else block.predicted
                for block, ok in zip(encoded, usable, strict=True)
            ]
        )
    return columns


def token_counts(encoded: Sequence[Encoded]) -> dict[str, int]:
    """What is counted of a shard's tokens; `cut` are conversations read in part."""
    counts = {
        "tokens": sum(len(block.ids) for block in encoded),
        "walk_failed": sum(block.ends is None for block in encoded),
    }
    cut = sum(block.left_out > 0 and block.ends is not None for block in encoded)
    return counts | ({"cut": cut} if cut else {})
