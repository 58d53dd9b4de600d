"""What is kept of a model's distribution at each position.

Two halves: `select` on the model's device, which waits for nothing, and `kept_of_host` in numpy,
once the result has been copied, so that both can run at a time.

N positions, C positions of a chunk, K kept at a position, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from fusellm.arrays.distributions import Kept
from fusellm.arrays.ragged import offsets_of
from fusellm.config import ExternalizeSettings
from fusellm.objective.chunked import Head
from fusellm.reading.draws import systematic_draws

_PIECE_ELEMENTS = 1 << 20  # of logits that a CPU looks at together: a few MB, which stay in cache


@dataclass(frozen=True)
class Selected:
    """What `select` leaves on the device.

    Attributes:
        ids: [N, K] int32: the most probable, from the first on (`top`); draws, ascending
            (`sampled`).
        log_probs: [N, K] float32 nats (`top`); [N, 0] for `sampled`.
        kept: [N] int32, how many of them count; all for `sampled`.
        tail: [N] float32, mass of the others; zero for `sampled`.
        true_log_prob: [N] float32 nats of the true next token; not finite where the distribution
            is not.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    kept: torch.Tensor
    tail: torch.Tensor
    true_log_prob: torch.Tensor

    def to_host(self) -> "Selected":
        """Begin to copy it to the host; on a GPU it is there when the stream has come so far."""
        if not self.ids.is_cuda:
            return self

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        return Selected(*(copied(getattr(self, field.name)) for field in fields(self)))


class Selector:
    """A head, and what is to be kept of its distributions.

    Log-probabilities come from a float32 log-softmax over the rows that have a token; logits are
    never half precision, whatever the weights are.
    """

    def __init__(self, head: Head, vocabulary: int, settings: ExternalizeSettings) -> None:
        """`vocabulary`: the head's first rows that have a token."""
        self._settings = settings
        self._rows, self._vocabulary = head.weight.shape[0], min(vocabulary, head.weight.shape[0])
        self._head = head.widened()
        self._on_cpu = head.weight.device.type == "cpu"
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def select(self, hidden: torch.Tensor, true_ids: torch.Tensor, shift: torch.Tensor) -> Selected:
        """Choose what is kept, chunk by chunk.

        Args:
            hidden: [N, d] last hidden states.
            true_ids: [N] int64.
            shift: [N] float64 in [0, 1), of the draws.
        """
        chunk = self._head.rows_to_read()
        piece = max(1, _PIECE_ELEMENTS // self._rows) if self._on_cpu else chunk
        kept: list[tuple[torch.Tensor, ...]] = []
        for part in zip(
            hidden.split(chunk), true_ids.split(chunk), shift.split(chunk), strict=True
        ):
            logits = self._logits(part[0])[:, : self._vocabulary]
            pieces = (column.split(piece) for column in (logits, *part[1:]))
            kept += [self._kept(*columns) for columns in zip(*pieces, strict=True)]
        return Selected(*(torch.cat(column) for column in zip(*kept, strict=True)))

    def _kept(
        self, logits: torch.Tensor, true_ids: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        p = torch.softmax(logits, dim=-1, out=self._buffer("p", logits.shape))
        # The most probable token's p is exp(0) over the sum: that gives the sum in one quick pass.
        log_sum = logits.amax(dim=-1, keepdim=True) - torch.log(p.amax(dim=-1, keepdim=True))
        true = (logits.gather(1, true_ids[:, None]) - log_sum)[:, 0]
        if self._settings.scheme == "sampled":
            ids = systematic_draws(p, shift, self._settings.draws)
            kept = torch.full_like(true_ids, ids.shape[1])
            return ids, p[:, :0], kept.int(), torch.zeros_like(true), true
        return *_top(logits, log_sum, self._settings.k, self._settings.mass), true

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.logits(hidden, self._buffer("logits", (len(hidden), self._rows)))

    def _buffer(self, name: str, shape: Sequence[int]) -> torch.Tensor | None:
        """Memory to write to again and again: on a CPU new pages cost as much as the numbers.

        A GPU's allocator keeps what is freed.
        """
        if not self._on_cpu:
            return None
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = torch.empty(size)
        return buffer[:size].view(*shape)


def _top(
    logits: torch.Tensor, log_sum: torch.Tensor, k: int, mass: float | None
) -> tuple[torch.Tensor, ...]:
    """(ids [C, K], log-probabilities [C, K], kept [C], tail [C])."""
    best = torch.topk(logits, min(k, logits.shape[-1]), dim=-1)
    log_p = best.values - log_sum
    p = torch.exp(log_p.double())
    kept = torch.isfinite(log_p)
    if mass is not None:
        kept[:, 1:] &= torch.cumsum(p, dim=-1)[:, :-1] < mass
    tail = (1.0 - torch.where(kept, p, 0.0).sum(-1)).clamp_(min=0.0).float()
    return best.indices.int(), log_p, kept.sum(-1).int(), tail


def kept_of_host(selected: Selected, settings: ExternalizeSettings) -> Kept:
    """What was selected, once it is on the host, without what does not count."""
    ids, true = selected.ids.numpy(), selected.true_log_prob.numpy()
    nothing = np.zeros(0, dtype=np.float32)
    if settings.scheme == "sampled":
        is_new = np.ones(ids.shape, dtype=np.bool_)
        is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.append(np.nonzero(is_new.ravel())[0], ids.size)
        counts = np.diff(starts).astype(np.uint8)
        offsets = offsets_of(is_new.sum(axis=1))
        return Kept(offsets, ids[is_new], nothing, counts, selected.tail.numpy(), true)
    counted = np.arange(ids.shape[1]) < selected.kept.numpy()[:, None]
    return Kept(
        offsets_of(counted.sum(axis=1)),
        ids[counted],
        selected.log_probs.numpy()[counted],
        nothing.astype(np.uint8),
        selected.tail.numpy(),
        true,
    )


def shifts(seeds: Iterator[int], lengths: list[int]) -> torch.Tensor:
    """[N] float64 in [0, 1): each block's own, so that it is drawn alike in whatever batch.

    Args:
        seeds, lengths: seed and number of positions of each block.
    """
    parts = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    return torch.cat(parts)
