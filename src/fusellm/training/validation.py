"""Bits per byte of the validation part, while a model is trained."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from fusellm.config import Recipe
from fusellm.evaluation.text.nats import blocks_nats, by_domain, without_context
from fusellm.store.blocks import Block, encode_blocks
from fusellm.tokens.encode import Encoded, Encoder
from fusellm.training import processes


class Validation:
    """The validation part, encoded once."""

    def __init__(self, encoder: Encoder, blocks: Sequence[Block], recipe: Recipe) -> None:
        self._domains = [block.domain for block in blocks]
        self._lengths = [len(block.text.encode()) for block in blocks]
        self._context = [block.context for block in blocks]
        self._encoded: list[Encoded] = encode_blocks(encoder, blocks)
        self._batch_tokens = recipe.evaluation.batch_tokens

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Bits per byte by domain, and their mean as "mean".

        The processes of a training divide the batches among them, and all get the answer.
        """
        share = processes.number(), processes.count()
        nats = blocks_nats(model, self._encoded, self._lengths, self._batch_tokens, share=share)
        own = [
            (n, row) for n, row in enumerate(nats) if row is not None and not np.isnan(row).all()
        ]
        for n, row in processes.gathered(own):
            nats[n] = row
        return by_domain(self._domains, without_context(nats, self._context))


def stalled(values: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` values are all no lower than the lowest before them.

    >>> [stalled([3.0, 2.0, 2.5, 2.0][:n], 2) for n in (1, 2, 3, 4)]
    [False, False, False, True]
    """
    return len(values) > patience and min(values[-patience:]) >= min(values[:-patience])
