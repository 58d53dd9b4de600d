"""The whole path on a tiny world: what a run leaves behind, and what interrupts it."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from conftest import prose
from fusellm.errors import CorpusError, FusellmError, IdentityError, ModelError, NumericsError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import read_part
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import CLM, FUSED, STAGES, removable
from fusellm.store.writer import StageWriter
from fusellm.training.arguments import training_arguments
from fusellm.training.collator import Collator
from fusellm.training.forward import objective_inputs, teach_objective
from fusellm.training.rows import RowsOfLikeLength
from stores import clm_rows, fused_rows, outcome_table


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    """The tiny world's run with some settings changed."""
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, Silent())


def results(run: Path) -> list[dict[str, Any]]:
    """The results that a run ended with."""
    found: list[dict[str, Any]] = json.loads((run / "report" / "results.json").read_text())
    return found


def stores(run: Path) -> dict[str, str]:
    """Fingerprint of each stage folder of array work."""
    names = ["corpus", "externalize/first", "externalize/second", "externalize/target", "fuse"]
    return {name: StageFolder(run / name).fingerprint for name in names}


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    pipeline(world, run).execute()
    return run


def test_every_model_is_in_the_results(finished: Path) -> None:
    found = results(finished)
    assert {r["model"] for r in found} == {"first", "second", "target", "clm", "fused", "fused-clm"}
    assert {r["task"] for r in found} == {"prose", "code", "mean"}
    for record in found:
        assert record["metric"] == "bits_per_byte"
        assert record["low"] <= record["value"] <= record["high"]
        assert record["n"] > 0


def test_the_target_and_its_twin_among_the_sources_score_alike(finished: Path) -> None:
    values = {(r["model"], r["task"]): r["value"] for r in results(finished)}
    assert values["first", "mean"] == values["target", "mean"]
    assert values["second", "mean"] != values["target", "mean"]


def test_difference_is_fused_minus_clm(finished: Path) -> None:
    values = {(r["model"], r["task"]): r["value"] for r in results(finished)}
    for task in ("prose", "code", "mean"):
        difference = values["fused", task] - values["clm", task]
        assert values["fused-clm", task] == pytest.approx(difference, abs=1e-12)


def test_training_lowers_bits_per_byte(finished: Path) -> None:
    values = {r["model"]: r["value"] for r in results(finished) if r["task"] == "mean"}
    assert values["clm"] < values["target"]
    assert values["fused"] < values["target"]


def test_the_fused_model_is_an_ordinary_one(finished: Path) -> None:
    folder = finished / "train" / "fused"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the model", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3
    suffixes = {path.suffix for path in folder.rglob("*")}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}
    assert not (finished / "train" / "fused-checkpoints").exists()
    card = (folder / "README.md").read_text()
    assert "second" in card
    assert "GPTNeoXForCausalLM" in card


def test_a_finished_run_does_nothing_again(world: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
    pipeline(world, finished).execute()
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")} == before


def test_each_stage_can_be_run_alone_from_the_runs_own_recipe(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pipeline(world, run).execute(["corpus"])
    own = load_recipe(run / "recipe.yaml")
    for stage in STAGES[1:]:
        Pipeline(resolve_paths(own, run), run, Silent()).execute([stage])
    assert results(run) == results(finished)


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.mark.parametrize("writes", [0, 1, 3, 5, 7, 9, 11, 13, 15])
def test_killed_anywhere_it_goes_on_to_the_same_results(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = [writes]
    original = StageWriter.write

    def dying(self: StageWriter, name: str, *args: Any, **kwargs: Any) -> None:
        if left[0] == 0:
            (self.path / f"{name}.writing").write_bytes(b"half a shard")
            raise Killed
        left[0] -= 1
        original(self, name, *args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StageWriter, "write", dying)
        with pytest.raises(Killed):
            pipeline(world, run).execute()
    pipeline(world, run).execute()
    assert stores(run) == stores(finished)
    assert results(run) == results(finished)
    assert not list(run.rglob("*.writing"))


@pytest.mark.parametrize("which", [FUSED, CLM])
def test_killed_in_training_it_ends_with_the_same_weights(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for folder in ("train/clm", "train/fused", "evaluate", "report"):
        shutil.rmtree(run / folder)
    with monkeypatch.context() as patch:
        _die_at_step_5(patch, which)
        with pytest.raises(Killed):
            pipeline(world, run).execute(["train"])
    assert list((run / "train" / f"{which}-checkpoints").glob("checkpoint-*"))
    pipeline(world, run).execute()
    for model in (FUSED, CLM):
        mine = (run / "train" / model / "model.safetensors").read_bytes()
        assert mine == (finished / "train" / model / "model.safetensors").read_bytes()
    assert results(run) == results(finished)


def _die_at_step_5(patch: pytest.MonkeyPatch, which: str) -> None:
    original = Trainer.training_step
    steps = [0]

    def dying(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if f"{which}-checkpoints" in str(self.args.output_dir):
            steps[0] += 1
            if steps[0] == 5:
                raise Killed
        return original(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", dying)


@pytest.mark.usefixtures("unrehearsed")
def test_a_checkpoint_cut_off_in_saving_is_not_resumed_from(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for folder in ("train/fused", "evaluate", "report"):
        shutil.rmtree(run / folder)
    saved = [0]
    original = Trainer._save_rng_state

    def dying(self: Trainer, folder: str) -> None:
        saved[0] += 1
        if saved[0] == 2:
            raise Killed
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", dying)
        with pytest.raises(Killed):
            pipeline(world, run).execute()
    assert len(list((run / "train" / "fused-checkpoints").glob("checkpoint-*"))) == 2
    pipeline(world, run).execute()
    assert results(run) == results(finished)


def test_clean_stores_leaves_a_run_that_is_finished(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in removable(run, stores=True, everything=False):
        assert path.suffix == ".arrow"
        path.unlink()
    page = (run / "report" / "index.html").read_bytes()
    pipeline(world, run).execute()
    assert (run / "report" / "index.html").read_bytes() == page


def test_missing_weights_are_refused(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(world / "neox", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["embed_out.weight" if "embed_out.weight" in weights else "lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights that its configuration asks for"):
        pipeline(world, tmp_path / "run", f"sources.1.model={folder}").execute()


def test_documents_of_one_name_in_two_folders_are_two(world: Path, tmp_path: Path) -> None:
    for n, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(f"text {n}\n")
    changes = f'corpus.documents=[{{"files": "{tmp_path}/*/same.txt"}}]'
    before = pipeline(world, tmp_path / "run", changes).stages[0].identity()
    (tmp_path / "a" / "same.txt").write_text("another text\n")
    after = pipeline(world, tmp_path / "run", changes).stages[0].identity()
    assert before != after


def test_long_documents_are_measured_by_their_beginnings(world: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{n} a line of text\n" * 4000}) for n in range(12)]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    changes = (
        f'corpus.documents=[{{"files": "{tmp_path}/long.jsonl"}}]',
        "corpus.validation_share=0.3",
        "corpus.held_out_share=0.4",
        "corpus.held_out_bytes=20000",
    )
    run = tmp_path / "run"
    pipeline(world, run, *changes).execute(["corpus"])
    folder = StageFolder(run / "corpus")
    blocks = read_part(folder, "held_out")
    assert sum(len(block.text) for block in blocks) <= 20_000 + 256
    assert len({block.document for block in blocks}) in (3, 4)
    assert not any(block.last for block in blocks)


def test_another_identity_stops_and_redo_moves_it_aside(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = stores(run)
    changed = ["fusion.granularity=block"]
    with pytest.raises(IdentityError, match=r"fuse was made from something else.*granularity"):
        pipeline(world, run, *changed).execute()
    assert stores(run) == before
    pipeline(world, run, *changed).execute(redo=True)
    assert (run / "aside" / "1" / "fuse").is_dir()
    assert (run / "aside" / "1" / "train" / "fused").is_dir()
    assert not (run / "aside" / "1" / "train" / "clm").exists()
    after = stores(run)
    assert after["fuse"] != before["fuse"]
    assert after["externalize/second"] == before["externalize/second"]


def test_domains_are_routed_and_a_mixture_hears_all(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("corpus", "externalize"):
        shutil.copytree(finished / name, run / name)
    routes = ("fusion.function=route", "fusion.routes={prose: first, code: second}")
    pipeline(world, run, *routes).execute(["fuse"])

    def wins() -> dict[str, dict[str, float]]:
        counts = json.loads((run / "fuse" / "counts.json").read_text())["domains"]
        return {domain: found["wins"] for domain, found in counts.items()}

    of_prose, of_code = wins()["prose"], wins()["code"]
    assert of_prose["first"] > 100 < of_code["second"]
    assert of_prose["second"] == of_code["first"] == 0
    pipeline(world, run, "fusion.function=bayes").execute(["fuse"], redo=True)
    assert all(min(of_domain.values()) > 0 for of_domain in wins().values())


def test_redo_is_for_what_was_finished_and_says_what_it_moved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    none_held_out = pipeline(world, run, "corpus.held_out_share=0")
    with pytest.raises(CorpusError, match="held_out"):
        none_held_out.execute(["corpus"])
    pipeline(world, run).execute(["corpus"])
    changed = pipeline(world, run, "corpus.held_out_share=0.3")
    said: list[str] = []
    monkeypatch.setattr(changed._progress, "say", said.append)
    changed.execute(["corpus"], redo=True)
    assert said == [f"moved corpus to {run / 'aside' / '1'}"]


def test_another_lambda_redoes_only_training(world: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(IdentityError, match=r"train/fused was made.*lambda"):
        pipeline(world, run, "objective.lambda=0.7").execute()
    pipeline(world, run, "objective.lambda=0.7").execute(redo=True)
    assert stores(run) == stores(finished)


def test_another_precision_of_the_target_is_measured_anew(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    """Training is in float32 whatever the dtype, but what is measured is not."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(IdentityError, match=r"evaluate was made.*target was"):
        pipeline(world, run, "target.dtype=bfloat16").execute()


def test_a_further_source_needs_no_code_and_touches_no_other(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {p: p.stat().st_mtime_ns for p in (run / "externalize").rglob("*.arrow")}
    models = {"first": "llama", "second": "neox", "third": "mpt"}
    sources = [{"name": name, "model": str(world / model)} for name, model in models.items()]
    third = f"sources={json.dumps(sources)}"
    pipeline(world, run, third).execute(redo=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (run / "externalize" / "third" / "manifest.json").exists()
    assert "third" in {record["model"] for record in results(run)}


def test_lambda_one_gives_the_losses_of_trainer(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    """λ = 1 equals Trainer with the model's own loss, step by step."""
    run = tmp_path / "run"
    same_order = "training.train_sampling_strategy=random"  # group_by_length is ours
    one = pipeline(world, run, "objective.lambda=1", "training.logging_steps=1", same_order)
    one.execute(["corpus", "externalize", "fuse", "train"])
    log = [json.loads(line) for line in (run / "train/fused/log.jsonl").read_text().splitlines()]
    ours = [entry["loss"] for entry in log if "loss" in entry]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    arguments = training_arguments(one.recipe, tmp_path / "plain", CLM)
    arguments.eval_strategy = "no"
    collate = Collator(None, packed=False)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=clm_rows(run, StageFolder(run / "corpus")),
        data_collator=lambda found: {
            name: value for name, value in collate(found).items() if name != "counts"
        },
    )
    trainer.train()
    plain = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(plain) > 5
    np.testing.assert_allclose(ours, plain, rtol=2e-5)
    trained = AutoModelForCausalLM.from_pretrained(run / "train" / "fused")
    for mine, theirs in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    rows=st.integers(1, 16),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batches_of_like_length_are_every_row_once_in_an_order_of_the_epoch(
    lengths: list[int], rows: int, epoch: int
) -> None:
    windows = np.arange(len(lengths)) % (1 + rows % 3)
    sampler = RowsOfLikeLength(lengths, windows, rows, 5)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) == list(range(len(sampler)))
    again = RowsOfLikeLength(lengths, windows, rows, 5)
    list(again)
    again.set_epoch(epoch)  # whatever was read before
    assert list(again) == order


def test_batches_of_like_length_pad_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2000)
    order = list(RowsOfLikeLength(lengths.tolist(), np.zeros(2000), 8, 0))
    batches = lengths[order].reshape(-1, 8)
    assert (batches.max(1) * 8).sum() < 1.05 * lengths.sum()
    means = batches.mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # not sorted by length


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_packed_rows_equal_one_block_a_row(world: Path, finished: Path, name: str) -> None:
    """A packed block attends only to itself."""
    from fusellm.models.heads import hidden_states

    model = AutoModelForCausalLM.from_pretrained(world / name).eval()
    rows = clm_rows(finished, StageFolder(finished / "corpus"))
    blocks = [rows[n][0] for n in range(4)]
    limit = model.config.vocab_size
    blocks = [block | {"ids": block["ids"] % limit} for block in blocks]
    packed = Collator(None, packed=True)([blocks[:3], blocks[3:]])
    padded = Collator(None, packed=False)([[block] for block in blocks])

    def predicted(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "counts")}
        with torch.no_grad():
            hidden = hidden_states(model, **inputs)
        chosen = batch["labels"][:, 1:] != -100
        return hidden[:, :-1][chosen], batch["labels"][:, 1:][chosen]

    for mine, theirs in zip(predicted(packed), predicted(padded), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packed_training_runs_and_mpt_is_refused(world: Path, tmp_path: Path) -> None:
    packed = ("training.rows=packed", "training.row_tokens=400")
    pipeline(world, tmp_path / "run", *packed).execute()
    with pytest.raises(ModelError, match="position ids"):
        pipeline(world, tmp_path / "mpt", *packed, f"target.model={world / 'mpt'}").execute()


@pytest.mark.parametrize(
    "changes",
    [
        ("externalize.scheme=top", "externalize.k=10", "externalize.mass=null"),
        ("externalize.scheme=top", "objective.rest=renormalize", "fusion.strategy=bytes"),
        ("fusion.strategy=bytes", "fusion.granularity=block"),
        ("training.clm_baseline=false", "corpus.train_tokens=3000"),
        ("training.clm.learning_rate=1e-4", "training.gradient_accumulation_steps=2"),
    ],
)
def test_other_settings_run_to_the_end(world: Path, tmp_path: Path, changes: Sequence[str]) -> None:
    pipeline(world, tmp_path / "run", *changes).execute()
    assert results(tmp_path / "run")


def test_tokens_are_healed_unless_a_recipe_says_not_to(world: Path, tmp_path: Path) -> None:
    run, stages = tmp_path / "run", ["corpus", "externalize", "fuse"]
    shard = run / "fuse" / "train-00000.arrow"
    pipeline(world, run).execute(stages)
    healed = shard.read_bytes()
    as_read = ("fusion.token_healing=false",)
    with pytest.raises(IdentityError, match="token_healing was true and is now false"):
        pipeline(world, run, *as_read).execute(stages)
    pipeline(world, run, *as_read).execute(stages, redo=True)
    assert shard.read_bytes() != healed
    for change in ("true", "null"):
        again = pipeline(world, run, f"fusion.token_healing={change}")
        again.execute(stages, redo=True)
        assert shard.read_bytes() == healed


def test_source_equal_to_target_with_bucket_pulls_nowhere(world: Path, tmp_path: Path) -> None:
    """A source equal to the target gives no gradient, to the store's quantization."""
    alone = f'sources=[{{"name": "first", "model": "{world / "llama"}"}}]'
    changes = (alone, "externalize.scheme=top", "externalize.k=3", "objective.lambda=0")
    run = tmp_path / "run"
    one = pipeline(world, run, *changes)
    one.execute(["corpus", "externalize", "fuse"])
    corpus = StageFolder(run / "corpus")
    rows = fused_rows(run, corpus)
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    norms = {}
    for rest in ("bucket", "renormalize"):
        table = outcome_table(StageFolder(run / "fuse"), ["first"], rest == "renormalize")
        batch = Collator(table, packed=False)([rows[n] for n in range(8)])
        model.zero_grad()
        teach_objective(model)
        model(**objective_inputs(batch, 0.0))["loss"].backward()
        norms[rest] = sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
    assert norms["bucket"] < 0.01 * norms["renormalize"]


def test_nan_in_a_source_stops_with_its_name(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(world / "neox")
    with torch.no_grad():
        model.base_model.final_layer_norm.weight[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(world / "neox").save_pretrained(broken)
    run = tmp_path / "run"
    with pytest.raises(NumericsError, match=r"source 'second' gives NaN or infinity on \d+ of"):
        pipeline(world, run, f"sources.1.model={broken}").execute()
    assert StageFolder(run / "externalize" / "first").complete


def test_a_block_longer_than_a_context_is_refused_before_weights_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusellm.reading import worker

    monkeypatch.setattr(worker, "load_model", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"text": prose(n, words=900)}) for n in range(40))
    )
    documents = f'corpus.documents=[{{"files": "{tmp_path}/long.jsonl"}}]'
    with pytest.raises(CorpusError, match=r"tokens for '\w+', whose context is 512; lower"):
        pipeline(world, tmp_path / "run", documents, "corpus.block_bytes=4000").execute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no model folder"),
        (lambda folder: folder.mkdir(), "holds no model: it has no config.json"),
        (lambda folder: _only(folder, "config.json", "pytorch_model.bin"), "pickles only"),
        (lambda folder: _only(folder, "config.json"), "has no weights"),
    ],
)
def test_bad_model_folders(world: Path, tmp_path: Path, make: Any, message: str) -> None:
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(ModelError, match=message):
        pipeline(world, tmp_path / "run", f"sources.1.model={folder}")
    assert not (tmp_path / "run").exists()


def _only(folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")


def test_odd_documents_are_handled_and_counted(world: Path, tmp_path: Path) -> None:
    files = tmp_path / "texts"
    files.mkdir()
    big = "".join(chr(c) for c in range(0, 0x110000, 16) if not 0xD800 <= c < 0xE000)
    odd = ["", " \n\t ", "x", big, "a\x00b\x00", "</s><s><unk><|endoftext|> text", "é" * 5000]
    for n, text in enumerate(odd):
        (files / f"odd-{n}.txt").write_bytes(text.encode("utf-8"))
    (files / "bad.txt").write_bytes(b"good \xff\xfe bad" * 10)
    for n in range(60):
        (files / f"plain-{n}.txt").write_text(f"{n} plain text of some words\n" * 5)
    documents = f'corpus.documents=[{{"files": "{files}/*.txt", "domain": "odd"}}]'
    run = tmp_path / "run"
    shares = ("corpus.validation_share=0.2", "corpus.held_out_share=0.2")
    limits = ("corpus.train_bytes=9000000", "training.max_steps=2")
    pipeline(world, run, documents, *shares, *limits).execute()
    counts = StageFolder(run / "corpus").counts
    assert counts["empty_documents"] == 2
    assert counts["documents_with_invalid_utf8"] == 1
    assert results(run)


def test_text_that_a_tokenizer_changes_is_left_out_and_counted(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lower"
    shutil.copytree(world / "neox", folder)
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text())
    layout["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(layout))
    (tmp_path / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": f"Upper {n} case\n" if n % 2 else f"lower {n} case\n"}) + "\n"
            for n in range(200)
        )
    )
    run = tmp_path / "run"
    documents = f'corpus.documents=[{{"files": "{tmp_path}/texts.jsonl", "domain": "mixed"}}]'
    pipeline(world, run, documents, f"sources.1.model={folder}").execute()
    counts = json.loads((run / "fuse" / "counts.json").read_text())["domains"]["mixed"]
    second = counts["sources"]["second"]
    assert second["blocks_left_out"] == pytest.approx(counts["blocks"] / 2, rel=0.3)
    assert second["example_left_out"].startswith("Upper")
    assert counts["sources"]["first"]["blocks_left_out"] == 0


@pytest.mark.parametrize(
    ("documents", "error"),
    [
        ('[{"files": "nothing/*.txt"}]', "no file fits"),
        ('[{"files": "empty.txt"}]', "no text in its part train"),
        ('[{"files": "prose.jsonl", "text_field": "body"}]', "has no field 'body'"),
    ],
)
def test_bad_corpora(world: Path, tmp_path: Path, documents: str, error: str) -> None:
    (world / "empty.txt").write_text("")
    with pytest.raises(FusellmError, match=error):
        pipeline(world, tmp_path / "run", f"corpus.documents={documents}").execute()


def test_a_full_disk_keeps_finished_shards(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync
    left = [12]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FusellmError, match="the disk is full"):
            pipeline(world, run).execute()
    assert not list(run.rglob("*.writing"))
    pipeline(world, run).execute()
    assert results(run)


def test_damaged_shards_and_manifests_are_refused(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "fuse")
    shard = next((run / "externalize" / "second").glob("train-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FusellmError, match=f"{shard.name} is damaged"):
        pipeline(world, run).execute()
    manifest = run / "externalize" / "second" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"blocks": ', '"blocks": 1', 1))
    with pytest.raises(FusellmError, match=r"manifest.json is damaged"):
        pipeline(world, run).execute()
