"""What is read of a model, against a plain float64 softmax over each block alone."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import code, prose
from fusellm.config import ExternalizeSettings, ModelSettings
from fusellm.models.heads import head_of
from fusellm.models.load import load_model, load_tokenizer, locate
from fusellm.reading.batches import PADDING, plan_batches, read_blocks
from fusellm.reading.draws import by_cumulative_sum, by_spans
from fusellm.reading.source_reader import Read, SourceReader
from fusellm.tokens.encode import Encoded, Encoder

ARCHITECTURES = ("llama", "neox", "mpt")
TOP = ExternalizeSettings(scheme="top", k=7, mass=None)
UNTIL_MASS = ExternalizeSettings(scheme="top", k=40, mass=0.9)
DRAWS = ExternalizeSettings(scheme="sampled", draws=16)


def texts() -> list[str]:
    found = [prose(n, words) for n, words in enumerate((3, 90, 40, 1, 60, 44, 13))]
    return [*found, code(5), "", prose(9, 80)]


def opened(world: Path, name: str, dtype: str = "float32") -> tuple[PreTrainedModel, Encoder]:
    located = locate(ModelSettings(model=str(world / name), dtype=dtype))
    return load_model(located, torch.device("cpu")), Encoder(load_tokenizer(located))


def encode(encoder: Encoder, rows: list[str]) -> list[Encoded]:
    return encoder.encode(rows, [n % 3 == 0 for n in range(len(rows))])


def read(
    model: PreTrainedModel, encoder: Encoder, settings: ExternalizeSettings, rows: list[str]
) -> tuple[Read, list[Encoded]]:
    encoded = encode(encoder, rows)
    reader = SourceReader(model, len(encoder.vocabulary), settings, seed=4)
    return reader.read(rows, encoded), encoded


@torch.no_grad()
def textbook(model: PreTrainedModel, vocabulary: int, ids: np.ndarray) -> np.ndarray:
    """[T-1, V] float64 log-probabilities of one block alone, by the model's own forward."""
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1, :vocabulary]
    found: np.ndarray = torch.log_softmax(logits.double(), dim=-1).numpy()
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("settings", [TOP, UNTIL_MASS], ids=["top", "mass"])
def test_kept_tokens_are_those_of_the_model_alone(
    world: Path, name: str, settings: ExternalizeSettings
) -> None:
    model, encoder = opened(world, name)
    found, encoded = read(model, encoder, replace_budget(settings, 300), texts())
    assert found.not_finite == []
    for n, block in enumerate(encoded):
        rows = range(*found.position_offsets[n : n + 2])
        assert len(rows) == max(len(block.ids) - 1, 0)
        if not len(rows):
            continue
        expected = textbook(model, len(encoder.vocabulary), block.ids)
        for position, row in zip(expected, rows, strict=True):
            entries = slice(*found.kept.offsets[row : row + 2])
            ids, log_probs = found.kept.ids[entries], found.kept.log_probs[entries]
            assert log_probs == pytest.approx(position[ids], abs=2e-5)
            best = np.sort(position)[::-1]
            count = settings.k
            if settings.mass is not None:
                count = min(count, 1 + int(np.sum(np.cumsum(np.exp(best)) < settings.mass)))
                edge = np.abs(np.cumsum(np.exp(best)) - settings.mass).min() < 1e-5
                assert len(ids) == count or edge
            assert log_probs == pytest.approx(best[: len(ids)], abs=2e-5)
            assert found.kept.tail[row] == pytest.approx(1 - np.exp(position[ids]).sum(), abs=1e-5)
        true = expected[np.arange(len(rows)), block.ids[1:]]
        assert found.kept.true_log_prob[list(rows)] == pytest.approx(true, abs=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_draws_are_as_many_as_their_probability_asks(world: Path, name: str) -> None:
    """Each id is drawn floor(n·p) or ceil(n·p) times: no other draw is so near to p."""
    model, encoder = opened(world, name)
    found, encoded = read(model, encoder, DRAWS, texts())
    for n, block in enumerate(encoded):
        rows = list(range(*found.position_offsets[n : n + 2]))
        if not rows:
            continue
        p = np.exp(textbook(model, len(encoder.vocabulary), block.ids))
        for position, row in zip(p, rows, strict=True):
            entries = slice(*found.kept.offsets[row : row + 2])
            counts = np.zeros(len(position))
            counts[found.kept.ids[entries]] = found.kept.counts[entries]
            assert counts.sum() == DRAWS.draws
            assert np.all(np.abs(counts - DRAWS.draws * position) < 1 + 1e-3)


@pytest.mark.parametrize("draw", [by_spans, by_cumulative_sum])
@given(
    weights=st.integers(1, 300).flatmap(
        lambda size: st.lists(
            st.lists(st.sampled_from([0, 0, 0, 1, 3, 50, 4000]), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        )
    ),
    eighths=st.integers(0, 7),
)
def test_each_draw_is_the_id_whose_part_of_the_sum_it_falls_into(
    draw: Callable[..., torch.Tensor], weights: list[list[int]], eighths: int
) -> None:
    """Whole numbers, which sum without rounding in whatever order."""
    counted = np.array(weights)
    counted[:, -1] += counted.sum(axis=1) == 0
    shift = torch.full((len(counted),), eighths / 8, dtype=torch.float64)
    found = draw(torch.from_numpy(counted).float(), shift, 16).numpy()
    for row, ids in zip(counted, found, strict=True):
        points = (np.arange(16) + eighths / 8) / 16 * row.sum()
        assert ids.tolist() == np.repeat(np.arange(len(row)), row)[points.astype(int)].tolist()


def test_draws_are_unbiased(world: Path) -> None:
    model, encoder = opened(world, "llama")
    block = [prose(1, 12)]
    (encoded,) = encode(encoder, block)
    p = np.exp(textbook(model, len(encoder.vocabulary), encoded.ids))
    sums = np.zeros_like(p)
    runs = 400
    for seed in range(runs):
        reader = SourceReader(model, len(encoder.vocabulary), DRAWS, seed)
        kept = reader.read(block, [encoded]).kept
        row = np.repeat(np.arange(len(p)), np.diff(kept.offsets))
        sums[row, kept.ids] += kept.counts / DRAWS.draws
    # The variance of one systematic draw is at most 1/4 of a count.
    deviation = 0.5 / DRAWS.draws / np.sqrt(runs)
    assert np.abs(sums / runs - p).max() < 5 * deviation


def test_a_block_is_drawn_alike_in_whatever_batch(world: Path) -> None:
    model, encoder = opened(world, "neox")
    rows = texts()
    together, _ = read(model, encoder, DRAWS, rows)
    for n, text in enumerate(rows):
        reader = SourceReader(model, len(encoder.vocabulary), DRAWS, seed=4)
        alone = reader.read([text], encoder.encode([text], [n % 3 == 0]))
        mine = range(*together.position_offsets[n : n + 2])
        assert len(mine) == len(alone.kept.tail)
        first, last = together.kept.offsets[[mine.start, mine.stop]]
        same = np.array_equal(alone.kept.ids, together.kept.ids[first:last])
        # A point may fall to the neighbour where rounding differs with the batch.
        assert same or abs(len(alone.kept.ids) - (last - first)) <= 2


def test_logits_are_float32_whatever_the_weights(world: Path) -> None:
    """Of bfloat16 weights: a softmax of bfloat16 logits would be off by a hundredth and more."""
    model, encoder = opened(world, "llama", "bfloat16")
    rows = [prose(2, 60)]
    found, (encoded,) = read(model, encoder, TOP, rows)
    with torch.no_grad():
        hidden = model.base_model(torch.from_numpy(encoded.ids)[None]).last_hidden_state[0, :-1]
        head = head_of(model)
        exact = torch.log_softmax(hidden.double() @ head.weight.double().t(), -1).numpy()
        rounded = torch.log_softmax(model(torch.from_numpy(encoded.ids)[None]).logits.float(), -1)
    row = np.repeat(np.arange(len(hidden)), TOP.k)
    assert found.kept.log_probs == pytest.approx(exact[row, found.kept.ids], abs=1e-5)
    off = rounded[0, :-1].numpy()[row, found.kept.ids] - exact[row, found.kept.ids]
    assert np.abs(off).max() > 1e-3


def test_rows_of_the_head_without_a_token_are_given_nothing(world: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "neox")
    _, encoder = opened(world, "neox")
    before, _ = read(model, encoder, TOP, texts())
    model.resize_token_embeddings(len(encoder.vocabulary) + 24)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(encoder.vocabulary) :] = 50.0
    after, _ = read(model.eval(), encoder, TOP, texts())
    assert after.kept.ids.max() < len(encoder.vocabulary)
    assert after.kept.log_probs == pytest.approx(before.kept.log_probs, abs=1e-5)
    assert after.kept.true_log_prob == pytest.approx(before.kept.true_log_prob, abs=1e-5)


@given(
    st.lists(st.integers(0, 400), max_size=120),
    st.integers(1, 3000),
)
def test_batches_hold_every_block_once_with_little_padding(lengths: list[int], budget: int) -> None:
    plan = plan_batches(lengths, budget)
    assert sorted(n for batch in plan for n in batch) == [n for n, t in enumerate(lengths) if t]
    positions = [len(batch) * max(lengths[n] for n in batch) for batch in plan]
    assert all(p <= budget or len(b) == 1 for p, b in zip(positions, plan, strict=True))
    assert sum(lengths) >= (1 - PADDING) * sum(positions)
    assert PADDING < 0.05


def test_few_batches_are_made_of_documents_of_realistic_lengths() -> None:
    chance = random.Random(0)
    lengths = [min(1024, int(chance.lognormvariate(5.5, 1.0)) + 1) for _ in range(256)]
    plan = plan_batches(lengths, 4096)
    least = sum(lengths) / 4096
    assert len(plan) < 2.5 * least


def test_memory_that_runs_out_halves_batches_and_then_smaller_ones_are_made(world: Path) -> None:
    model, encoder = opened(world, "llama")
    ids = [block.ids for block in encode(encoder, [prose(1, 30)] * 9)]
    sizes: list[int] = []

    def use(batch: list[int], hidden: torch.Tensor, true_ids: torch.Tensor) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    found = [n for batch, _ in read_blocks(model, ids, 100_000, use) for n in batch]
    assert sorted(found) == list(range(9))
    assert sizes[0] == 9
    assert sizes.count(9) == 1
    assert all(size <= 5 for size in sizes[1:])


def replace_budget(settings: ExternalizeSettings, tokens: int) -> ExternalizeSettings:
    """Several batches, so that their order matters."""
    return settings.model_copy(update={"batch_tokens": tokens})
