"""The losses of benchmarks/rivals against dense computations, and against what is known of them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fusellm.models.tokenizer import Tokenizer
from fusellm.objective.chunked import Head, objective

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from rivals.chunks import Chunks, chunks_of, sums
from rivals.hybrid import Matched, hybrid_loss, matched_tokens
from rivals.projection import (
    chunk_means,
    projected,
    projection_loss,
    projection_matrix,
)
from rivals.span import span_loss
from rivals.trainer import RIVALS, rival_losses


def drawn(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """[rows, tokens] float64 log-probabilities."""
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tokens, generator=chance, dtype=torch.float64) * 2
    return torch.log_softmax(logits, -1)


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    loss(torch.log_softmax(logits, -1)).backward()
    assert logits.grad is not None
    return logits.grad


# pieces


def test_pieces_lie_between_boundaries_that_both_have() -> None:
    """`abc|de|f|` and `a|bc|d|ef|`, with a first token that nothing was read before."""
    found = chunks_of(np.array([0, 3, 5, 6]), np.array([0, 1, 3, 4, 6]))
    assert found.target.tolist() == [[0, 1], [1, 3]]
    assert found.source.tolist() == [[0, 2], [2, 4]]
    assert found.covered == 3


@pytest.mark.parametrize(
    ("target", "source", "pieces"),
    [
        ([2, 4, 4], [2, 4, 4], [[0, 1], [1, 2]]),  # both with a token for the end
        ([2, 4, 4], [2, 4], [[0, 1]]),
        ([2, 4], [2, 4, 4], [[0, 1]]),
        ([2, 4], [3, 4], []),
        ([2], [1, 2], []),
    ],
)
def test_the_end_of_a_text(target: list[int], source: list[int], pieces: list[list[int]]) -> None:
    assert chunks_of(np.array(target), np.array(source)).target.tolist() == pieces


def test_pieces_of_several_texts() -> None:
    one = Chunks(torch.tensor([[0, 2]]), torch.tensor([[0, 1]]))
    both = Chunks.joined([one, one], [3, 2], [1, 4])
    assert both.target.tolist() == [[0, 2], [3, 5]]
    assert both.source.tolist() == [[0, 1], [1, 2]]
    assert both[1:2].from_places(3, 1).target.tolist() == [[0, 2]]
    assert both.windows(5, 3) == [
        (slice(0, 3), slice(0, 1), slice(0, 1)),
        (slice(3, 5), slice(1, 2), slice(1, 2)),
    ]
    assert both.windows(5, 9) == [(slice(0, 5), slice(0, 2), slice(0, 2))]
    assert both[0:0].windows(5, 9) == [(slice(0, 5), slice(0, 0), slice(0, 0))]
    values = torch.arange(5.0)[:, None]
    assert sums(values, both.target).tolist() == [[1.0], [7.0]]


def test_pieces_of_real_tokenizers_have_the_same_bytes() -> None:
    target, source = (Tokenizer.from_pretrained(f"zoo/{name}") for name in ("prose", "cpp"))
    text = "for i in range(2019):\n    print(i, 'café 中文')\n"
    mine, theirs = target.encode([text])[0], source.encode([text])[0]
    found = chunks_of(mine.ends, theirs.ends)
    assert mine.ends is not None
    assert theirs.ends is not None
    assert len(found) > 5
    assert (mine.ends[found.target.numpy()] == theirs.ends[found.source.numpy()]).all()


# projection


def test_projection_of_equal_tokenizers_is_kl() -> None:
    """Of tokens that no other stands for; W is then the identity but for the special ones."""
    tokenizer = Tokenizer.from_pretrained("zoo/python")
    rows = len(tokenizer.vocabulary)
    matrix = projection_matrix(tokenizer, tokenizer, rows, rows).to_dense()
    assert torch.equal(matrix, torch.eye(rows))
    target, source = drawn(3, rows, 0), drawn(3, rows, 1)
    loss = projection_loss(projected(target, matrix.double().to_sparse()), source)
    assert loss.item() == pytest.approx(
        (source.exp() * (source - target)).sum(-1).mean().item(), abs=1e-4
    )


def test_rows_of_the_projection() -> None:
    """zoo/python has ` 10` and not ` 2019`'s like; zoo/prose spells digits singly."""
    source, target = (Tokenizer.from_pretrained(f"zoo/{name}") for name in ("prose", "python"))
    rows = len(source.vocabulary), len(target.vocabulary)
    matrix = projection_matrix(source, target, *rows).to_dense()
    filled = matrix.sum(0)
    assert torch.allclose(filled, torch.ones(rows[1]))
    bytes_of = {token: n for n, token in enumerate(target.vocabulary.token_bytes)}
    column = matrix[:, bytes_of[b"128"]]
    found = {source.spelled(n): column[n].item() for n in column.nonzero()[:, 0].tolist()}
    assert list(found) == sorted(found)
    assert found == pytest.approx({"1": 0.9 / 0.999, "2": 0.09 / 0.999, "8": 0.009 / 0.999})


def test_projection_is_zero_where_it_agrees_and_has_the_dense_gradient() -> None:
    matrix = torch.rand(5, 4, dtype=torch.float64)
    matrix = torch.where(matrix > 0.6, matrix, 0.0) + 0.01
    matrix /= matrix.sum(0)
    target = drawn(6, 4, 2)
    agreeing = torch.log(target.exp() @ matrix.t())
    assert projection_loss(projected(target, matrix.to_sparse()), agreeing).item() < 1e-8
    source = drawn(6, 5, 3)

    def dense(log_q: torch.Tensor) -> torch.Tensor:
        q = log_q.exp() @ matrix.t()
        return (source.exp() * (source - (q / q.sum(-1, keepdim=True)).log())).sum(-1).mean()

    own = gradient(lambda q: projection_loss(projected(q, matrix.to_sparse()), source), target)
    assert torch.allclose(own, gradient(dense, target), atol=1e-8)


def test_means_over_pieces() -> None:
    carried, source = drawn(3, 4, 4).exp(), drawn(4, 4, 5)
    spans = torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0, 2], [3, 4]])
    means = chunk_means(carried, source, *spans)
    assert torch.allclose(means[0], torch.stack([carried[0], carried[1:3].mean(0)]))
    assert torch.allclose(means[1], torch.stack([source[:2].mean(0), source[3]]))


# hybrid


def dense_hybrid(
    log_q: torch.Tensor, log_p: torch.Tensor, pairs: list[tuple[int, int]], beta: float
) -> torch.Tensor:
    """Position by position, by the words of the docstring."""
    total = log_q.new_zeros(())
    q, p = log_q.exp(), log_p.exp()
    others_q = [t for t in range(q.shape[1]) if t not in {t for t, _ in pairs}]
    others_p = [s for s in range(p.shape[1]) if s not in {s for _, s in pairs}]
    weight = len(pairs) / p.shape[1]
    for n in range(len(q)):
        for t, s in pairs:
            mixed = (1 - beta) * q[n, t] + beta * p[n, s]
            if beta == 0:
                total = total + weight * p[n, s] * (log_p[n, s] - log_q[n, t])
            else:
                total = total + weight * beta * p[n, s] * (log_p[n, s] - mixed.log())
                total = total + weight * (1 - beta) * q[n, t] * (log_q[n, t] - mixed.log())
        one = sorted((q[n, t] for t in others_q), key=lambda x: x.item(), reverse=True)
        two = sorted((p[n, s] for s in others_p), key=lambda x: x.item(), reverse=True)
        longest = max(len(one), len(two))
        zero = q.new_zeros(())
        one += [zero] * (longest - len(one))
        two += [zero] * (longest - len(two))
        total = total + (1 - weight) * sum(
            ((a - b).abs() for a, b in zip(one, two, strict=True)), zero
        )
    return total / len(q)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("target_rows", "source_rows"), [(5, 8), (8, 5)])
def test_hybrid_is_its_dense_computation(beta: float, target_rows: int, source_rows: int) -> None:
    pairs = [(0, 3), (2, 1), (4, 4)]
    matched = Matched.of_ids([0, 2, 4], [3, 1, 4], target_rows, source_rows)
    target, source = drawn(4, target_rows, 6), drawn(4, source_rows, 7)

    def own(log_q: torch.Tensor) -> torch.Tensor:
        return hybrid_loss(log_q, source, matched, beta=beta)

    def dense(log_q: torch.Tensor) -> torch.Tensor:
        return dense_hybrid(log_q, source, pairs, beta)

    assert own(target).item() == pytest.approx(dense(target).item(), abs=1e-12)
    assert torch.allclose(gradient(own, target), gradient(dense, target), atol=1e-12)


def test_hybrid_of_pieces_in_several_tokens() -> None:
    matched = Matched.of_ids([0, 1], [0, 1], 2, 2)
    target, source = drawn(2, 2, 8), drawn(2, 2, 9)
    rest = torch.tensor([0.0, 0.25]).log().double().clamp(min=-50), torch.zeros(2).double()
    found = hybrid_loss(target, source, matched, *rest)
    by_hand = (source.exp() * (source - (target + rest[0][:, None]).clamp(min=np.log(1e-8)))).sum(
        -1
    )
    assert found.item() == pytest.approx(by_hand.mean().item())


def test_hybrid_is_zero_where_it_agrees() -> None:
    tokenizer = Tokenizer.from_pretrained("zoo/cpp")
    rows = len(tokenizer.vocabulary)
    matched = matched_tokens(tokenizer, tokenizer, rows, rows)
    assert matched.share == 1.0
    same = drawn(3, rows, 10)
    assert hybrid_loss(same, same, matched).item() == pytest.approx(0, abs=1e-12)
    ranks_alone = Matched.of_ids([], [], 4, 4)
    other_order = drawn(3, 4, 11)[:, [2, 0, 1, 3]]
    ranks = hybrid_loss(drawn(3, 4, 11), other_order, ranks_alone)
    assert ranks.item() == pytest.approx(0, abs=1e-12)


# span


def test_span_is_what_is_worked_out_by_hand() -> None:
    """Pieces of two tokens, with τ = 2: √(0.5 · 0.5) = 0.5 against √(0.3 · 0.3) = 0.3."""
    log_q = torch.tensor([[0.3, 0.3]], dtype=torch.float64).log().sum(-1)
    log_p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log().sum(-1)
    by_hand = 2 * (0.5 * np.log(0.5 / 0.3) + 0.5 * np.log(0.5 / 0.7))
    assert span_loss(log_q, log_p, temperature=2.0).item() == pytest.approx(by_hand, abs=1e-5)
    assert span_loss(log_p, log_p).item() == pytest.approx(0, abs=1e-12)


def test_span_has_the_dense_gradient_and_a_limit() -> None:
    target = torch.tensor([-0.001, -0.5, -3.0, -40.0], dtype=torch.float64, requires_grad=True)
    source = torch.tensor([-0.2, -0.4, -9.0, -1.0], dtype=torch.float64)
    span_loss(target, source, temperature=5.0).backward()
    own, target.grad = target.grad, None
    p, q = ((x / 5 - 1e-6).exp() for x in (source, target))
    (5 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()).backward()
    assert own is not None
    assert target.grad is not None
    assert torch.allclose(own, target.grad, rtol=1e-6)
    limit = (source - target) + source * (torch.log(-target) - torch.log(-source))
    assert span_loss(target, source, 1e4).item() == pytest.approx(limit.mean().item(), rel=0.02)


def test_span_in_single_precision_has_finite_gradients() -> None:
    target = torch.tensor([0.0, -1e-7, -1e-3, -200.0], requires_grad=True)
    span_loss(target, torch.tensor([0.0, -5.0, 0.0, -1e-6])).backward()
    assert target.grad is not None
    assert torch.isfinite(target.grad).all()


# in a training


@dataclass(frozen=True)
class World:
    """A batch of 12 positions of two models with the zoo's tokenizers, in pieces of 1 to 3."""

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    source: tuple[torch.Tensor, Head, torch.Tensor]
    chunks: Chunks

    def losses(self, name: str, lambda_: float) -> tuple[torch.Tensor, ...]:
        """Loss, and its gradients."""
        hidden, weight = (x.clone().requires_grad_() for x in (self.hidden, self.head))
        encoders = Tokenizer.from_pretrained("zoo/prose"), Tokenizer.from_pretrained("zoo/python")
        rival = RIVALS[name]((*encoders, len(self.source[1].weight), len(weight)))
        given = self.labels, self.source, self.chunks, rival
        found = rival_losses(hidden, Head(weight), *given, lambda_)
        found.total.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return found.total.detach(), hidden.grad, weight.grad


@pytest.fixture(scope="module")
def world() -> World:
    chance = torch.Generator().manual_seed(12)

    def drawn_hidden(rows: int) -> torch.Tensor:
        return torch.randn(rows, 6, generator=chance)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, 8192, (count,), generator=chance)

    target = torch.tensor([[1, 2], [2, 5], [5, 6], [7, 9], [9, 11]])  # 0, 6 and 11 are in none
    source = torch.tensor([[0, 2], [2, 3], [3, 4], [5, 6], [6, 9]])
    beside = drawn_hidden(9), Head(drawn_hidden(8192)), ids(9)
    return World(drawn_hidden(12), drawn_hidden(8192), ids(12), beside, Chunks(target, source))


@pytest.mark.parametrize("name", list(RIVALS))
def test_with_no_weight_a_rival_is_clm(name: str, world: World) -> None:
    hidden, weight = (x.clone().requires_grad_() for x in (world.hidden, world.head))
    clm = objective(hidden, Head(weight), world.labels).total
    clm.backward()
    found = world.losses(name, lambda_=1.0)
    for own, theirs in zip(found, (clm.detach(), hidden.grad, weight.grad), strict=True):
        assert theirs is not None
        assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(RIVALS))
def test_pieces_may_be_read_one_after_another(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients as where all are read at once."""
    whole = world.losses(name, lambda_=0.3)
    monkeypatch.setattr("rivals.trainer._WINDOW_ELEMENTS", 4 * 2 * 8192)
    for own, theirs in zip(world.losses(name, lambda_=0.3), whole, strict=True):
        assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-6)


def test_a_token_that_the_source_says_nothing_of_has_all_weight(world: World) -> None:
    """L without a rival's share: Σ CE of tokens in no piece, and λ · Σ CE of the others."""
    clm = objective(world.hidden, Head(world.head), world.labels).total
    outside = [0, 6, 11]
    apart = objective(world.hidden[outside], Head(world.head), world.labels[outside]).total
    none, half = (world.losses("span", lambda_)[0] for lambda_ in (0.0, 0.5))
    rival = none - apart
    assert half.item() == pytest.approx(
        (apart + 0.5 * (clm - apart) + 0.5 * rival).item(), rel=1e-4
    )
