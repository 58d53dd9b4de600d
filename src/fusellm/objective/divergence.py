"""Loss and gradient of one chunk of positions, in its logits.

C positions, R parts, M outcomes in all, E members in all, V vocabulary. Q is the target's
distribution, P the fused one; an outcome's Q is the sum over its ids.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fusellm.errors import ArgumentError
from fusellm.objective.outcomes import Outcomes

Kind = Literal["cross_entropy", "kl", "reverse_kl"]
LEAST_MASS = 1e-8  # of P under a logarithm in the reverse KL: 18 nats
_LEAST_SUM = 1e-30  # of Q; below it, a sum of float32 probabilities has no digits left


@dataclass(frozen=True)
class Divergence:
    """How far the target's distribution is from the fused one.

    Attributes:
        kind: `cross_entropy` and `kl` from fused to target, whose gradients are one, or
            `reverse_kl` from target to fused.
        temperature: by which the target's distribution is flattened, as the fused one already is;
            the loss is scaled by its square, so that the gradient keeps its size. Other than 1 it
            is for single tokens whose masses sum to 1.
    """

    kind: Kind = "cross_entropy"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check that all of it has a meaning.

        Raises:
            ArgumentError: it has not.
        """
        if self.kind not in get_args(Kind):
            raise ArgumentError(
                f"{self.kind!r} is no divergence; known: {', '.join(get_args(Kind))}"
            )
        if not self.temperature > 0:
            raise ArgumentError(f"temperature is {self.temperature}; it must be above 0")


CROSS_ENTROPY = Divergence()


def chunk_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    outcomes: Outcomes,
    weights: tuple[torch.Tensor, torch.Tensor],
    divergence: Divergence,
    wants_gradient: bool,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Loss of a chunk, and its gradient in the logits.

    Args:
        logits: [C, V] float32.
        weights: [C] of L_CLM and [C] of L_Fusion at each position.
        out: [C or more, V] float32, which may be used for the gradient.

    Returns:
        ([C, V] gradient of the total, or None; [3] float64 total, sum of L_CLM, sum of L_Fusion)
    """
    clm_weight, fusion_weight = weights
    index = torch.arange(len(labels), device=labels.device)
    p, log_z = _softmax(logits, out)
    clm = log_z - logits[index, labels]
    t = divergence.temperature
    if t == 1.0:
        fusion = _diverge(logits, p, log_z, outcomes, fusion_weight, clm_weight, divergence)
    else:
        warm = logits / t
        warm_p, warm_log_z = _softmax(warm)
        warm_weight = t * t * fusion_weight
        nothing = torch.zeros_like(clm_weight)
        fusion = _diverge(warm, warm_p, warm_log_z, outcomes, warm_weight, nothing, divergence)
        fusion = t * t * fusion
        p.mul_(clm_weight[:, None]).add_(warm_p, alpha=1 / t)
    total = (clm_weight * clm + fusion_weight * fusion).sum()
    sums = torch.stack([total, clm.sum(), fusion.sum()]).double()
    if not wants_gradient:
        return None, sums
    p[index, labels] -= clm_weight
    return p, sums


def _softmax(
    logits: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([C, V] probabilities, [C] log of what they were divided by), in two passes."""
    highest, where = logits.max(dim=-1)
    p = torch.softmax(logits, dim=-1, out=None if out is None else out[: len(logits)])
    return p, highest - torch.log(p.gather(1, where[:, None])[:, 0])


# The target gives id j the probability q_j = exp(z_j − log_z), and an outcome o, which is a set
# of ids, Q_o = Σ q_j over its ids. The loss is a sum of terms in log Q_o, so it is enough to know
# c_o, the derivative of the loss in log Q_o. As
#
#     ∂ log Q_o / ∂ z_j = [j in o] · q_j / Q_o − q_j,
#
# the gradient in a logit is its outcome's c, shared out within the outcome, less what all pull:
#
#     ∂ loss / ∂ z_j = c_o(j) · q_j / Q_o(j) − q_j · Σ_o c_o.
#
# The ids in no outcome of a part are one more outcome, the rest. Of cross-entropy c_o is −mass_o.
#
# Example: q = (0.4, 0.3, 0.2, 0.1); {0, 1} has mass 0.5, {2} 0.3, and the rest, {3}, 0.2.
# c = (−0.5, −0.3, −0.2), whose sum is −1. So z_0 gets −0.5 · 0.4/0.7 + 0.4 = 0.114, z_1
# −0.5 · 0.3/0.7 + 0.3 = 0.086, z_2 −0.3 + 0.2 = −0.1, and z_3 −0.2 + 0.1 = −0.1. They sum to 0,
# as they must: a constant added to all logits changes nothing.
#
# Nothing of size [C, V] is made beside `p`: the few ids in outcomes are set one by one (`place`
# is where they are in `p` laid flat), all others of a row are multiplied by one number.
def _diverge(
    logits: torch.Tensor,
    p: torch.Tensor,
    log_z: torch.Tensor,
    outcomes: Outcomes,
    weight: torch.Tensor,
    base: torch.Tensor,
    divergence: Divergence,
) -> torch.Tensor:
    """[C] divergence at each position; `p` becomes its weighted gradient, and `base` · `p` more."""
    row = outcomes.position[outcomes.part]
    member_row, ids = row[outcomes.member_outcome], outcomes.member_id
    place = member_row * p.shape[1] + ids
    flat = p.view(-1)
    log_q_of_id = logits.view(-1)[place] - log_z[member_row]
    log_q = _logsumexp_by(log_q_of_id, outcomes.member_outcome, len(row))

    # Positions of one part, which are most: p without the ids in its outcomes sums to its rest.
    single = torch.bincount(outcomes.position, minlength=len(log_z))[outcomes.position] == 1
    member_single = single[outcomes.part[outcomes.member_outcome]]
    single_place = place[member_single]
    p_of_id = flat[single_place]
    flat[single_place] = 0.0  # what is left are the ids outside
    rest = _rests(logits, p, log_z, outcomes, single, divergence)

    of_part = torch.zeros_like(outcomes.rest).index_add_(0, outcomes.part, outcomes.mass)
    of_part += outcomes.rest
    loss, c = _terms(outcomes.mass, of_part[outcomes.part], log_q, divergence)
    rest_loss, rest_c = _terms(rest.mass, of_part[rest.part], rest.log_q, divergence)
    rest_row = outcomes.position[rest.part]
    losses = torch.zeros_like(log_z).index_add_(0, row, loss).index_add_(0, rest_row, rest_loss)

    c, rest_c = weight[row] * c, weight[rest_row] * rest_c
    # What every id of a row is multiplied by: base − Σ c.
    factor = base.clone().index_add_(0, row, -c).index_add_(0, rest_row, -rest_c)
    # Ids outside a single part's outcomes all have one factor; log_q of it is never below its
    # threshold there. The others get their share row by row.
    outside = factor.clone().index_add_(
        0, rest_row[rest.fast], (rest_c / torch.exp(rest.log_q))[rest.fast]
    )
    p.mul_(outside[:, None])
    pull = c[outcomes.member_outcome] * torch.exp(log_q_of_id - log_q[outcomes.member_outcome])
    flat[single_place] = p_of_id * factor[member_row[member_single]] + pull[member_single]
    flat.index_add_(0, place[~member_single], pull[~member_single])
    slow = ~rest.fast
    if rest.outside is not None:
        spread = torch.exp(rest.outside - (rest.log_q + log_z[rest_row])[slow, None])
        p.index_add_(0, rest_row[slow], spread.mul_(rest_c[slow, None]))
    return losses


def _terms(
    mass: torch.Tensor, of_part: torch.Tensor, log_q: torch.Tensor, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its derivative in log Q) of outcomes.

    Args:
        of_part: the mass of the whole part that each belongs to.
    """
    if divergence.kind == "reverse_kl":
        own = (mass / of_part).clamp_min(LEAST_MASS)
        q = torch.exp(log_q)
        apart = torch.where(q > 0, log_q - torch.log(own), 0.0)
        return of_part * q * apart, of_part * q * (apart + 1)
    loss = torch.where(mass > 0, -mass * log_q, 0.0)
    if divergence.kind == "kl":
        loss += torch.special.xlogy(mass, mass / of_part)
    return loss, -mass


@dataclass(frozen=True)
class _Rests:
    """What parts say of the ids outside their outcomes.

    Attributes:
        part: [R'] of those that say something, where there are such ids.
        mass: [R'] of P.
        log_q: [R'].
        fast: [R'] bool, the only part of its position, with enough of Q outside.
        outside: [R' that are not fast, V] logits, −inf at ids of the part's outcomes; or None.
    """

    part: torch.Tensor
    mass: torch.Tensor
    log_q: torch.Tensor
    fast: torch.Tensor
    outside: torch.Tensor | None


def _rests(
    logits: torch.Tensor,
    p: torch.Tensor,
    log_z: torch.Tensor,
    outcomes: Outcomes,
    single: torch.Tensor,
    divergence: Divergence,
) -> _Rests:
    """The rests of all parts that say something of one.

    log Q of the ids outside is a sum over nearly all of the vocabulary. Where a position has one
    part, `p` has it already (fast). With several parts, or where next to nothing is left and a
    float32 sum would be noise, it is computed from the logits, masked, in log space (slow).

    Args:
        p: zero at the ids of single parts' outcomes.
    """
    asked = outcomes.rest > 0
    if divergence.kind == "reverse_kl":
        asked = torch.ones_like(asked)
    part = torch.nonzero(asked)[:, 0]
    if not len(part):
        nothing = outcomes.rest[:0]
        return _Rests(part, nothing, nothing, nothing.bool(), None)
    position = outcomes.position[part]
    q = p.sum(dim=-1)[position]
    fast = single[part] & (q > _LEAST_SUM)
    log_q = torch.log(torch.where(fast, q, 1.0))
    outside = None
    if not bool(fast.all()):
        slow = part[~fast]
        place = torch.full_like(outcomes.position, -1)
        place[slow] = torch.arange(len(slow), device=slow.device)
        of_member = place[outcomes.part[outcomes.member_outcome]]
        masked = of_member >= 0
        outside = logits[outcomes.position[slow]]
        outside[of_member[masked], outcomes.member_id[masked]] = -torch.inf
        log_q[~fast] = torch.logsumexp(outside, dim=-1) - log_z[position[~fast]]
    some = log_q > -torch.inf
    if outside is not None:
        outside = outside[some[~fast]]
    return _Rests(part[some], outcomes.rest[part[some]], log_q[some], fast[some], outside)


def _logsumexp_by(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    highest = values.new_full((groups,), -torch.inf).scatter_reduce_(0, group, values, "amax")
    sums = values.new_zeros(groups).index_add_(0, group, torch.exp(values - highest[group]))
    return highest + torch.log(sums)
