"""Prompt and answer: text that is read and not predicted, from a record's fields to the loss."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import prose
from fusellm.config import FileDocuments
from fusellm.corpus.fields import Fields
from fusellm.errors import CorpusError, RecipeError
from fusellm.objective.divergence import CROSS_ENTROPY
from fusellm.objective.outcomes import Outcomes
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import BLOCKS, BLOCKS_SCHEMA, open_corpus, read_part
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names
from fusellm.tokens.context import context_bytes, is_context_token, spans_within
from fusellm.training.collator import Collator
from fusellm.training.forward import (
    IGNORED,
    Untouched,
    objective_inputs,
    teach_objective,
)
from stores import clm_rows, fused_rows, outcome_table

ENTRY = {"text_field": ["prompt", "answer"], "context_fields": ["prompt"], "domain": "chat"}


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, Silent())


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with answers; some answers are empty, some records longer than a block."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("records") / "chat.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(120):
            row = {
                "prompt": f"{n} {prose(n, words=rng.randint(8, 80))}",
                "answer": None if n % 10 == 0 else prose(500 + n, words=rng.randint(8, 40)),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def documents(path: Path, **changes: Any) -> str:
    return f"corpus.documents={json.dumps([{'files': str(path)} | ENTRY | changes])}"


@pytest.fixture(scope="module")
def fused(world: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("chat") / "run"
    pipeline(world, run, documents(records)).execute(["corpus", "externalize", "fuse"])
    return run


# Spans


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    edges=st.sets(st.integers(0, 40), max_size=8),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_token_is_context_if_all_its_bytes_are(lengths: list[int], edges: set[int]) -> None:
    ends = np.cumsum(lengths)
    size = int(ends[-1])
    flat = sorted(edges)
    spans = spans_within(list(zip(flat[::2], flat[1::2], strict=False)), 0, size)
    of_byte = context_bytes(spans, size)
    for token, (end, found) in enumerate(
        zip(ends, is_context_token(ends, spans, size), strict=True)
    ):
        own = of_byte[end - lengths[token] : end]
        if len(own):
            assert found == own.all()
        elif size:
            assert found == of_byte[min(end, size - 1)]
        else:
            assert not found


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 50), max_size=5),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_spans_of_blocks_are_those_of_their_document(sizes: list[int], cuts: set[int]) -> None:
    ends = np.cumsum(sizes).tolist()
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)][::2]
    whole = context_bytes(spans, ends[-1])
    places = [0, *sorted(cut for cut in cuts if cut < ends[-1]), ends[-1]]
    blocks = [
        context_bytes(spans_within(spans, start, end), end - start)
        for start, end in itertools.pairwise(places)
    ]
    assert np.array_equal(np.concatenate(blocks), whole)


# Records


def test_fields_are_joined_and_their_bytes_known() -> None:
    entry = FileDocuments(
        files="x",
        text_field=["system", "question", "answer", "note"],
        context_fields=["system", "question"],
        field_separator=" → ",
    )
    row = {"system": "Straße\ud800", "question": None, "answer": "Ja", "note": ""}
    text, spans = Fields.of(entry).text(row, "here")
    assert text == "Straße? →  → Ja → "
    data = text.encode()
    assert [data[start:end].decode() for start, end in spans] == ["Straße? → ", " → "]
    assert Fields.of(FileDocuments(files="x")).text({"text": "a\ud800"}, "") == ("a\ud800", ())


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"text_field": ["a", "b"], "context_fields": ["c"]}, "'c' is not among text_field (a, b)"),
        ({"text_field": "a", "context_fields": ["a"]}, "all of text_field; nothing is left to"),
        ({"text_field": ["a", "b", "a"]}, "text_field names 'a' twice"),
        ({"text_field": []}, "text_field"),
    ],
)
def test_fields_that_clash_are_refused(world: Path, entry: dict[str, Any], part: str) -> None:
    change = f"corpus.documents={json.dumps([{'files': 'prose.jsonl'} | entry])}"
    with pytest.raises(RecipeError, match=r"corpus\.documents\.0") as caught:
        pipeline(world, world / "none", change)
    assert part in str(caught.value)


def test_files_without_the_fields_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("text")
    table = pa.table({"prompt": ["a"], "reply": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    for name, message in {
        "plain.txt": "is text without fields, and context_fields names some",
        "chat.parquet": "has no column 'answer'; it has prompt, reply",
    }.items():
        one = pipeline(world, tmp_path / name.split(".")[0], documents(tmp_path / name))
        with pytest.raises(CorpusError, match=message):
            one.execute(["corpus"])


def test_jsonl_and_parquet_give_the_same_blocks(
    world: Path, records: Path, fused: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    run = tmp_path / "run"
    pipeline(world, run, documents(tmp_path / "chat.parquet")).execute(["corpus"])
    for part in ("train", "validation"):
        mine, theirs = (read_part(open_corpus(place), part) for place in (run, fused))
        assert [(b.text, b.context) for b in mine] == [(b.text, b.context) for b in theirs]


def test_blocks_say_which_bytes_are_context(records: Path, fused: Path) -> None:
    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    folder = open_corpus(fused)
    context: dict[str, bytes] = {}
    for part in ("train", "validation", "held_out"):
        for block in read_part(folder, part):
            data = block.text.encode()
            found = b"".join(data[start:end] for start, end in block.context)
            context[block.document] = context.get(block.document, b"") + found
    assert len(context) > 100
    for name, found in context.items():
        prompt = rows[int(name.rsplit(":", 1)[1])]["prompt"]
        assert (prompt + "\n").encode().startswith(found)
    assert folder.counts["context_bytes"] > 1000


def test_only_a_corpus_with_context_has_the_column(world: Path, tmp_path: Path) -> None:
    plain = pipeline(world, tmp_path / "run")
    plain.execute(["corpus"])
    folder = open_corpus(tmp_path / "run")
    assert Shard(folder, shard_names(folder)[0], BLOCKS).schema == BLOCKS_SCHEMA
    assert "context_bytes" not in folder.counts


# Training


def test_neither_loss_predicts_context(world: Path, fused: Path) -> None:
    """The batch's loss is that of the whole batch, over the tokens that are not context."""
    corpus = open_corpus(fused)
    fused_, clm = fused_rows(fused, corpus), clm_rows(fused, corpus)
    assert fused_.rows == clm.rows
    texts = {block.number: block for block in read_part(corpus, "train")}
    blocks = [fused_[n][0] for n in range(12)]
    assert any(block["context"].all() is np.False_ for block in blocks)
    table = outcome_table(StageFolder(fused / "fuse"), ["first", "second"], False)
    batch = Collator(table, packed=False)([[block] for block in blocks])
    whole = Collator(table, packed=False)([[_without(block)] for block in blocks])
    encoder = pipeline(world, fused).readers["target"].encoder
    for r, block in enumerate(blocks):
        told = texts[block["block"]]
        (encoded,) = encoder.encode([told.text], [told.last])
        size = len(told.text.encode())
        expected = is_context_token(encoded.ends, told.context, size)
        labels = batch["labels"][r, 1 : len(expected)].numpy()
        assert ((labels == IGNORED) == expected[1:]).all()
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    wanted = (batch["labels"] != IGNORED)[whole["labels"] != IGNORED].nonzero()[:, 0]
    assert batch["counts"].predicted == len(wanted) < whole["counts"].predicted
    assert batch["counts"].tokens == whole["counts"].tokens
    assert len(batch["outcomes"]["present"]) == len(wanted)
    for weight in (1.0, 0.0):
        each = _each_position(model, whole, weight)
        teach_objective(model)
        with torch.no_grad():
            loss = model(**objective_inputs(batch, weight))["loss"]
        assert loss.item() == pytest.approx(each[wanted].mean().item(), rel=1e-4)


def _without(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "context"}


def _each_position(model: Any, batch: dict[str, Any], clm_weight: float) -> torch.Tensor:
    """[N] loss of each predicted position of a batch, by leaving out all others."""
    found, places = [], (batch["labels"] != IGNORED).nonzero()
    outcomes = batch["outcomes"]
    for n, (row, column) in enumerate(places.tolist()):
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[row, column] = batch["labels"][row, column]
        parts = outcomes["position"] == n
        of_outcome = parts[outcomes["part"]]
        members = of_outcome[outcomes["member_outcome"]]
        own = {
            "present": outcomes["present"][n : n + 1],
            "position": outcomes["position"][parts] - n,
            "rest": outcomes["rest"][parts],
            "part": torch.unique(outcomes["part"][of_outcome], return_inverse=True)[1],
            "mass": outcomes["mass"][of_outcome],
            "member_outcome": torch.unique(
                outcomes["member_outcome"][members], return_inverse=True
            )[1],
            "member_id": outcomes["member_id"][members],
        }
        teach_objective(model)
        with torch.no_grad():
            one = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                outcomes=Untouched(Outcomes(**own)),
                clm_weight=clm_weight,
                divergence=Untouched(CROSS_ENTROPY),
            )
        found.append(one["loss"])
    return torch.stack(found)


def test_blocks_that_are_all_context_are_left_out(fused: Path) -> None:
    corpus = open_corpus(fused)
    rows = clm_rows(fused, corpus)
    kept = {rows[n][0]["block"] for n in range(len(rows))}
    for block in read_part(corpus, "train"):
        size = len(block.text.encode())
        assert (block.number in kept) == (not context_bytes(block.context, size).all())
    assert len(kept) < len(read_part(corpus, "train"))


@pytest.mark.parametrize("rows", ["block", "packed"])
def test_a_run_with_context_measures_answers_alone(
    world: Path, records: Path, fused: Path, tmp_path: Path, rows: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fused, run)
    changes = (documents(records), f"training.rows={rows}", "training.learning_rate=1e-2")
    pipeline(world, run, *changes).execute()
    notes = json.loads((run / "evaluate" / "results.json").read_text())["notes"]
    held_out = read_part(open_corpus(run), "held_out")
    answers = sum(
        len(block.text.encode()) - sum(end - start for start, end in block.context)
        for block in held_out
    )
    # A model without BOS does not predict the first token of a block.
    assert 0.95 * answers < notes["bytes"]["chat"] <= answers
    found = json.loads((run / "report" / "results.json").read_text())
    values = {r["model"]: r["value"] for r in found if r["task"] == "mean"}
    assert values["fused"] < values["target"]
    log = [json.loads(s) for s in (run / "train/clm/log.jsonl").read_text().splitlines()]
    assert "clm_loss" in log[0]
