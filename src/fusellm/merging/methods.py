"""The arithmetic of merging: tensors of one name and shape from several models become one.

Every function takes float32 tensors θ_1 … θ_n of one shape, and θ_0 of a base where it has one. It
gives a new one and changes none. τ_i = θ_i − θ_0 is the task vector of a model, what it has learnt
over the base (Ilharco et al. 2023). All is done tensor by tensor: where a paper looks at a whole
model at once, the function says so.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from fusellm.merging.settings import MergeSettings

Value = TypeVar("Value")
_SMALLEST_SINE = 1e-4
"""Below it an arc and its chord are the same: they differ by less than Ω² / 8 of a tensor."""


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean, θ = Σ w_i θ_i / Σ w_i.

    Source: the uniform soup of Wortsman et al. 2022 (arXiv 2203.05482, section 2), with weights.

    Args:
        weights: one for each tensor, whose sum is not 0.

    >>> linear([torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0])], [3, 1])
    tensor([1., 2.])
    """
    total = math.fsum(weights)
    return _weighted_sum(tensors, [weight / total for weight in weights])


def slerp(tensors: Sequence[torch.Tensor], t: float) -> torch.Tensor:
    """Along the arc from the first of two tensors to the second.

    With both as vectors and Ω the angle between them,
    θ = sin((1 − t) Ω) / sin Ω · θ_1 + sin(t Ω) / sin Ω · θ_2.

    Source: Shoemake 1985 (doi 10.1145/325334.325242), for vectors of length 1. Here, as in
    mergekit, the angle is that between the directions, and lengths stay. mergekit takes the
    chord where cos Ω > 0.9995, so that two models from one base are nearly always on it. Here it is
    taken where arc and chord are the same in float32, and where there is no one arc: a tensor is 0,
    or they point in opposite directions.

    Args:
        t: 0 is the first, 1 the second.

    >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 0.5)
    tensor([0.7071, 0.7071])
    >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])], 0.25)
    tensor([1.5000, 0.0000])
    """
    first, second = tensors
    if t in (0.0, 1.0):
        return (second if t else first).clone()
    lengths = [float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in tensors]
    parts = 1.0 - t, t
    if all(lengths):
        angle = _angle(first / lengths[0], second / lengths[1])
        if math.sin(angle) > _SMALLEST_SINE:
            parts = (
                math.sin((1.0 - t) * angle) / math.sin(angle),
                math.sin(t * angle) / math.sin(angle),
            )
    return _weighted_sum(tensors, parts)


def _angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """Between two vectors of length 1; exact for small ones too, where a cosine is not (Kahan)."""
    apart = float(torch.linalg.vector_norm(first - second, dtype=torch.float64))
    along = float(torch.linalg.vector_norm(first + second, dtype=torch.float64))
    return 2.0 * math.atan2(apart, along)


def task_arithmetic(
    tensors: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float], scale: float
) -> torch.Tensor:
    """The base with the task vectors added, θ = θ_0 + λ Σ w_i τ_i.

    Source: Ilharco et al. 2023 (arXiv 2212.04089), section 2, whose weights are all 1. The sum is
    not divided by Σ w_i, as in PEFT and in mergekit's default.

    Args:
        scale: λ.

    >>> base = torch.tensor([1.0, 1.0])
    >>> task_arithmetic([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])], base, [1, 1], 0.5)
    tensor([1.5000, 2.0000])
    """
    changes = [tensor - base for tensor in tensors]
    return base + _weighted_sum(changes, weights).mul_(scale)


def ties(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    weights: Sequence[float],
    density: float,
    scale: float,
) -> torch.Tensor:
    """Trim, elect a sign, and take the mean of those that agree with it.

    Trim: of each τ_i the share `density` of largest magnitude is kept and the rest is 0: τ̂_i.
    Elect: γ = sgn(Σ w_i τ̂_i), entry by entry.
    Merge: θ = θ_0 + λ Σ_A w_i τ̂_i / Σ_A w_i over A = {i : sgn τ̂_i = γ ≠ 0}.

    Source: Yadav et al. 2023 (arXiv 2306.01708), algorithm 1, whose weights are all 1. Where
    implementations differ:

    - The authors trim a model's whole task vector at once. Here, as in PEFT and mergekit, each
      tensor is trimmed by itself, so that no model has to be in memory.
    - An entry as large as the last one kept is kept too; PEFT and mergekit drop some of them.
    - The mean is by weight, as in mergekit. PEFT divides by the number that agree.
    - Where the sum is exactly 0 no sign is elected and the base stays, as the equation says. PEFT
      and mergekit elect + there.

    Args:
        weights: none below 0, and not all 0.

    >>> base = torch.zeros(3)
    >>> models = [torch.tensor([4.0, 1.0, -2.0]), torch.tensor([2.0, 0.1, 3.0])]
    >>> ties(models, base, [1, 1], 0.7, 1.0)
    tensor([3., 0., 3.])
    """
    changes = [_largest(tensor - base, density) for tensor in tensors]
    return base + _agreeing_mean(changes, weights).mul_(scale)


def dare_linear(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    weights: Sequence[float],
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Drop entries of the task vectors at random, rescale the others, add all to the base.

    m_i ~ Bernoulli(density) entry by entry, τ̃_i = m_i τ_i / density, θ = θ_0 + λ Σ w_i τ̃_i.
    The mean over all draws is that of task arithmetic.

    Source: Yu et al. 2024 (arXiv 2311.03099), drop and rescale with density = 1 − p, then task
    arithmetic. Newer versions of mergekit rescale to a norm of before the drawing; here it is by
    1 / density, as in the paper and in PEFT.

    Args:
        generators: one for each tensor.

    >>> seeds = [torch.Generator().manual_seed(n) for n in (1, 2)]
    >>> models = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.5])]
    >>> dare_linear(models, torch.zeros(3), [1, 1], 1.0, 1.0, seeds)
    tensor([1.5000, 1.5000, 1.5000])
    """
    changes = _drawn(tensors, base, density, generators)
    return base + _weighted_sum(changes, weights).mul_(scale)


def dare_ties(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    weights: Sequence[float],
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """As `dare_linear`, merged where most agree on the sign, as by `ties`; nothing is trimmed.

    Source: Yu et al. 2024 (arXiv 2311.03099), DARE before TIES-Merging (Yadav et al. 2023). As in
    PEFT and mergekit the drawing stands in place of the trimming; the authors draw, and then trim.

    >>> seeds = [torch.Generator().manual_seed(n) for n in (1, 2)]
    >>> models = [torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])]
    >>> dare_ties(models, torch.zeros(2), [1, 1], 1.0, 1.0, seeds)
    tensor([1.5000, 3.0000])
    """
    changes = _drawn(tensors, base, density, generators)
    return base + _agreeing_mean(changes, weights).mul_(scale)


def sce(tensors: Sequence[torch.Tensor], base: torch.Tensor, density: float) -> torch.Tensor:
    """Select what differs most, calculate the weights from it, erase what is against the most.

    Select: of the entries where the τ_i are not all equal, the share `density` with the largest
    variance over i is kept in every τ_i, and the rest is 0: τ̂_i. At density 1 all are kept.
    Calculate: η_i = Σ τ̂_i² / Σ_j Σ τ̂_j², one number a model for the whole tensor.
    Erase and merge: θ = θ_0 + Σ_A η_i τ̂_i / Σ_A η_i over A = {i : sgn τ̂_i = sgn Σ_j τ̂_j ≠ 0}.

    Source: FuseChat, Wan et al. 2024 (arXiv 2408.07990), its merging. Where programs differ:

    - In an early one, a fork of mergekit, the selection counts for η alone, and whole task vectors
      are merged. In mergekit's own `sce` what was not selected is not merged. So it is here.
    - Both divide by the η that are left, so that an erased model does not shrink the others. So
      does this.
    - Both elect + where the sum is exactly 0. Here the base stays, as with `ties`.
    - Both round the number of entries down. Here it is rounded, and at least one is selected; one
      of the same variance as the last is selected too.

    >>> base = torch.zeros(3)
    >>> models = [torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.1])]
    >>> sce(models, base, 0.5).round(decimals=3)
    tensor([3., 0., 0.])
    >>> sce([torch.tensor([2.0, 2.0]), torch.tensor([2.0, 0.0])], torch.zeros(2), 1.0)
    tensor([2., 2.])
    """
    changes = [tensor - base for tensor in tensors]
    if density < 1:
        selected = _most_varied(changes, density)
        changes = [change * selected for change in changes]
    squares = [float(change.square().sum(dtype=torch.float64)) for change in changes]
    total = math.fsum(squares)
    if total == 0:
        return base.clone()
    shares = [square / total for square in squares]
    return base + _agreeing_mean(changes, shares, elected_by=[1.0] * len(changes))


def merge_tensors(
    settings: MergeSettings, tensors: Sequence[torch.Tensor], base: torch.Tensor | None, name: str
) -> torch.Tensor:
    """One tensor of the result.

    Args:
        tensors: float32, one of each model.
        base: of the base, where the method has one.
        name: of the tensor. What is drawn depends on it, on the seed and on a model's place, and
            not on which tensors were merged before.

    >>> merge_tensors(MergeSettings("linear", weights=(1.0, 1.0)), [torch.ones(1)] * 2, None, "a")
    tensor([1.])
    """
    method, given = settings.method, settings
    if method == "linear":
        return linear(tensors, _set(given.weights))
    if method == "slerp":
        return slerp(tensors, _set(given.t))
    over = _set(base)
    if method == "sce":
        return sce(tensors, over, _set(given.density))
    weights, scale = _set(given.weights), _set(given.scale)
    if method == "task_arithmetic":
        return task_arithmetic(tensors, over, weights, scale)
    density = _set(given.density)
    if method == "ties":
        return ties(tensors, over, weights, density, scale)
    generators = [_generator(_set(given.seed), name, n) for n in range(len(tensors))]
    dare = {"dare_linear": dare_linear, "dare_ties": dare_ties}[method]
    return dare(tensors, over, weights, density, scale, generators)


def _set(value: Value | None) -> Value:
    assert value is not None, "settings_of fills in what a method reads"
    return value


def _generator(seed: int, name: str, place: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\n{place}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_i x_i; a model of weight 0 is left out, and a single one of weight 1 is itself."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total.add_(tensor, alpha=weight)
    return total


def _largest(change: torch.Tensor, density: float) -> torch.Tensor:
    """With the share of largest magnitude kept, at least one entry, and 0 elsewhere."""
    magnitude = change.abs().flatten()
    kept = max(1, round(density * magnitude.numel()))
    if kept >= magnitude.numel():
        return change
    least = magnitude.kthvalue(magnitude.numel() - kept + 1).values
    return torch.where(change.abs() >= least, change, 0.0)


def _most_varied(changes: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Where the variance over models is among the largest, of those where it is not 0."""
    mean = _weighted_sum(changes, [1.0 / len(changes)] * len(changes))
    variance = torch.zeros_like(mean)
    for change in changes:
        variance.add_((change - mean).square_())
    alike = torch.ones_like(mean, dtype=torch.bool)  # a mean of equals may be off by a rounding
    for change in changes[1:]:
        alike &= change == changes[0]
    variance[alike] = 0.0
    varied = variance[variance > 0]
    if not varied.numel():
        return torch.zeros_like(alike)
    kept = max(1, round(density * varied.numel()))
    return variance >= varied.kthvalue(varied.numel() - kept + 1).values


def _drawn(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    density: float,
    generators: Sequence[torch.Generator],
) -> list[torch.Tensor]:
    """Task vectors, of which each entry is kept with this probability and then rescaled."""
    changes = []
    for tensor, generator in zip(tensors, generators, strict=True):
        kept = torch.rand(tensor.shape, generator=generator) < density
        changes.append((tensor - base).mul_(kept).div_(density))
    return changes


def _agreeing_mean(
    changes: Sequence[torch.Tensor],
    weights: Sequence[float],
    elected_by: Sequence[float] | None = None,
) -> torch.Tensor:
    """The weighted mean of the entries that have the sign of the (weighted) sum; 0 without any.

    Args:
        elected_by: weights of that sum, if they are not the mean's.
    """
    elected = _weighted_sum(changes, elected_by or weights).sign_()
    total, weight_there = torch.zeros_like(elected), torch.zeros_like(elected)
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == elected  # where none is elected, only a 0 does
        total.add_(change * agrees, alpha=weight)
        weight_there.add_(agrees, alpha=weight)
    return torch.where(weight_there > 0, total / weight_there, 0.0)
