"""The objective from last hidden states and the head, chunk by chunk, in one pass.

A [N, V] tensor never exists: each chunk's logits give its loss and, at once, the gradients of
hidden states and head; the backward only scales them.

N positions, d hidden size, V vocabulary, C positions of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fusellm.objective.divergence import CROSS_ENTROPY, Divergence, chunk_losses
from fusellm.objective.outcomes import Outcomes

_CHUNK_ELEMENTS = 1 << 20  # of C x V logits: a few MB, which stay in cache on a CPU
_CHUNK_ELEMENTS_GPU = 1 << 27
_READ_ELEMENTS = 1 << 22  # where logits are only read: enough rows for a quick product on a CPU
_READ_ELEMENTS_GPU = 1 << 26
_CACHED_WEIGHT = 1 << 22  # elements of a weight that stays in cache beside them
_LEAST_ROWS = 256  # of a larger weight, which every chunk reads and whose gradient it writes


@dataclass(frozen=True)
class Head:
    """How an architecture turns a hidden state into logits.

    logits = cap(scale · (h Wᵀ + bias)), with cap(z) = softcap · tanh(z / softcap).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[C, V] float32 logits of [C, d] hidden states.

        Args:
            out: [C or more, V] float32, which may be used for them.
        """
        if out is not None and self._is_plain(hidden):
            z = torch.mm(hidden, self.weight.t(), out=out[: len(hidden)])
            return self.scaled(z if self.bias is None else z.add_(self.bias))
        return self.scaled(torch.nn.functional.linear(hidden, self.weight, self.bias).float())

    def rows_to_read(self) -> int:
        """Positions whose logits are made at a time where they need no gradient."""
        elements = _READ_ELEMENTS_GPU if self.weight.is_cuda else _READ_ELEMENTS
        return max(_LEAST_ROWS, elements // self.weight.shape[0])

    def _is_plain(self, hidden: torch.Tensor) -> bool:
        """Whether the product is float32 as it is."""
        types = {hidden.dtype, self.weight.dtype}
        return types == {torch.float32} and not torch.is_autocast_enabled(hidden.device.type)

    def scaled(self, z: torch.Tensor) -> torch.Tensor:
        """[C, V] what the architecture makes of its head's product."""
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z


@dataclass(frozen=True)
class Losses:
    """Sums over positions, in nats. Only `total` carries a gradient."""

    total: torch.Tensor
    clm: torch.Tensor
    fusion: torch.Tensor


def objective(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    outcomes: Outcomes | None = None,
    clm_weight: float = 1.0,
    divergence: Divergence = CROSS_ENTROPY,
    count: torch.Tensor | float = 1.0,
) -> Losses:
    """L = λ·L_CLM + (1−λ)·L_Fusion over positions (FuseLLM, eq. 4; DESIGN section 6).

    Args:
        hidden: [N, d] last hidden states of the positions that predict.
        labels: [N] int64, the true next tokens.
        outcomes: fused distributions of the N positions; None where there are none.
        clm_weight: λ, the weight of L_CLM at positions with a fused distribution; elsewhere it
            is 1.
        divergence: what L_Fusion is.
        count: what the total is divided by; dividing it afterwards costs another pass over the
            gradients.

    Returns:
        `total`, a sum over positions divided by `count`, whose graph serves one backward; and
        sums: `clm` over all positions, `fusion` over those with a fused distribution, both
        unweighted.

    >>> hidden = torch.zeros(3, 2)
    >>> losses = objective(hidden, Head(torch.zeros(4, 2)), torch.tensor([0, 1, 2]))
    >>> round(losses.total.item() / 3, 4)
    1.3863
    """
    if outcomes is None:
        outcomes = Outcomes.none(len(labels), hidden.device)
    wants_gradient = torch.is_grad_enabled()  # inside a Function's forward it never is
    total, clm, fusion = _Objective.apply(  # type: ignore[no-untyped-call]
        hidden,
        head.weight,
        head.bias,
        head,
        labels,
        outcomes,
        (clm_weight, count),
        divergence,
        wants_gradient,
    )
    return Losses(total, clm, fusion)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: Head,
        labels: torch.Tensor,
        outcomes: Outcomes,
        weights: tuple[float, torch.Tensor | float],
        divergence: Divergence,
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        head = Head(weight, bias, head.scale, head.softcap)
        gradients = _Gradients(hidden, head, wants)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        chunk = _chunk_rows(weight)
        cuts = _Cuts(outcomes, chunk)
        clm_weight, fusion_weight = _weights(outcomes.present, *weights)
        # Kept from chunk to chunk: to free and to take tens of MB each time costs 8 % on a CPU.
        buffers = hidden.new_empty((2, min(chunk, len(labels)), len(weight)), dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden[rows], buffers[0])
            d_logits, parts = chunk_losses(
                logits,
                labels[rows],
                cuts.chunk(start),
                (clm_weight[rows], fusion_weight[rows]),
                divergence,
                any(wants),
                buffers[1],
            )
            sums += parts
            if d_logits is not None:
                gradients.add(rows, logits, d_logits)
        ctx.gradients = gradients.finished()
        total, clm, fusion = (one.to(torch.float32) for one in sums)  # no views
        ctx.mark_non_differentiable(clm, fusion)
        return total, clm, fusion

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the objective's gradients are made once: call backward() once")
        # Given away, so that autograd takes them as they are and does not copy them.
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0]
        if scale.is_cuda or scale.item() != 1.0:
            gradients = [None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients]
        return (*gradients, *[None] * 6)


class _Gradients:
    """Gradients of hidden states, weight and bias, those that are wanted, added up in float32."""

    def __init__(self, hidden: torch.Tensor, head: Head, wants: Sequence[bool]) -> None:
        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(like, dtype=torch.float32)

        self._inputs, self._head = hidden, head
        self._hidden = torch.empty_like(hidden) if wants[0] else None
        self._weight = zeros(head.weight) if wants[1] else None
        self._bias = zeros(head.bias) if wants[2] and head.bias is not None else None

    def add(self, rows: slice, logits: torch.Tensor, d_logits: torch.Tensor) -> None:
        """Take a chunk's [C, V] gradient in its logits, which is changed."""
        head, weight = self._head, self._head.weight
        if head.softcap is not None:
            d_logits *= 1 - (logits / head.softcap) ** 2
        if head.scale != 1.0:
            d_logits *= head.scale
        narrow, hidden = d_logits.to(weight.dtype), self._inputs[rows]
        if self._hidden is not None:
            if self._hidden.dtype == weight.dtype:
                torch.mm(narrow, weight, out=self._hidden[rows])
            else:  # autocast over float32 weights
                self._hidden[rows] = narrow @ weight
        if self._weight is not None:
            if self._weight.dtype == weight.dtype == hidden.dtype:
                self._weight.addmm_(narrow.t(), hidden)
            else:
                self._weight += narrow.t() @ hidden
        if self._bias is not None:
            self._bias += d_logits.sum(0)

    def finished(self) -> list[torch.Tensor | None]:
        """In the order and the types of what they belong to."""
        weight, bias = self._head.weight, self._head.bias
        return [
            self._hidden,
            None if self._weight is None else self._weight.to(weight.dtype),
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        ]


def _chunk_rows(weight: torch.Tensor) -> int:
    """Positions of a chunk, for a head's weight [V, d]."""
    if weight.is_cuda:
        return max(1, _CHUNK_ELEMENTS_GPU // weight.shape[0])
    in_cache = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    if weight.numel() <= _CACHED_WEIGHT:
        return in_cache
    return max(in_cache, _LEAST_ROWS)


def _weights(
    present: torch.Tensor, clm_weight: float, count: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] of L_CLM and [N] of L_Fusion."""
    clm = torch.where(present, clm_weight, 1.0) / count
    return clm, torch.where(present, 1.0 - clm_weight, 0.0) / count


class _Cuts:
    """Slices of the outcomes that belong to each chunk of positions."""

    def __init__(self, outcomes: Outcomes, chunk: int) -> None:
        self._outcomes = outcomes
        self._chunk = chunk
        device = outcomes.position.device
        edges = torch.arange(0, len(outcomes.present) + chunk, chunk, device=device)
        parts = torch.searchsorted(outcomes.position, edges)
        found = torch.searchsorted(outcomes.part, parts)
        members = torch.searchsorted(outcomes.member_outcome, found)
        self._parts, self._found, self._members = (
            [slice(*pair) for pair in pairwise(cut)]
            for cut in (parts.tolist(), found.tolist(), members.tolist())
        )

    def chunk(self, start: int) -> Outcomes:
        """The outcomes of positions [start, start + chunk), counted from there."""
        n = start // self._chunk
        parts, found, members = self._parts[n], self._found[n], self._members[n]
        whole = self._outcomes
        return Outcomes(
            whole.present[start : start + self._chunk],
            whole.position[parts] - start,
            whole.rest[parts],
            whole.part[found] - parts.start,
            whole.mass[found],
            whole.member_outcome[members] - found.start,
            whole.member_id[members],
        )
