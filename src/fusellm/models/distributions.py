"""What is kept of a model's distribution at each position.

Two halves: `select` on the model's device, which waits for nothing, and `kept_of_host` in numpy,
once the result has been copied, so that both can run at a time.

N positions, C positions of a chunk, K kept at a position, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from fusellm.align.ragged import offsets_of
from fusellm.config import ExternalizeSettings
from fusellm.fusion.kept import Kept
from fusellm.objective.chunked import Head

_CHUNK_ELEMENTS = 1 << 20  # of N x V float32 at a time: a few MB, which stay in cache on a CPU
_CHUNK_ELEMENTS_GPU = 1 << 26


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
        half = head.weight.dtype != torch.float32
        self._mixed = half and head.weight.is_cuda  # bf16 in, float32 out, in one product
        if half and not self._mixed:
            bias = None if head.bias is None else head.bias.float()
            head = Head(head.weight.float(), bias, head.scale, head.softcap)
        self._head = head

    @torch.no_grad()
    def select(self, hidden: torch.Tensor, true_ids: torch.Tensor, shift: torch.Tensor) -> Selected:
        """Choose what is kept, chunk by chunk.

        Args:
            hidden: [N, d] last hidden states.
            true_ids: [N] int64.
            shift: [N] float64 in [0, 1), of the draws.
        """
        budget = _CHUNK_ELEMENTS_GPU if hidden.is_cuda else _CHUNK_ELEMENTS
        chunk = max(1, budget // self._rows)
        # A GPU's allocator keeps what is freed; on a CPU new pages cost as much as the numbers.
        size = (2, min(chunk, len(hidden)), self._rows)
        on_cpu = hidden.device.type == "cpu"
        scratch = torch.empty(size).unbind() if on_cpu else (None, None)
        pieces = [
            self._chunk(hidden[start : start + chunk], true_ids[start : start + chunk], s, scratch)
            for start, s in zip(range(0, len(hidden), chunk), shift.split(chunk), strict=True)
        ]
        return Selected(*(torch.cat(column) for column in zip(*pieces, strict=True)))

    def _chunk(
        self,
        hidden: torch.Tensor,
        true_ids: torch.Tensor,
        shift: torch.Tensor,
        scratch: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, ...]:
        logits = self._logits(hidden, scratch[0])[:, : self._vocabulary]
        highest = logits.amax(dim=-1, keepdim=True)
        true = logits.gather(1, true_ids[:, None]) - highest
        if self._settings.scheme == "sampled":
            weights = logits.sub_(highest).exp_()  # one pass through exp serves draws and sum
            ids, whole = _draw(weights, shift, self._settings.draws, scratch[1])
            log_probs, tail = logits[:, :0], torch.zeros_like(true[:, 0])
            kept = torch.full_like(true_ids, ids.shape[1])
        else:
            ids, log_probs, kept, tail, whole = _top(
                logits, highest, self._settings.k, self._settings.mass
            )
        true = (true - torch.log(whole))[:, 0]
        return ids.int(), log_probs, kept.int(), tail, true

    def _logits(self, hidden: torch.Tensor, scratch: torch.Tensor | None) -> torch.Tensor:
        if not self._mixed:
            return self._head.logits(hidden.float(), scratch)
        weight, bias = self._head.weight, self._head.bias
        z = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        return self._head.scaled(z if bias is None else z + bias.float())


def _draw(
    weights: torch.Tensor, shift: torch.Tensor, draws: int, scratch: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Systematic draws: one uniform shift a position, then steps of 1/draws along the ids.

    An id of probability p is drawn floor(draws·p) or ceil(draws·p) times, draws·p on average: as
    unbiased as independent draws, with less variance.

    Args:
        weights: [C, V] probabilities times a constant of each position.
        scratch: [C or more, V or more] float32, which may be overwritten.

    Returns:
        ([C, draws] ids, ascending; [C, 1] sum of the weights)
    """
    # In place of a float64 cumsum, which costs twice: the error of the last sum is scaled away.
    out = None if scratch is None else scratch.view(-1)[: weights.numel()].view(weights.shape)
    cumulative = torch.cumsum(weights, dim=-1, out=out)
    steps = torch.arange(draws, device=weights.device, dtype=torch.float64)
    points = ((steps + shift[:, None]) / draws * cumulative[:, -1:]).to(cumulative.dtype)
    drawn = torch.searchsorted(cumulative, points, right=True)
    return drawn.clamp_(max=weights.shape[1] - 1), cumulative[:, -1:]


def _top(
    logits: torch.Tensor, highest: torch.Tensor, k: int, mass: float | None
) -> tuple[torch.Tensor, ...]:
    """(ids [C, K], log-probabilities [C, K], kept [C], tail [C], sum of exp(logits − highest))."""
    best = torch.topk(logits, min(k, logits.shape[-1]), dim=-1)
    whole = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_p = best.values - highest - torch.log(whole)
    p = torch.exp(log_p.double())
    kept = torch.isfinite(log_p)
    if mass is not None:
        kept[:, 1:] &= torch.cumsum(p, dim=-1)[:, :-1] < mass
    tail = (1.0 - torch.where(kept, p, 0.0).sum(-1)).clamp_(min=0.0).float()
    return best.indices, log_p, kept.sum(-1), tail, whole


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
