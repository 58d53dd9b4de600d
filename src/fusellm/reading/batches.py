"""Batches of blocks for a forward pass, and what a model says of each.

B blocks, T positions, N positions that predict, d hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.errors import ModelError
from fusellm.models.heads import hidden_states, input_device, is_sharded
from fusellm.objective.chunked import Head

_BATCH_TOKENS_CPU, _BATCH_TOKENS_GPU = 2048, 16_384
PADDING = 0.045
"""Most padding, as a share of the positions of all batches of a shard."""
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")

Result = TypeVar("Result")


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group blocks of like length, the longest first, up to a number of tokens.

    The plan depends on the lengths alone. Padding counts as tokens and is at most PADDING of all
    positions. A block longer than `batch_tokens` is a batch of its own; blocks without tokens are
    in none.

    >>> plan_batches([39, 40, 7, 0, 38], 120)
    [[1, 0, 4], [2]]
    """
    batches: list[list[int]] = []
    real = padded = 0  # tokens and positions of all batches so far
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if lengths[n] == 0:
            continue
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        real += lengths[n]
        if fits and padded + longest - real <= PADDING * (padded + longest):
            batches[-1].append(n)
            padded += longest
        else:
            batches.append([n])
            padded += lengths[n]
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


def default_batch_tokens(on_gpu: bool) -> int:
    """Tokens of one forward pass that suit a device.

    >>> default_batch_tokens(on_gpu=False)
    2048
    """
    return _BATCH_TOKENS_GPU if on_gpu else _BATCH_TOKENS_CPU


@dataclass
class BatchLimit:
    """What has been learnt of a device's memory.

    Attributes:
        too_large: positions, padding included, of the smallest batch that did not fit.
    """

    too_large: float = math.inf


@torch.no_grad()
def read_blocks(
    model: PreTrainedModel,
    ids: Sequence[np.ndarray],
    batch_tokens: int | None,
    use: Callable[[list[int], torch.Tensor, torch.Tensor], Result],
    limit: BatchLimit | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[int], Result]]:
    """Run blocks through a model, each from its beginning, and hand on what `use` makes of it.

    Where memory runs out, in the model or in `use`, a batch is halved, and later ones of its size
    are halved beforehand, in later calls too if they are given the same `limit`.

    Args:
        ids: of each block; blocks of fewer than two tokens predict nothing and are left out.
        batch_tokens: of one forward pass, padding included; None for what suits the device.
        use: is given the indices of a batch's blocks, [N, d] last hidden states of the positions
            that predict, block by block, and [N] int64 the true next tokens.
        share: (n, of): this process' number among those that divide the batches. Each has as many:
            where they do not come out even, some have one that another has too.

    Yields:
        (indices of a batch's blocks, what `use` gave)

    Raises:
        ModelError: memory does not suffice for one block.
    """
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(input_device(model).type == "cuda")
    plan = plan_batches([len(row) if len(row) > 1 else 0 for row in ids], batch_tokens)
    number, processes = share
    waiting = [plan[n % len(plan)] for n in range(number, len(plan) + number, processes)][::-1]
    limit = limit or BatchLimit()
    while waiting:
        batch = waiting.pop()
        positions = len(batch) * len(ids[batch[0]])
        if positions < limit.too_large or len(batch) == 1:
            try:
                result = use(batch, *_hidden(model, [ids[n] for n in batch]))
            except (MemoryError, RuntimeError) as error:
                _require_halving(error, batch, positions, is_sharded(model))
            else:
                yield batch, result
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            limit.too_large = positions
        half = (len(batch) + 1) // 2
        waiting += [batch[half:], batch[:half]]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is out."""
    text = str(error).lower()
    by_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return by_type or any(part in text for part in _OUT_OF_MEMORY)


def _require_halving(error: Exception, batch: list[int], positions: int, sharded: bool) -> None:
    """Raise the error on, unless it says that memory is out and the batch can be halved."""
    if not is_out_of_memory(error):
        raise error
    if sharded:
        raise ModelError(
            f"memory does not suffice for a batch of {positions} tokens, and processes that share "
            "a model have to read alike: set a smaller evaluation.batch_tokens"
        ) from error
    if len(batch) == 1:
        raise ModelError(
            f"memory does not suffice for one block of {positions} tokens; set a smaller "
            "corpus.block_bytes, or for this model dtype: bfloat16, quantization, or "
            "device_map: auto"
        ) from error


def _hidden(
    model: PreTrainedModel, rows: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, d] hidden states of the positions that predict, [N] true next tokens) of a batch."""
    inputs, mask = pad(rows, input_device(model))
    hidden = hidden_states(model, input_ids=inputs, attention_mask=mask)
    longest = inputs.shape[1]
    # From the lengths, which the host knows: a mask would have the host wait for the device.
    places = [np.arange(r * longest, r * longest + len(row) - 1) for r, row in enumerate(rows)]
    place = torch.from_numpy(np.concatenate(places))
    true_ids = inputs.flatten()[(place + 1).to(inputs.device)]
    return hidden.flatten(0, 1)[place.to(hidden.device)], true_ids.to(hidden.device)


def cut_rows(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """A flat array as rows of these lengths.

    >>> [row.tolist() for row in cut_rows(np.array([1, 2, 3]), [1, 2])]
    [[1], [2, 3]]
    """
    ends = np.cumsum([0, *lengths]).tolist()
    return [values[start:end] for start, end in pairwise(ends)]


@torch.no_grad()
def true_log_probs(head: Head, hidden: torch.Tensor, true_ids: torch.Tensor) -> torch.Tensor:
    """[N] float32 nats that a model gives the true next tokens, over all rows of its head.

    Args:
        head: on a CPU best `widened`, once for many batches.
    """
    log_probs = torch.empty(len(true_ids), device=hidden.device)
    chunk = head.rows_to_read()
    for start in range(0, len(true_ids), chunk):
        rows = slice(start, start + chunk)
        logits = head.logits(hidden[rows])
        true = logits.gather(1, true_ids[rows, None])[:, 0]
        log_probs[rows] = true - torch.logsumexp(logits, dim=-1)
    return log_probs
