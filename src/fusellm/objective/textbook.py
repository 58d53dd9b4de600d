"""The objective as the design writes it, dense and slow: the oracle of the chunked version.

N positions, V vocabulary.
"""

import torch

from fusellm.objective.outcomes import Outcomes


def objective_textbook(
    logits: torch.Tensor, labels: torch.Tensor, outcomes: Outcomes, clm_weight: float
) -> torch.Tensor:
    """Sum over positions of L = λ·L_CLM + (1−λ)·L_Fusion (FuseLLM, eq. 4; DESIGN section 6).

    Where a position has no fused distribution its loss is L_CLM alone.

    Args:
        logits: [N, V].
        labels: [N] int64, the true next tokens.
        clm_weight: λ.

    Returns:
        Scalar, in nats, of the dtype of `logits`.

    >>> logits = torch.zeros(1, 4)
    >>> round(objective_textbook(logits, torch.tensor([2]), Outcomes.none(1), 0.9).item(), 4)
    1.3863
    """
    log_p = torch.log_softmax(logits, dim=-1)
    total = logits.new_zeros(())
    for n in range(len(labels)):
        clm = -log_p[n, labels[n]]
        if not outcomes.present[n]:
            total = total + clm
            continue
        fusion = logits.new_zeros(())
        for part in torch.nonzero(outcomes.position == n)[:, 0].tolist():
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            for m in torch.nonzero(outcomes.part == part)[:, 0].tolist():
                members = outcomes.member_id[outcomes.member_outcome == m]
                outside[members] = False
                mass = outcomes.mass[m].to(logits.dtype)
                fusion = fusion - mass * log_p[n, members].logsumexp(0)
            rest = outcomes.rest[part].to(logits.dtype)
            if rest > 0 and bool(outside.any()):
                fusion = fusion - rest * log_p[n, outside].logsumexp(0)
        total = total + clm_weight * clm + (1 - clm_weight) * fusion
    return total
