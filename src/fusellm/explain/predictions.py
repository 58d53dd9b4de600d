"""What the target and the models trained from it say at the positions of a block.

N positions of the view; K best tokens; M outcomes and R parts of the fused distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.errors import NumericsError
from fusellm.evaluation.text.masses import sums_over_sets
from fusellm.fusion.cross_entropy import NATS_PER_BIT
from fusellm.models.heads import head_of
from fusellm.objective.chunked import Head
from fusellm.reading.batches import read_blocks
from fusellm.tokens.encode import Encoder

_BEST = 8
_LEAST = 1e-30  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Predicted:
    """A token, how it is spelled, and its probability."""

    id: int
    spelled: str
    probability: float


@dataclass(frozen=True)
class Predictions:
    """What one model says at the positions of a block.

    Attributes:
        best: [N][K] its most probable tokens, by probability.
        true: [N] probability of the true next token.
        rank: [N] of the true next token, 1 for the most probable one.
        divergence: [N] bits, KL of the fused distribution from it, over the fused outcomes; None
            where there is no fused distribution. With several parts, their weighted mean.
    """

    best: tuple[tuple[Predicted, ...], ...]
    true: tuple[float, ...]
    rank: tuple[int, ...]
    divergence: tuple[float | None, ...]


def predictions_of(
    model: PreTrainedModel,
    encoder: Encoder,
    ids: np.ndarray,
    first: int,
    fused: Fused,
    sets: Sequence[OutcomeSets],
) -> Predictions:
    """Ask a model that has the target's tokenizer.

    Args:
        ids: [T] of the whole block, as the target reads it.
        first: the position, among all but the last of `ids`, where the view's begin.
        fused: [N] fused distributions.
        sets: outcomes of each source, by its number in `fused`.

    Raises:
        ModelError: memory does not suffice for the block.
        NumericsError: the model gives NaN or infinity.
    """
    head, positions = head_of(model).widened(), len(fused.parts)
    every = OutcomeSets.concat(sets)
    base = offsets_of(np.array([len(of_source) for of_source in sets]))
    numbers = base[fused.source[fused.part_of_outcome]] + fused.outcomes
    pieces: list[_Said] = []

    def use(_: list[int], hidden: torch.Tensor, true_ids: torch.Tensor) -> None:
        own = slice(first, first + positions)
        # From the beginning: where memory ran out, a batch comes again.
        pieces[:] = _asked(head, hidden[own], true_ids[own], fused, numbers, every)

    for _ in read_blocks(model, [ids], None, use):
        pass
    said = _Said.concat(pieces)
    if not np.isfinite(said.true).all():
        raise NumericsError("the model gives NaN or infinity; its training may have diverged")
    divergence = _divergence(fused, said.log_masses, said.log_outside)
    best = tuple(
        tuple(
            Predicted(int(id_), encoder.spelled(int(id_)), float(probability))
            for id_, probability in zip(*of_position, strict=True)
        )
        for of_position in zip(said.best, said.probabilities, strict=True)
    )
    return Predictions(
        best,
        tuple(said.true.tolist()),
        tuple(said.rank.tolist()),
        tuple(None if np.isnan(bits) else float(bits) for bits in divergence),
    )


@dataclass(frozen=True)
class _Said:
    """What a model said at C positions, with P parts in which Q outcomes have mass.

    Attributes:
        best: [C, K] ids, by probability, and
        probabilities: [C, K].
        true: [C] probability of the true next token, and
        rank: [C].
        log_masses: [Q] nats, of the outcomes.
        log_outside: [P] nats, of what is in none of a part's outcomes.
    """

    best: np.ndarray
    probabilities: np.ndarray
    true: np.ndarray
    rank: np.ndarray
    log_masses: np.ndarray
    log_outside: np.ndarray

    @classmethod
    def concat(cls, several: Sequence["_Said"]) -> "_Said":
        names = [field.name for field in fields(cls)]
        none = [np.zeros(0)] if not several else []
        return cls(*(np.concatenate([getattr(s, name) for s in several] + none) for name in names))


def _asked(
    head: Head,
    hidden: torch.Tensor,
    true_ids: torch.Tensor,
    fused: Fused,
    numbers: np.ndarray,
    sets: OutcomeSets,
) -> list[_Said]:
    """Ask at N positions, a chunk of them at a time.

    Args:
        numbers: [M] the outcome of `sets` that each of `fused` is.
    """
    pieces, chunk = [], head.rows_to_read()
    rows = fused.position_of_part[fused.part_of_outcome]
    for start in range(0, len(hidden), chunk):
        logits = head.logits(hidden[start : start + chunk])
        log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        true = log_probs.gather(1, true_ids[start : start + chunk, None])
        best = log_probs.topk(min(_BEST, log_probs.shape[1]))
        ends = [start, start + len(log_probs)]
        own = slice(*np.searchsorted(rows, ends))
        parts = slice(*np.searchsorted(fused.position_of_part, ends))
        part = fused.part_of_outcome[own] - parts.start
        of_part = fused.position_of_part[parts] - start
        pieces.append(
            _Said(
                best.indices.cpu().numpy(),
                best.values.exp().cpu().numpy(),
                true[:, 0].exp().cpu().numpy(),
                1 + (log_probs > true).sum(1).cpu().numpy(),
                sums_over_sets(log_probs, rows[own] - start, numbers[own], sets),
                _outside(log_probs, of_part, part, numbers[own], sets),
            )
        )
    return pieces


def _outside(
    log_probs: torch.Tensor,
    row: np.ndarray,
    part: np.ndarray,
    numbers: np.ndarray,
    sets: OutcomeSets,
) -> np.ndarray:
    """[P] nats of all ids that are in none of a part's outcomes.

    From the ids themselves: 1 − Σq would be noise where next to nothing is left.

    Args:
        log_probs: [C, V].
        row: [P] of each part, and
        part: [Q] of each outcome.
    """
    place = log_probs.device
    rest = log_probs[torch.from_numpy(row).to(place)]
    ids, which = sets.take(numbers)
    known = ids < log_probs.shape[1]
    at = torch.from_numpy(part[which[known]]).to(place)
    rest[at, torch.from_numpy(ids[known]).to(place)] = -torch.inf
    logs: np.ndarray = torch.logsumexp(rest.double(), dim=-1).cpu().numpy()
    return logs


def _divergence(fused: Fused, log_masses: np.ndarray, log_outside: np.ndarray) -> np.ndarray:
    """[N] bits: KL of the fused distributions from a model's own; NaN where there is none.

    Part s of a position has weight w, outcomes of mass m and the rest r, m and r with w in them. A
    model gives these outcomes q, and o what is in none of them:
        KL = Σ_s [Σ m·log(m / w·q) + r·log(r / w·o)]

    Args:
        log_masses: [M] log q, nats.
        log_outside: [R] log o, nats.
    """
    part, parts = fused.part_of_outcome, len(fused.lengths)
    masses, rest = fused.masses.astype(np.float64), fused.rest.astype(np.float64)
    weight = fused.part_weights
    least = np.log(_LEAST)
    terms = masses * (_log(masses) - _log(weight[part]) - np.maximum(log_masses, least))
    of_part = np.bincount(part, weights=terms, minlength=parts)
    of_part += rest * (_log(rest) - _log(weight) - np.maximum(log_outside, least))
    sums = np.bincount(fused.position_of_part, weights=of_part, minlength=len(fused.parts))
    bits: np.ndarray = np.where(fused.parts > 0, np.maximum(sums, 0) / NATS_PER_BIT, np.nan)
    return bits


def _log(values: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.log(np.maximum(values, _LEAST))
    return logs
