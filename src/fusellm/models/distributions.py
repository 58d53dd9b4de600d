"""What is kept of a model's distribution at each position.

N positions, K kept at a position, V vocabulary.
"""

import numpy as np
import torch

from fusellm.align.ragged import offsets_of
from fusellm.config import ExternalizeSettings
from fusellm.errors import NumericsError
from fusellm.fusion.kept import Kept
from fusellm.objective.chunked import Head

_CHUNK_ELEMENTS = 1 << 22  # of N x V float32 at a time


@torch.no_grad()
def keep(
    hidden: torch.Tensor,
    true_ids: torch.Tensor,
    head: Head,
    has_token: torch.Tensor,
    settings: ExternalizeSettings,
    seed: int,
) -> Kept:
    """Read a block's distributions.

    Log-probabilities come from a float32 log-softmax over the rows that have a token.

    Args:
        hidden: [N, d] last hidden states.
        true_ids: [N] int64.
        has_token: [V] bool.
        seed: of the draws, the block's own, so that the same block gives the same draws.

    Raises:
        NumericsError: a distribution has NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(len(hidden), generator=generator, dtype=torch.float64).to(hidden.device)
    pieces = []
    chunk = max(1, _CHUNK_ELEMENTS // len(has_token))
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = head.logits(hidden[rows]).masked_fill(~has_token, -torch.inf)
        log_p = torch.log_softmax(logits, dim=-1)
        true = log_p.gather(1, true_ids[rows, None])[:, 0]
        if not bool(torch.isfinite(true).all()):
            raise NumericsError("NaN or infinity in a distribution")
        chosen = (
            _draw(log_p, shift[rows], settings.draws)
            if settings.scheme == "sampled"
            else _top(log_p, settings.k, settings.mass)
        )
        pieces.append((*chosen, true.cpu().numpy()))
    lengths, ids, values, tail, true_log_prob = (
        np.concatenate(part) for part in zip(*pieces, strict=True)
    )
    sampled = settings.scheme == "sampled"
    nothing = np.zeros(0, dtype=np.float32)
    return Kept(
        offsets_of(lengths),
        ids,
        nothing if sampled else values,
        values.astype(np.uint8) if sampled else nothing.astype(np.uint8),
        tail,
        true_log_prob,
    )


_Chosen = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _draw(log_p: torch.Tensor, shift: torch.Tensor, draws: int) -> _Chosen:
    """Systematic draws: one uniform shift a position, then steps of 1/draws along the ids.

    An id of probability p is drawn floor(draws·p) or ceil(draws·p) times, draws·p on average: as
    unbiased as independent draws, with less variance.
    """
    # In place of a float64 cumsum, which costs twice: the error of the last sum is scaled away.
    cumulative = torch.cumsum(torch.exp(log_p), dim=-1)
    steps = torch.arange(draws, device=log_p.device, dtype=torch.float64)
    points = ((steps + shift[:, None]) / draws * cumulative[:, -1:]).to(cumulative.dtype)
    drawn = torch.searchsorted(cumulative, points, right=True)
    drawn = drawn.clamp_(max=_last_possible(log_p))
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = is_new.flatten().cumsum(0) - 1
    counts = torch.bincount(group)
    tail = np.zeros(len(log_p), dtype=np.float32)
    return is_new.sum(-1).cpu().numpy(), drawn[is_new].cpu().numpy(), counts.cpu().numpy(), tail


def _last_possible(log_p: torch.Tensor) -> int:
    return int(torch.nonzero(torch.isfinite(log_p[0]))[-1])


def _top(log_p: torch.Tensor, k: int, mass: float | None) -> _Chosen:
    best = torch.topk(log_p, min(k, log_p.shape[-1]), dim=-1)
    cumulative = torch.cumsum(torch.exp(best.values.double()), dim=-1)
    kept = torch.isfinite(best.values)
    if mass is not None:
        kept[:, 1:] &= cumulative[:, :-1] < mass
    kept_mass = torch.where(kept, torch.exp(best.values.double()), 0.0).sum(-1)
    tail = (1.0 - kept_mass).clamp_(min=0.0).float()
    return (
        kept.sum(-1).cpu().numpy(),
        best.indices[kept].cpu().numpy(),
        best.values[kept].cpu().numpy(),
        tail.cpu().numpy(),
    )
