"""Batches of blocks for a forward pass, and what a model says of each.

B blocks, T positions, N positions that predict, d hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.models.heads import last_hidden
from fusellm.objective.chunked import Head

_BATCH_TOKENS_CPU, _BATCH_TOKENS_GPU = 2048, 16_384
_CHUNK_ELEMENTS = 1 << 20  # of N x V float32 at a time: a few MB, which stay in cache on a CPU


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group blocks of like length, padding included, up to a number of tokens.

    The plan depends on the lengths alone. A block longer than the budget is a batch of its own;
    blocks without tokens are in none.

    >>> plan_batches([3, 9, 4, 0], 9)
    [[0, 2], [1]]
    """
    batches: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: (lengths[n], n)):
        if lengths[n] == 0:
            continue
        if batches and (len(batches[-1]) + 1) * lengths[n] <= batch_tokens:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches


def pad(rows: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T] int64, mask [B, T] int64) of rows padded on the right."""
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


@torch.no_grad()
def hidden_of_blocks(
    model: PreTrainedModel, ids: Sequence[np.ndarray], batch_tokens: int | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Run blocks through a model, each from its beginning.

    Args:
        ids: of each block.
        batch_tokens: of one forward pass, padding included; None for what suits the device.

    Yields, once a block that has two tokens or more:
        (index of the block, [N, d] last hidden states of the positions that predict, [N] int64
        the true next tokens), N being its tokens less one.
    """
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS_GPU if model.device.type == "cuda" else _BATCH_TOKENS_CPU
    for batch in plan_batches([len(row) for row in ids], batch_tokens):
        inputs, mask = pad([ids[n] for n in batch], model.device)
        hidden = last_hidden(model, input_ids=inputs, attention_mask=mask)
        for place, n in enumerate(batch):
            length = len(ids[n])
            if length > 1:
                yield n, hidden[place, : length - 1], inputs[place, 1:length]


@torch.no_grad()
def true_log_probs(head: Head, hidden: torch.Tensor, true_ids: torch.Tensor) -> torch.Tensor:
    """[N] float32 nats that a model gives the true next tokens, over all rows of its head."""
    found = torch.empty(len(true_ids), device=hidden.device)
    chunk = max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
    for start in range(0, len(true_ids), chunk):
        rows = slice(start, start + chunk)
        logits = head.logits(hidden[rows])
        true = logits.gather(1, true_ids[rows, None])[:, 0]
        found[rows] = true - torch.logsumexp(logits, dim=-1)
    return found
