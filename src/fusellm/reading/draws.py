"""Seeded draws from distributions: Sparse Logit Sampling (arXiv 2503.16870), drawn systematically.

C positions, V vocabulary.
"""

import numpy as np
import torch

from fusellm.compiled import compiled

_SPAN = 64  # ids whose weights are summed at a time; only where a draw falls are they told apart


def systematic_draws(weights: torch.Tensor, shift: torch.Tensor, draws: int) -> torch.Tensor:
    """Draws at one uniform shift a position, then at steps of 1/draws along the ids.

    An id of probability p is drawn floor(draws·p) or ceil(draws·p) times, draws·p on average: as
    unbiased as independent draws, with less variance.

    Args:
        weights: [C, V] float32 probabilities times a constant of each position.
        shift: [C] float64 in [0, 1).
        draws: at each position.

    Returns:
        [C, draws] int32 ids, ascending; some ids or other where weights are not finite.

    Example:
        >>> systematic_draws(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0.5]).double(), 4)
        tensor([[0, 0, 1, 2]], dtype=torch.int32)
    """
    how = by_spans if weights.device.type == "cpu" else by_cumulative_sum
    return how(weights, shift, draws)


def by_cumulative_sum(weights: torch.Tensor, shift: torch.Tensor, draws: int) -> torch.Tensor:
    """`systematic_draws`, for devices that sum in parallel."""
    # In place of a float64 cumsum, which costs twice: the error of the last sum is scaled away.
    cumulative = torch.cumsum(weights, dim=-1)
    steps = torch.arange(draws, device=weights.device, dtype=torch.float64)
    points = ((steps + shift[:, None]) / draws * cumulative[:, -1:]).to(cumulative.dtype)
    drawn = torch.searchsorted(cumulative, points, right=True)
    return drawn.clamp_(max=weights.shape[1] - 1).int()


def by_spans(weights: torch.Tensor, shift: torch.Tensor, draws: int) -> torch.Tensor:
    """`systematic_draws` on a CPU, where each term of a cumulative sum waits for the last one."""
    full, rest = weights.tensor_split([weights.shape[1] // _SPAN * _SPAN], dim=1)
    sums = torch.cat([full.unflatten(1, (-1, _SPAN)).sum(-1), rest.sum(-1, keepdim=True)], dim=1)
    ids = np.empty((len(weights), draws), dtype=np.int32)
    _walk(weights.numpy(), sums.numpy(), shift.numpy(), ids)
    return torch.from_numpy(ids)


@compiled(nogil=True)
def _walk(weights: np.ndarray, sums: np.ndarray, shift: np.ndarray, ids: np.ndarray) -> None:
    """Pass over spans until a point falls into one, then over its ids.

    Args:
        sums: [C, spans] of each span's weights; the last may have fewer ids or none.
        ids: [C, draws], is filled.
    """
    # The weights laid end to end are a line of length `whole`; draw k hits the id under the point
    # (k + shift) / draws of it. Points ascend, so span and id only move on: V/64 + 64·draws steps
    # in place of V. Weights 2 1 1, shift 0.5, 4 draws: points 0.5 1.5 2.5 3.5, ids 0 0 1 2.
    draws, last = ids.shape[1], weights.shape[1] - 1
    for c in range(len(weights)):
        whole = 0.0
        for sum_ in sums[c]:
            whole += sum_
        span, below = 0, 0.0  # below: weight of the spans that have been passed
        id_, upto = 0, float(weights[c, 0])  # upto: weight of the ids as far as this one
        for draw in range(draws):
            point = (draw + shift[c]) / draws * whole
            while below + sums[c, span] <= point and (span + 1) * _SPAN <= last:
                below += sums[c, span]
                span += 1
                id_ = span * _SPAN
                upto = below + weights[c, id_]
            end = min((span + 1) * _SPAN - 1, last)
            while upto <= point and id_ < end:
                id_ += 1
                upto += weights[c, id_]
            ids[c, draw] = id_
