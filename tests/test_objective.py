"""The objective in one pass against the textbook, and what must give no gradient."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusellm.objective import chunked
from fusellm.objective.chunked import Head, Losses, objective
from fusellm.objective.divergence import Divergence, chunk_losses
from fusellm.objective.outcomes import Outcomes
from fusellm.objective.products import factors_as_bfloat16
from fusellm.objective.textbook import objective_textbook

CROSS_ENTROPY = Divergence()
quick = settings(max_examples=60, deadline=None, derandomize=True)

Part = tuple[list[tuple[float, list[int]]], float]
"""One source's share of a position: [(mass, target ids), …] and the rest."""
Row = Part | list[Part] | None
"""One position: a part, several, or None where there is no distribution."""


def parts_of(row: Row) -> list[Part]:
    return [] if row is None else row if isinstance(row, list) else [row]


def outcomes_of(rows: list[Row]) -> Outcomes:
    """Rows as the objective takes them."""
    parts = [(n, part) for n, row in enumerate(rows) for part in parts_of(row)]
    sets = [(r, m, ids) for r, (_, part) in enumerate(parts) for m, ids in part[0]]
    return Outcomes(
        torch.tensor([row is not None for row in rows], dtype=torch.bool),
        torch.tensor([n for n, _ in parts], dtype=torch.int64),
        torch.tensor([part[1] for _, part in parts], dtype=torch.float32),
        torch.tensor([r for r, _, _ in sets], dtype=torch.int64),
        torch.tensor([m for _, m, _ in sets], dtype=torch.float32),
        torch.tensor([k for k, s in enumerate(sets) for _ in s[2]], dtype=torch.int64),
        torch.tensor([id_ for _, _, ids in sets for id_ in ids], dtype=torch.int64),
    )


@dataclass(frozen=True)
class Case:
    """One batch: N positions, d hidden size, V vocabulary."""

    hidden: torch.Tensor
    head: Head
    labels: torch.Tensor
    outcomes: Outcomes
    clm_weight: float
    divergence: Divergence = CROSS_ENTROPY


def random_row(chance: np.random.Generator, vocabulary: int) -> Row:
    """Absent, one part, or several with weights."""
    if chance.random() < 0.2:
        return None
    if chance.random() < 0.6:
        return random_part(chance, vocabulary)
    weights = chance.dirichlet(np.ones(chance.integers(1, 4)))
    parts = [(w, random_part(chance, vocabulary)) for w in weights.tolist()]
    return [([(w * m, ids) for m, ids in sets], w * rest) for w, (sets, rest) in parts]


def random_part(chance: np.random.Generator, vocabulary: int) -> Part:
    """Empty (all mass in the rest), or sets and single ids with or without a rest."""
    if chance.random() < 0.1:
        return [], 1.0
    ids = chance.permutation(vocabulary)[: chance.integers(1, vocabulary + 1)]
    cuts = np.sort(chance.choice(len(ids), min(len(ids), int(chance.integers(1, 5))), False))
    sets = [part.tolist() for part in np.split(ids, cuts) if len(part)]
    masses = chance.dirichlet(np.ones(len(sets) + 1))
    if len(ids) == vocabulary or chance.random() < 0.4:
        masses = np.append(masses[:-1] / masses[:-1].sum(), 0.0)
    return list(zip(masses[:-1].tolist(), sets, strict=True)), float(masses[-1])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    positions, size, vocabulary = (int(chance.integers(1, n)) for n in (12, 6, 14))

    def normal(*shape: int) -> torch.Tensor:
        return torch.tensor(chance.normal(size=shape) * 1.5, dtype=torch.float32)

    head = Head(
        normal(vocabulary, size),
        normal(vocabulary) if draw(st.booleans()) else None,
        draw(st.sampled_from([1.0, 0.25, 3.0])),
        draw(st.sampled_from([None, 2.0, 30.0])),
    )
    return Case(
        normal(positions, size),
        head,
        torch.tensor(chance.integers(0, vocabulary, positions)),
        outcomes_of([random_row(chance, vocabulary) for _ in range(positions)]),
        draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        Divergence(draw(st.sampled_from(["cross_entropy", "cross_entropy", "kl", "reverse_kl"]))),
    )


@dataclass(frozen=True)
class Result:
    total: torch.Tensor
    gradients: list[torch.Tensor]


def leaves_of(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    tensors = [case.hidden, case.head.weight, case.head.bias]
    return [t.detach().to(dtype).requires_grad_() for t in tensors if t is not None]


def by_textbook(case: Case, scale: float = 1.0) -> Result:
    """In float64, the head written out."""
    leaves = leaves_of(case, torch.float64)
    logits = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
    logits = logits * case.head.scale
    if case.head.softcap is not None:
        logits = case.head.softcap * torch.tanh(logits / case.head.softcap)
    total = objective_textbook(logits, case.labels, case.outcomes, case.clm_weight, case.divergence)
    (total * scale).backward()
    return Result(total.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None])


def by_chunks(case: Case, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Result:
    leaves = leaves_of(case, dtype)
    head = replace(case.head, weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
    losses = objective(
        leaves[0], head, case.labels, case.outcomes, case.clm_weight, case.divergence
    )
    (losses.total * scale).backward()
    return Result(losses.total.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None])


def check_close(found: Result, expected: Result, relative: float) -> None:
    assert len(found.gradients) == len(expected.gradients)
    assert found.total.item() == pytest.approx(
        expected.total.item(), rel=relative, abs=relative * 10
    )
    for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
        size = max(1.0, theirs.abs().max().item())
        assert torch.allclose(mine.double(), theirs, rtol=relative, atol=relative * size)


@example(
    case=Case(
        torch.zeros(1, 1),
        Head(torch.zeros(1, 1)),
        torch.tensor([0]),
        outcomes_of([([(1.0, [0])], 0.0)]),
        0.5,
    ),
    rows=1,
)
@given(case=cases(), rows=st.sampled_from([1, 2, 3, 5, 1000]))
@settings(quick, max_examples=150)
def test_chunks_agree_with_the_textbook(case: Case, rows: int) -> None:
    """Loss and gradients, with head bias, scale and cap, wherever a chunk ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK_ELEMENTS", rows * case.head.weight.shape[0])
        check_close(by_chunks(case, scale=0.37), by_textbook(case, scale=0.37), 1e-5)


@given(case=cases(), temperature=st.sampled_from([0.5, 2.0, 4.0]), rows=st.sampled_from([2, 1000]))
@quick
def test_a_temperature_agrees_with_the_textbook(case: Case, temperature: float, rows: int) -> None:
    case = replace(case, divergence=replace(case.divergence, temperature=temperature))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK_ELEMENTS", rows * case.head.weight.shape[0])
        check_close(by_chunks(case, scale=0.37), by_textbook(case, scale=0.37), 1e-5)


@pytest.mark.parametrize("kind", ["cross_entropy", "reverse_kl"])
@pytest.mark.parametrize("outside", [-20.0, -60.0, -300.0])
def test_hardly_any_mass_outside_is_told_to_its_last_digit(kind: str, outside: float) -> None:
    """Never 1 − Σ: Q outside the kept ids is summed, or its logarithm taken, by itself."""
    logits = torch.tensor([[3.0, 2.0, outside, outside - 1, outside]])
    case = Case(
        torch.ones(1, 1),
        Head(torch.zeros(5, 1), logits[0]),
        torch.tensor([0]),
        outcomes_of([([(0.5, [0]), (0.3, [1])], 0.2)]),
        0.0,
        Divergence(kind),
    )
    check_close(by_chunks(case), by_textbook(case), 1e-5)


@given(case=cases())
@quick
def test_parts_are_unweighted_and_make_the_total(case: Case) -> None:
    losses = objective(
        case.hidden, case.head, case.labels, case.outcomes, case.clm_weight, case.divergence
    )
    clm = by_textbook(replace(case, clm_weight=1.0)).total.item()
    absent = replace(
        case,
        hidden=case.hidden[~case.outcomes.present],
        labels=case.labels[~case.outcomes.present],
        outcomes=Outcomes.none(int((~case.outcomes.present).sum())),
    )
    elsewhere = by_textbook(absent).total.item() if len(absent.labels) else 0.0
    fusion = by_textbook(replace(case, clm_weight=0.0)).total.item() - elsewhere
    assert losses.clm.item() == pytest.approx(clm, rel=1e-5, abs=1e-4)
    assert losses.fusion.item() == pytest.approx(fusion, rel=1e-5, abs=1e-4)
    weight = case.clm_weight
    expected = elsewhere + weight * (clm - elsewhere) + (1 - weight) * fusion
    assert losses.total.item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


@given(case=cases())
@quick
def test_lambda_one_is_cross_entropy(case: Case) -> None:
    """With fused distributions at hand or without."""
    case = replace(case, clm_weight=1.0)
    leaves = leaves_of(case, torch.float32)
    head = replace(case.head, weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
    loss = torch.nn.functional.cross_entropy(head.logits(leaves[0]), case.labels, reduction="sum")
    loss.backward()
    expected = Result(
        loss.detach(), [leaf.grad.double() for leaf in leaves if leaf.grad is not None]
    )
    check_close(by_chunks(case), expected, 1e-5)
    without = objective(case.hidden, case.head, case.labels)
    assert without.total.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    assert without.fusion.item() == 0


def fixed_case(seed: int = 3, **changes: object) -> Case:
    """A case with all kinds of positions."""
    chance = np.random.default_rng(seed)
    rows: list[Row] = [
        ([(0.5, [0, 3]), (0.2, [1])], 0.3),
        None,
        ([], 1.0),
        ([(0.25, [5, 6, 2]), (0.75, [0])], 0.0),
        ([(0.1, [4]), (0.1, [3]), (0.1, [2])], 0.7),
    ]
    case = Case(
        torch.tensor(chance.normal(size=(5, 3)), dtype=torch.float32),
        Head(
            torch.tensor(chance.normal(size=(7, 3)), dtype=torch.float32),
            torch.tensor(chance.normal(size=7), dtype=torch.float32),
            0.5,
            3.0,
        ),
        torch.tensor([0, 1, 2, 3, 4]),
        outcomes_of(rows),
        0.4,
    )
    return replace(case, **changes)


def test_the_textbook_by_hand() -> None:
    """Two positions of four tokens, all of probability 1/4: −Σ mass·ln(mass of the set)."""
    outcomes = outcomes_of([([(0.5, [0, 1]), (0.25, [2])], 0.25), None])
    found = objective_textbook(torch.zeros(2, 4).double(), torch.tensor([0, 1]), outcomes, 0.75)
    fusion = 0.5 * np.log(2) + 0.25 * np.log(4) + 0.25 * np.log(4)
    assert found.item() == pytest.approx(0.75 * np.log(4) + 0.25 * fusion + np.log(4))


def test_the_worked_example_of_the_gradient() -> None:
    """As the comment above `divergence._diverge` has it."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    outcomes = outcomes_of([([(0.5, [0, 1]), (0.3, [2])], 0.2)])
    nothing, one = torch.zeros(1), torch.ones(1)
    gradient, sums = chunk_losses(
        logits, torch.tensor([0]), outcomes, (nothing, one), CROSS_ENTROPY, True
    )
    assert gradient is not None
    expected = [-0.5 * 0.4 / 0.7 + 0.4, -0.5 * 0.3 / 0.7 + 0.3, -0.1, -0.1]
    assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
    loss = -0.5 * np.log(0.7) - 0.3 * np.log(0.2) - 0.2 * np.log(0.1)
    assert sums[2].item() == pytest.approx(loss, abs=1e-6)


def test_gradients_of_the_textbook_are_those_of_its_loss() -> None:
    case = fixed_case()
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(z: torch.Tensor) -> torch.Tensor:
        return objective_textbook(z, case.labels, case.outcomes, case.clm_weight)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_gradients_of_the_chunks_are_finite_differences_of_their_loss() -> None:
    case = fixed_case()
    found = by_chunks(case).gradients
    width = 1e-2
    for which, name in enumerate(("hidden", "weight", "bias")):
        start = case.hidden if name == "hidden" else getattr(case.head, name)
        for at in np.ndindex(*start.shape):
            sums = []
            for sign in (1, -1):
                moved = start.clone()
                moved[at] += sign * width
                head = case.head if name == "hidden" else replace(case.head, **{name: moved})
                hidden = moved if name == "hidden" else case.hidden
                losses = objective(hidden, head, case.labels, case.outcomes, case.clm_weight)
                sums.append(losses.total.item())
            slope = (sums[0] - sums[1]) / (2 * width)
            assert found[which][at].item() == pytest.approx(slope, abs=2e-3)


# Nothing to learn


def own_distribution(log_p: torch.Tensor, k: int, renormalize: bool, sets: int = 1) -> Row:
    """A model's own top k, as sets of ids, with its rest or scaled to 1 without."""
    ids = torch.topk(log_p, k).indices.tolist()
    p = log_p.exp()
    found = [
        (float(p[group].sum()), group) for n in range(0, k, sets) if (group := ids[n : n + sets])
    ]
    kept = sum(mass for mass, _ in found)
    if renormalize:
        return [(mass / kept, group) for mass, group in found], 0.0
    return found, max(0.0, 1.0 - kept) if k < len(p) else 0.0


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 11, 12])
def test_a_source_equal_to_the_target_gives_no_gradient_with_a_bucket(k: int, sets: int) -> None:
    hidden, weight = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(k)).unbind()
    head = Head(weight.contiguous(), None, 0.8, 5.0)
    log_p = torch.log_softmax(head.logits(hidden).double(), -1)
    largest = {}
    for renormalize in (False, True):
        outcomes = outcomes_of([own_distribution(row, k, renormalize, sets) for row in log_p])
        case = Case(hidden, head, torch.zeros(12, dtype=torch.int64), outcomes, 0.0)
        largest[renormalize] = max(g.abs().max().item() for g in by_chunks(case).gradients)
    assert largest[False] < 1e-5
    if k < 12:
        assert largest[True] > 1e-2  # renormalizing pulls even then


def test_all_ids_in_one_outcome_say_nothing() -> None:
    case = fixed_case(outcomes=outcomes_of([([(1.0, list(range(7)))], 0.0)] * 5), clm_weight=0.0)
    found = by_chunks(case)
    assert found.total.item() == pytest.approx(0, abs=1e-5)
    assert max(g.abs().max().item() for g in found.gradients) < 1e-5


def test_a_rest_with_no_id_left_for_it_is_left_out() -> None:
    """Masses that do not quite sum to 1 over a whole vocabulary."""
    row: Row = [(0.5, [0, 1, 2]), (0.4, [3, 4, 5, 6])], 0.1
    case = fixed_case(outcomes=outcomes_of([row] * 5))
    check_close(by_chunks(case), by_textbook(case), 1e-5)
    assert all(torch.isfinite(g).all() for g in by_chunks(case).gradients)


# What autograd asks for


def wanted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each chunk was asked for its gradient."""
    asked: list[bool] = []
    inner = chunked.chunk_losses

    def recorded(*arguments: object) -> object:
        asked.append(bool(arguments[5]))
        return inner(*arguments)

    monkeypatch.setattr(chunked, "chunk_losses", recorded)
    return asked


def run(case: Case, **needs: bool) -> tuple[Losses, dict[str, torch.Tensor]]:
    """The objective with a gradient wanted for some of hidden, weight and bias."""
    leaves = {"hidden": case.hidden, "weight": case.head.weight, "bias": case.head.bias}
    made = {
        name: tensor.detach().clone().requires_grad_(needs.get(name, False))
        for name, tensor in leaves.items()
        if tensor is not None
    }
    head = replace(case.head, weight=made["weight"], bias=made["bias"])
    losses = objective(
        made["hidden"], head, case.labels, case.outcomes, case.clm_weight, case.divergence
    )
    return losses, made


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_needed_are_made(needed: str) -> None:
    expected = dict(
        zip(("hidden", "weight", "bias"), by_chunks(fixed_case()).gradients, strict=True)
    )
    losses, leaves = run(fixed_case(), **{needed: True})
    losses.total.backward()
    for name, leaf in leaves.items():
        if name == needed:
            assert leaf.grad is not None
            assert torch.allclose(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_nothing_is_differentiated_where_nothing_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wanted(monkeypatch)
    losses, _ = run(fixed_case())
    assert asked == [False]
    assert not losses.total.requires_grad


def test_no_grad_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that could have one, as in evaluation during training."""
    asked = wanted(monkeypatch)
    with torch.no_grad():
        losses, _ = run(fixed_case(), hidden=True, weight=True, bias=True)
    assert not losses.total.requires_grad
    assert asked == [False]


def test_only_the_total_carries_a_gradient() -> None:
    losses, _ = run(fixed_case(), hidden=True)
    assert losses.total.requires_grad
    assert not losses.clm.requires_grad
    assert not losses.fusion.requires_grad


def test_a_second_backward_through_the_same_graph_is_refused() -> None:
    losses, _ = run(fixed_case(), weight=True)
    losses.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward\\(\\) once"):
        losses.total.backward()


def test_the_gradient_is_handed_over_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the head: a copy of it would be half of what the objective needs."""
    made: list[int] = []
    inner = torch.zeros_like

    def recorded(*arguments: object, **named: object) -> torch.Tensor:
        found = inner(*arguments, **named)
        made.append(found.data_ptr())
        return found

    monkeypatch.setattr(torch, "zeros_like", recorded)
    losses, leaves = run(fixed_case(), weight=True)
    losses.total.backward()
    assert leaves["weight"].grad is not None
    assert leaves["weight"].grad.data_ptr() in made


@given(case=cases(), count=st.sampled_from([1.0, 3.0, 0.25]))
@quick
def test_a_count_divides_the_total_and_its_gradients(case: Case, count: float) -> None:
    hidden = case.hidden.clone().requires_grad_()
    losses = objective(
        hidden,
        case.head,
        case.labels,
        case.outcomes,
        case.clm_weight,
        case.divergence,
        torch.tensor(count),
    )
    losses.total.backward()
    plain = by_chunks(case)
    assert hidden.grad is not None
    assert losses.total.item() == pytest.approx(plain.total.item() / count, rel=1e-5, abs=1e-5)
    assert torch.allclose(hidden.grad, plain.gradients[0] / count, rtol=1e-4, atol=1e-5)


def test_no_positions() -> None:
    case = fixed_case(
        hidden=torch.zeros(0, 3),
        labels=torch.zeros(0, dtype=torch.int64),
        outcomes=Outcomes.none(0),
    )
    found = by_chunks(case)
    assert found.total.item() == 0
    assert all((g == 0).all() for g in found.gradients)


# Other precisions


@given(case=cases())
@quick
def test_bfloat16_agrees_to_its_precision(case: Case) -> None:
    """Inputs of bfloat16: against the textbook on the same rounded numbers."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16).float()

    bias = None if case.head.bias is None else rounded(case.head.bias)
    head = replace(case.head, weight=rounded(case.head.weight), bias=bias, softcap=None)
    case = replace(case, hidden=rounded(case.hidden), head=head)
    found = by_chunks(case, dtype=torch.bfloat16)
    assert all(g.dtype == torch.bfloat16 for g in found.gradients)
    check_close(found, by_textbook(case), 0.06)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_over_float32_weights(hidden_dtype: torch.dtype) -> None:
    """`bf16: true` keeps the head in float32; last hidden states come in either."""
    case = fixed_case()
    expected = by_textbook(case)
    hidden = case.hidden.to(hidden_dtype).requires_grad_()
    weight = case.head.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(
            hidden, replace(case.head, weight=weight), case.labels, case.outcomes, case.clm_weight
        )
    losses.total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (hidden_dtype, torch.float32)
    found = Result(losses.total.detach(), [hidden.grad, weight.grad])
    check_close(found, replace(expected, gradients=expected.gradients[:2]), 0.03)


def bfloat16_valued(rows: int, columns: int, scale: float) -> torch.Tensor:
    """Float32 numbers that bfloat16 has."""
    return (scale * torch.randn(rows, columns)).bfloat16().float()


def test_autocast_rounds_factors_and_not_logits() -> None:
    """Of factors that bfloat16 has nothing is lost: logits of 20 in bfloat16 are 1/16 off."""
    torch.manual_seed(0)
    hidden, weight = bfloat16_valued(70, 64, 2.0), bfloat16_valued(90, 64, 0.5)
    labels = torch.randint(90, (70,))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(leaves[0], Head(leaves[1]), labels)
    losses.total.backward()
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    expected.backward()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-6)
    rounded = torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).bfloat16().float(), labels, reduction="sum"
    )
    assert abs(rounded.item() - expected.item()) > 1e-5 * expected.item()
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        size = theirs.grad.abs().max()
        assert (mine.grad - theirs.grad).abs().max() < 0.01 * size  # d_logits are rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_float32_widened_or_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).to(dtype), torch.randn(90, 64).to(dtype)
    bias = torch.randn(90).to(dtype)
    head = Head(weight, bias, scale=0.5, softcap=30.0)
    exact = 0.5 * (hidden.double() @ weight.double().t() + bias.double())
    exact = 30 * torch.tanh(exact / 30)
    for one in (head, head.widened()):
        logits = one.logits(hidden, torch.empty(64, 90))
        assert logits.dtype == torch.float32
        assert torch.allclose(logits.double(), exact, atol=1e-4)
        assert torch.equal(one.logits(hidden), logits)
    assert head.widened().weight.dtype == torch.float32


def test_products_are_as_before_after_an_error() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision

    def failing() -> None:
        with factors_as_bfloat16():
            assert matmul.fp32_precision == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert matmul.fp32_precision == before
    with factors_as_bfloat16(wanted=False):
        assert matmul.fp32_precision == before
