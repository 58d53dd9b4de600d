"""Fusion functions: with what weight each source's distribution stands at each target position.

A fusion function takes what the sources have in common to be compared by, and gives weights [S, N]:
at each position they sum to 1 over the sources aligned there, and are 0 where none is. Another one
is another function here, a row in `FUNCTIONS`, and its name in `config/fusion.py` (docs/extend.md).

S sources, in the recipe's order; N target positions that predict.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Compared:
    """What a fusion function may look at.

    Attributes:
        aligned: [S, N] bool, whether a source has a distribution at a position.
        cross_entropy: [S, N] of each source against the text, by the recipe's measure: bits per
            byte over the block or a window, or nats per token over the block; without hindsight of
            what stands before the position alone.
        nats_per_token: [S, N] mean over the source's tokens of the block.
        next_nats: [S, N] of the bytes of the true next token.
        nats_so_far: [S, N] of the block's bytes before the position.
        routed: [N] number of the source that alone is to be heard, -1 for none; None without
            routes.
        beta: sharpness of `avgce`.
    """

    aligned: np.ndarray
    cross_entropy: np.ndarray
    nats_per_token: np.ndarray
    next_nats: np.ndarray
    nats_so_far: np.ndarray
    routed: np.ndarray | None
    beta: float


def _least(cost: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """One for the aligned source of least cost; of equals, for the one named first."""
    first = np.where(aligned, cost, np.inf).argmin(axis=0)
    weights = np.zeros(cost.shape)
    weights[first, np.arange(cost.shape[1])] = 1.0
    return np.where(aligned, weights, 0.0)


def _softmax(score: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    highest = np.where(aligned, score, -np.inf).max(axis=0, initial=-np.inf)
    shifted = np.exp(np.where(aligned, score - np.where(np.isinf(highest), 0, highest), -np.inf))
    return np.asarray(shifted / np.maximum(shifted.sum(axis=0), np.finfo(np.float64).tiny))


def mince(compared: Compared) -> np.ndarray:
    """MinCE: the source with the least cross-entropy against the text (FuseLLM, fusion strategies).

    Of equals, the source named first.
    """
    return _least(compared.cross_entropy, compared.aligned)


def avgce(compared: Compared) -> np.ndarray:
    """AvgCE with a sharpness: weights ∝ exp(−β · cross-entropy).

    β = 0 is the plain mean; a large β is MinCE.
    """
    return _softmax(-compared.beta * compared.cross_entropy, compared.aligned)


def avgce_paper(compared: Compared) -> np.ndarray:
    """AvgCE by the authors' formula: softmax(exp(−nats per token)).

    On 1.8, 2.4 and 3.0 nats that is .355, .329, .316: nearly a plain mean.
    """
    return _softmax(np.exp(-compared.nats_per_token), compared.aligned)


def uniform(compared: Compared) -> np.ndarray:
    """The plain mean of the aligned sources."""
    return _softmax(np.zeros(compared.aligned.shape), compared.aligned)


def best(compared: Compared) -> np.ndarray:
    """An oracle, for studies: the source that gives the true next token most probability.

    It looks at the very token that is to be predicted, as its own tokenizer spells it. Of equals,
    the source named first.
    """
    return _least(compared.next_nats, compared.aligned)


def bayes(compared: Compared) -> np.ndarray:
    """The Bayes mixture: each source by its probability, given the text of the block so far.

    At first all are equal; then wₛ ∝ exp(−nats so far). It has no setting and no hindsight. Where
    all are aligned, a block costs the mixture, in nats, no more than the best source and log S
    (Littlestone and Warmuth 1994).
    """
    return _softmax(-compared.nats_so_far, compared.aligned)


def route(compared: Compared) -> np.ndarray:
    """The source that the recipe names for the domain of the text, a control without any measure.

    Where that source is not aligned, none is heard.
    """
    assert compared.routed is not None, "the settings do not let `route` go without routes"
    sources = np.arange(len(compared.aligned))[:, None]
    return np.where(compared.aligned & (sources == compared.routed), 1.0, 0.0)


FUNCTIONS: dict[str, Callable[[Compared], np.ndarray]] = {
    "mince": mince,  # FuseLLM, ICLR 2024
    "avgce": avgce,  # the same section, with a sharpness
    "avgce_paper": avgce_paper,  # the same, as the authors' code has it
    "uniform": uniform,
    "best": best,
    "bayes": bayes,
    "route": route,
}
