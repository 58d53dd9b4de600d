"""The objective as the design writes it, dense and slow: the oracle of the chunked version.

N positions, V vocabulary.
"""

import torch

from fusellm.objective.divergence import CROSS_ENTROPY, LEAST_MASS, Divergence
from fusellm.objective.outcomes import Outcomes


def objective_textbook(
    logits: torch.Tensor,
    labels: torch.Tensor,
    outcomes: Outcomes,
    clm_weight: float,
    divergence: Divergence = CROSS_ENTROPY,
) -> torch.Tensor:
    """Sum over positions of L = λ·L_CLM + (1−λ)·L_Fusion (FuseLLM, eq. 4; docs/method.md).

    Where a position has no fused distribution its loss is L_CLM alone.

    Args:
        logits: [N, V].
        labels: [N] int64, the true next tokens.
        clm_weight: λ.
        divergence: what L_Fusion is.

    Returns:
        Scalar, in nats, of the dtype of `logits`.

    >>> logits = torch.zeros(1, 4)
    >>> round(objective_textbook(logits, torch.tensor([2]), Outcomes.none(1), 0.9).item(), 4)
    1.3863
    """
    log_p = torch.log_softmax(logits, dim=-1)
    t = divergence.temperature
    log_q = torch.log_softmax(logits / t, dim=-1)
    total = logits.new_zeros(())
    for n in range(len(labels)):
        clm = -log_p[n, labels[n]]
        if not outcomes.present[n]:
            total = total + clm
            continue
        fusion = logits.new_zeros(())
        for part in torch.nonzero(outcomes.position == n)[:, 0].tolist():
            of_part = outcomes.part == part
            whole = (outcomes.mass[of_part].sum() + outcomes.rest[part]).to(logits.dtype)
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            for m in torch.nonzero(of_part)[:, 0].tolist():
                members = outcomes.member_id[outcomes.member_outcome == m]
                outside[members] = False
                mass = outcomes.mass[m].to(logits.dtype)
                fusion = fusion + _term(mass, whole, log_q[n, members].logsumexp(0), divergence)
            rest = outcomes.rest[part].to(logits.dtype)
            if (rest > 0 or divergence.kind == "reverse_kl") and bool(outside.any()):
                fusion = fusion + _term(rest, whole, log_q[n, outside].logsumexp(0), divergence)
        total = total + clm_weight * clm + (1 - clm_weight) * t * t * fusion
    return total


def _term(
    mass: torch.Tensor, whole: torch.Tensor, log_q: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """One outcome's share of the divergence.

    Args:
        whole: mass of the part that it belongs to.
    """
    if divergence.kind == "reverse_kl":
        own = (mass / whole).clamp_min(LEAST_MASS)
        return whole * log_q.exp() * (log_q - own.log())
    if mass == 0:
        return 0 * log_q
    return mass * ((mass / whole).log() if divergence.kind == "kl" else 0) - mass * log_q
