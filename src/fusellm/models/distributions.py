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

_CHUNK_ELEMENTS = 1 << 20  # of N x V float32 at a time: a few MB, which stay in cache on a CPU
_CHUNK_ELEMENTS_GPU = 1 << 26


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
    budget = _CHUNK_ELEMENTS_GPU if hidden.is_cuda else _CHUNK_ELEMENTS
    chunk = max(1, budget // len(has_token))
    missing = None if bool(has_token.all()) else ~has_token
    last = int(torch.nonzero(has_token)[-1])
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = head.logits(hidden[rows])
        if missing is not None:
            logits.masked_fill_(missing, -torch.inf)
        highest = logits.amax(dim=-1, keepdim=True)
        true = logits.gather(1, true_ids[rows, None]) - highest
        if settings.scheme == "sampled":
            weights = logits.sub_(highest).exp_()  # one pass through exp serves draws and sum
            *chosen, whole = _draw(weights, shift[rows], settings.draws, last)
        else:
            *chosen, whole = _top(logits, highest, settings.k, settings.mass)
        true = (true - torch.log(whole))[:, 0]
        if not bool(torch.isfinite(true).all()):
            raise NumericsError("NaN or infinity in a distribution")
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


_Chosen = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, torch.Tensor]


def _draw(weights: torch.Tensor, shift: torch.Tensor, draws: int, last: int) -> _Chosen:
    """Systematic draws: one uniform shift a position, then steps of 1/draws along the ids.

    An id of probability p is drawn floor(draws·p) or ceil(draws·p) times, draws·p on average: as
    unbiased as independent draws, with less variance.

    Args:
        weights: [C, V] probabilities times a constant of each position.
        last: the highest id with a token, for points that rounding puts past the end.

    Returns:
        (distinct ids [C], ids, counts, tail [C], sum of the weights [C, 1])
    """
    # In place of a float64 cumsum, which costs twice: the error of the last sum is scaled away.
    cumulative = torch.cumsum(weights, dim=-1)
    steps = torch.arange(draws, device=weights.device, dtype=torch.float64)
    points = ((steps + shift[:, None]) / draws * cumulative[:, -1:]).to(cumulative.dtype)
    drawn = torch.searchsorted(cumulative, points, right=True)
    drawn = drawn.clamp_(max=last)
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = is_new.flatten().cumsum(0) - 1
    counts = torch.bincount(group)
    tail = np.zeros(len(weights), dtype=np.float32)
    distinct = is_new.sum(-1).cpu().numpy()
    return distinct, drawn[is_new].cpu().numpy(), counts.cpu().numpy(), tail, cumulative[:, -1:]


def _top(logits: torch.Tensor, highest: torch.Tensor, k: int, mass: float | None) -> _Chosen:
    """(kept [C], ids, log-probabilities, tail [C], sum of exp(logits − highest) [C, 1])."""
    best = torch.topk(logits, min(k, logits.shape[-1]), dim=-1)
    whole = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_p = best.values - highest - torch.log(whole)
    p = torch.exp(log_p.double())
    kept = torch.isfinite(log_p)
    if mass is not None:
        kept[:, 1:] &= torch.cumsum(p, dim=-1)[:, :-1] < mass
    tail = (1.0 - torch.where(kept, p, 0.0).sum(-1)).clamp_(min=0.0).float()
    return (
        kept.sum(-1).cpu().numpy(),
        best.indices[kept].cpu().numpy(),
        log_p[kept].cpu().numpy(),
        tail.cpu().numpy(),
        whole,
    )
