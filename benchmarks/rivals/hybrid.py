"""GOLD's hybrid loss: tokens that both vocabularies have, and the others by sorted probabilities.

Of the tokens of equal bytes a divergence is taken between the probabilities as they are, not
scaled to sum to 1. Of all others the probabilities are sorted on both sides, largest first, and
compared rank by rank, by the absolute difference (Universal Logit Distillation, arXiv
2402.12030). Which token a rank is of is not asked. The two are weighted by the share of the
source's tokens that are matched, and the rest of it.

Read for it: TRL's `trl/experimental/gold/gold_trainer.py`, `ULDLoss`. As there: the weights
(`uld_hybrid_*_weight: None`), temperatures 1, 1e-8 as the least probability of a logarithm, the
token for the end of a text left out (`uld_skip_*_eos`), and, of a piece of text in several
tokens, the distribution of the first, times the probabilities of the true tokens after it
(`use_extended_uld`). There the divergence is Jensen-Shannon's by default (`beta: 0.5`); it is KL
from the source with `beta: 0`, which the paper of X-Token and NeMo-RL compare with, and the
default here. Otherwise than there: tokens are matched by bytes, not by how they are written, so
that more are.

N positions, Vt and Vs tokens of the target's and the source's vocabulary, m matched ones.
"""

import math
from dataclasses import dataclass

import torch

from fusellm.alignment.translation import FirstTokens
from fusellm.tokens.encode import Encoder

_LEAST = 1e-8


@dataclass(frozen=True)
class Matched:
    """Tokens of equal bytes.

    Attributes:
        target, source: [m] int64 ids.
        target_others, source_others: [Vt − m], [Vs − m] int64 ids of all others.
    """

    target: torch.Tensor
    source: torch.Tensor
    target_others: torch.Tensor
    source_others: torch.Tensor

    @classmethod
    def of_ids(
        cls, target: list[int], source: list[int], target_rows: int, source_rows: int
    ) -> "Matched":
        """From pairs of ids, and Vt and Vs."""

        def others(ids: list[int], rows: int) -> torch.Tensor:
            left = torch.ones(rows, dtype=torch.bool)
            left[ids] = False
            return left.nonzero()[:, 0]

        pairs = torch.tensor([target, source], dtype=torch.int64)
        return cls(pairs[0], pairs[1], others(target, target_rows), others(source, source_rows))

    @property
    def share(self) -> float:
        """Of the source's tokens those that are matched, the weight of the divergence."""
        return len(self.source) / max(1, len(self.source) + len(self.source_others))


def matched_tokens(source: Encoder, target: Encoder, source_rows: int, target_rows: int) -> Matched:
    """The tokens of equal bytes of two tokenizers, and those for the end of a text."""
    of_source, of_target = FirstTokens(source).by_bytes, FirstTokens(target).by_bytes
    both = [
        (of_target[token], id_)
        for token, id_ in of_source.items()
        if token in of_target and id_ < source_rows and of_target[token] < target_rows
    ]
    eos = target.vocabulary.eos_id, source.vocabulary.eos_id
    if eos[0] is not None and eos[1] is not None:
        both.append((eos[0], eos[1]))
    return Matched.of_ids([t for t, _ in both], [s for _, s in both], target_rows, source_rows)


def hybrid_loss(
    target_log_probs: torch.Tensor,
    source_log_probs: torch.Tensor,
    matched: Matched,
    target_rest: torch.Tensor | None = None,
    source_rest: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of both parts, a mean over positions.

    Args:
        target_log_probs: [N, Vt].
        source_log_probs: [N, Vs], constants.
        target_rest, source_rest: [N] log-probability of the true tokens of the piece of text after
            its first; None where all pieces are of one token.
        beta: 0 is KL(source ‖ target), 1 KL(target ‖ source), between the two Jensen-Shannon's.
    """
    if target_rest is not None:
        target_log_probs = target_log_probs + target_rest[:, None]
    if source_rest is not None:
        source_log_probs = source_log_probs + source_rest[:, None]
    divergence = _divergence(
        target_log_probs[:, matched.target], source_log_probs[:, matched.source], beta
    )
    ranks = _ranks_apart(
        target_log_probs[:, matched.target_others].exp(),
        source_log_probs[:, matched.source_others].exp(),
    )
    return matched.share * divergence.mean() + (1 - matched.share) * ranks.mean()


def _divergence(target: torch.Tensor, source: torch.Tensor, beta: float) -> torch.Tensor:
    """[N] the generalized Jensen-Shannon divergence of [N, m] log-probabilities."""
    target, source = target.clamp(min=math.log(_LEAST)), source.clamp(min=math.log(_LEAST))
    if beta == 0:
        return (source.exp() * (source - target)).sum(-1)
    if beta == 1:
        return (target.exp() * (target - source)).sum(-1)
    mixed = torch.logaddexp(target + math.log(1 - beta), source + math.log(beta))
    of_source = (source.exp() * (source - mixed)).sum(-1)
    of_target = (target.exp() * (target - mixed)).sum(-1)
    return beta * of_source + (1 - beta) * of_target


def _ranks_apart(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """[N] sum of |difference| between two rows of probabilities, sorted, the shorter with zeros.

    Ranks beyond the target's last are compared with 0: their sum needs no order.
    """
    if not target.shape[-1] or not source.shape[-1]:
        return target.new_zeros(len(target))
    both = min(target.shape[-1], source.shape[-1])
    target_top = target.topk(both, dim=-1).values
    source_top = source.topk(both, dim=-1).values
    beyond = target.sum(-1) - target_top.sum(-1) + source.sum(-1) - source_top.sum(-1)
    return (target_top - source_top).abs().sum(-1) + beyond
