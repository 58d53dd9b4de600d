"""The objective from last hidden states and the head, chunk by chunk, in one pass.

A [N, V] tensor never exists: each chunk's logits give its loss and, at once, the gradients of
hidden states and head; the backward only scales them.

N positions, d hidden size, V vocabulary, C positions of a chunk.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from fusellm.objective.outcomes import Outcomes

_CHUNK_ELEMENTS = 1 << 20  # of C x V logits: a few MB, which stay in cache on a CPU
_CHUNK_ELEMENTS_GPU = 1 << 27


@dataclass(frozen=True)
class Head:
    """How an architecture turns a hidden state into logits.

    logits = cap(scale · (h Wᵀ + bias)), with cap(z) = softcap · tanh(z / softcap).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[C, V] float32 logits of [C, d] hidden states."""
        return self.scaled(torch.nn.functional.linear(hidden, self.weight, self.bias).float())

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
) -> Losses:
    """Sum over positions of L = λ·L_CLM + (1−λ)·L_Fusion (FuseLLM, eq. 4; DESIGN section 6).

    Args:
        hidden: [N, d] last hidden states of the positions that predict.
        labels: [N] int64, the true next tokens.
        outcomes: fused distributions of the N positions; None where there are none.
        clm_weight: λ, the weight of L_CLM at positions with a fused distribution; elsewhere it
            is 1.

    Returns:
        `total`, and its parts: `clm` over all positions, `fusion` over those with a fused
        distribution, both unweighted.

    >>> hidden = torch.zeros(3, 2)
    >>> losses = objective(hidden, Head(torch.zeros(4, 2)), torch.tensor([0, 1, 2]))
    >>> round(losses.total.item() / 3, 4)
    1.3863
    """
    if outcomes is None:
        outcomes = Outcomes.none(len(labels), hidden.device)
    wants_gradient = torch.is_grad_enabled()  # inside a Function's forward it never is
    total, clm, fusion = _Objective.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, outcomes, clm_weight, wants_gradient
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
        clm_weight: float,
        wants_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants = [wants_gradient and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        d_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        )
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        budget = _CHUNK_ELEMENTS_GPU if hidden.is_cuda else _CHUNK_ELEMENTS
        chunk = max(1, budget // weight.shape[0])
        cuts = _Cuts(outcomes, chunk)
        head = Head(weight, bias, head.scale, head.softcap)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = head.logits(hidden[rows])
            d_logits, parts = _chunk_losses(
                logits, labels[rows], cuts.chunk(start), clm_weight, any(wants)
            )
            sums += parts
            if d_logits is None:
                continue
            if head.softcap is not None:
                d_logits *= 1 - (logits / head.softcap) ** 2
            if head.scale != 1.0:
                d_logits *= head.scale
            narrow = d_logits.to(weight.dtype)
            if d_hidden is not None:
                if d_hidden.dtype == weight.dtype:
                    torch.mm(narrow, weight, out=d_hidden[rows])
                else:  # autocast over float32 weights
                    d_hidden[rows] = narrow @ weight
            if d_weight is not None:
                if d_weight.dtype == weight.dtype == hidden.dtype:
                    d_weight.addmm_(narrow.t(), hidden[rows])
                else:
                    d_weight += narrow.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.gradients = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        total, clm, fusion = sums.to(torch.float32).unbind()
        ctx.mark_non_differentiable(clm, fusion)
        return total, clm, fusion

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grad_outputs[0]
        return (
            *(None if g is None else g * scale.to(g.dtype) for g in ctx.gradients),
            None,
            None,
            None,
            None,
            None,
        )


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


def _chunk_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    outcomes: Outcomes,
    clm_weight: float,
    wants_gradient: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gradient of the chunk's loss in its logits, and (total, clm, fusion)."""
    index = torch.arange(len(labels), device=labels.device)
    fusion_weight = torch.where(outcomes.present, 1.0 - clm_weight, 0.0)
    clm_weights = torch.where(outcomes.present, clm_weight, 1.0)
    log_z = torch.logsumexp(logits, dim=-1)
    clm = log_z - logits[index, labels]
    fusion = torch.zeros_like(clm)

    position = outcomes.position[outcomes.part]
    member_row = position[outcomes.member_outcome]
    member_log_p = logits[member_row, outcomes.member_id] - log_z[member_row]
    log_mass = _logsumexp_by(member_log_p, outcomes.member_outcome, len(position))
    fusion.index_add_(0, position, -outcomes.mass * log_mass)
    rest = _Rest.of(logits, outcomes)
    if rest is not None:
        fusion.index_add_(0, rest.position, -rest.mass * (rest.log_z - log_z[rest.position]))

    parts = torch.stack(
        [(clm_weights * clm + fusion_weight * fusion).sum(), clm.sum(), fusion.sum()]
    ).double()
    if not wants_gradient:
        return None, parts
    gradient = torch.exp(logits - log_z[:, None])
    mass_sum = torch.zeros_like(clm).index_add_(0, position, outcomes.mass)
    if rest is not None:
        mass_sum.index_add_(0, rest.position, rest.mass)
    gradient *= (clm_weights + fusion_weight * mass_sum)[:, None]
    gradient[index, labels] -= clm_weights
    share = torch.exp(member_log_p - log_mass[outcomes.member_outcome])
    pull = fusion_weight[member_row] * outcomes.mass[outcomes.member_outcome] * share
    gradient.index_put_((member_row, outcomes.member_id), -pull, accumulate=True)
    if rest is not None:
        spread = torch.exp(rest.outside - rest.log_z[:, None])
        spread *= (fusion_weight[rest.position] * rest.mass)[:, None]
        gradient.index_add_(0, rest.position, spread, alpha=-1)
    return gradient, parts


class _Rest(NamedTuple):
    """The parts with mass outside their outcomes, where the target has ids outside them.

    Attributes:
        position: [R'] of each such part.
        mass: [R'].
        outside: [R', V] logits, -inf at the ids of the part's outcomes.
        log_z: [R'] log-sum-exp of these.
    """

    position: torch.Tensor
    mass: torch.Tensor
    outside: torch.Tensor
    log_z: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, outcomes: Outcomes) -> "_Rest | None":
        with_rest = outcomes.rest > 0
        if not bool(with_rest.any()):
            return None
        place = torch.cumsum(with_rest, 0) - 1
        member_part = outcomes.part[outcomes.member_outcome]
        masked = with_rest[member_part]
        position = outcomes.position[with_rest]
        outside = logits[position]
        outside[place[member_part[masked]], outcomes.member_id[masked]] = -torch.inf
        log_z = torch.logsumexp(outside, dim=-1)
        some_left = log_z > -torch.inf
        mass = torch.where(some_left, outcomes.rest[with_rest], 0.0)
        return cls(position, mass, outside, torch.where(some_left, log_z, 0.0))


def _logsumexp_by(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    highest = values.new_full((groups,), -torch.inf).scatter_reduce_(0, group, values, "amax")
    sums = values.new_zeros(groups).index_add_(0, group, torch.exp(values - highest[group]))
    return highest + torch.log(sums)
