"""The objective from last hidden states and the head, chunk by chunk, in one pass.

A [N, V] tensor never exists: each chunk's logits give its loss and, at once, the gradients of
hidden states and head; the backward only scales them.

N positions, d hidden size, V vocabulary, C positions of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fusellm.objective.divergence import CROSS_ENTROPY, Divergence, chunk_losses
from fusellm.objective.outcomes import Outcomes
from fusellm.objective.products import factors_as_bfloat16

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
    was_bfloat16: bool = False
    """Whether `weight` is float32 and holds numbers that bfloat16 has."""

    def widened(self) -> "Head":
        """The head with its weights in float32, for `logits` on a CPU.

        Where they are half precision, each call would widen them anew. On CUDA as it is.
        """
        if self.weight.is_cuda or self.weight.dtype == torch.float32:
            return self
        bias = None if self.bias is None else self.bias.float()
        exact = self.weight.dtype == torch.bfloat16
        return replace(self, weight=self.weight.float(), bias=bias, was_bfloat16=exact)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[C, V] float32 logits of [C, d] hidden states.

        Where no gradient is to flow through them, they are not rounded to half precision, whatever
        the factors are: bfloat16 keeps steps of 1/8 of a logit of 20. (But autocast on CUDA rounds
        them, as it does for Trainer.)

        Args:
            out: [C or more, V] float32, which may be used for them.
        """
        if self.weight.is_cuda or _is_differentiated(hidden, self.weight):
            return self.scaled(self._logits_by_torch(hidden))
        if out is None:  # and autocast leaves products alone whose place is given
            out = hidden.new_empty((len(hidden), len(self.weight)), dtype=torch.float32)
        with factors_as_bfloat16(self.takes_bfloat16(hidden)):
            z = torch.mm(hidden.float(), self.weight.float().t(), out=out[: len(hidden)])
        return self.scaled(z if self.bias is None else z.add_(self.bias))

    def _logits_by_torch(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        is_half = hidden.dtype == weight.dtype != torch.float32
        if not is_half or _is_differentiated(hidden, weight):
            return torch.nn.functional.linear(hidden, weight, bias).float()
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return z if bias is None else z.add_(bias)

    def takes_bfloat16(self, hidden: torch.Tensor) -> bool:
        """Whether products on a CPU are of factors rounded to bfloat16.

        Either they are bfloat16 already, or autocast asks for it (`bf16: true`).
        """
        if torch.is_autocast_enabled("cpu"):
            return torch.get_autocast_dtype("cpu") == torch.bfloat16
        weight_is = self.was_bfloat16 or self.weight.dtype == torch.bfloat16
        return weight_is and hidden.dtype == torch.bfloat16

    def rows_to_read(self) -> int:
        """Positions whose logits are made at a time where they need no gradient."""
        elements = _READ_ELEMENTS_GPU if self.weight.is_cuda else _READ_ELEMENTS
        return max(_LEAST_ROWS, elements // self.weight.shape[0])

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
    """L = λ·L_CLM + (1−λ)·L_Fusion over positions (FuseLLM, eq. 4; docs/method.md).

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
        gradients = _Gradients(hidden, (weight, bias), wants)
        head = replace(head, weight=weight, bias=bias).widened()
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        chunk = rows_of_chunk(weight.shape[0], weight.shape[1], weight.is_cuda)
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
                gradients.add(head, rows, logits, d_logits)
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

    def __init__(
        self,
        hidden: torch.Tensor,
        inputs: tuple[torch.Tensor, torch.Tensor | None],
        wants: Sequence[bool],
    ) -> None:
        """`inputs`: weight and bias as they came, whose types the gradients have in the end."""

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(like, dtype=torch.float32)

        weight, bias = inputs
        self._inputs, self._types = hidden, (weight.dtype, None if bias is None else bias.dtype)
        self._hidden = torch.empty_like(hidden) if wants[0] else None
        self._weight = zeros(weight) if wants[1] else None
        self._bias = zeros(bias) if wants[2] and bias is not None else None

    def add(self, head: Head, rows: slice, logits: torch.Tensor, d_logits: torch.Tensor) -> None:
        """Take a chunk's [C, V] gradient in its logits, which is changed."""
        if head.softcap is not None:
            d_logits *= 1 - (logits / head.softcap) ** 2
        if head.scale != 1.0:
            d_logits *= head.scale
        if self._bias is not None:
            self._bias += d_logits.sum(0)
        if head.weight.is_cuda:
            self._multiply_on_cuda(head.weight, rows, d_logits)
            return
        with factors_as_bfloat16(head.takes_bfloat16(self._inputs)):
            self._multiply(head.weight, rows, d_logits)

    def _multiply(self, weight: torch.Tensor, rows: slice, d_logits: torch.Tensor) -> None:
        """d_hidden = d_logits W and d_W += d_logitsᵀ h, on a CPU, in float32.

        All products have a place for their result: autocast leaves them alone.
        """
        if self._hidden is not None:
            is_float = self._hidden.dtype == torch.float32
            place = self._hidden[rows] if is_float else weight.new_empty(self._hidden[rows].shape)
            torch.mm(d_logits, weight, out=place)
            if not is_float:
                self._hidden[rows] = place
        if self._weight is not None:
            self._weight.addmm_(d_logits.t(), self._inputs[rows].float())

    def _multiply_on_cuda(self, weight: torch.Tensor, rows: slice, d_logits: torch.Tensor) -> None:
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

    def finished(self) -> list[torch.Tensor | None]:
        """In the order and the types of what they belong to."""
        weight_type, bias_type = self._types
        return [
            self._hidden,
            None if self._weight is None else self._weight.to(weight_type),
            None if self._bias is None or bias_type is None else self._bias.to(bias_type),
        ]


def _is_differentiated(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rows_of_chunk(vocabulary: int, width: int, on_gpu: bool) -> int:
    """Positions of a chunk, for a head's weight [V, d].

    >>> rows_of_chunk(1 << 20, 8, on_gpu=True)
    128
    """
    if on_gpu:
        return max(1, _CHUNK_ELEMENTS_GPU // vocabulary)
    in_cache = max(1, _CHUNK_ELEMENTS // vocabulary)
    if vocabulary * width <= _CACHED_WEIGHT:
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
        entries = torch.searchsorted(outcomes.part, parts)
        members = torch.searchsorted(outcomes.member_outcome, entries)
        self._parts, self._entries, self._members = (
            [slice(*pair) for pair in pairwise(cut)]
            for cut in (parts.tolist(), entries.tolist(), members.tolist())
        )

    def chunk(self, start: int) -> Outcomes:
        """The outcomes of positions [start, start + chunk), counted from there."""
        n = start // self._chunk
        parts, entries, members = self._parts[n], self._entries[n], self._members[n]
        whole = self._outcomes
        return Outcomes(
            whole.present[start : start + self._chunk],
            whole.position[parts] - start,
            whole.rest[parts],
            whole.part[entries] - parts.start,
            whole.mass[entries],
            whole.member_outcome[members] - entries.start,
            whole.member_id[members],
        )
