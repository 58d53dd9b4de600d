"""What a run will take, before it: `fusellm plan`, `Run.plan`, and the report's plan and fact."""

import gzip
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import fusellm
from conftest import Command
from fusellm.config import ModelSettings
from fusellm.corpus.look import EntryFacts
from fusellm.errors import RecipeError, StoreError
from fusellm.models.load import Located, locate
from fusellm.models.readers import Reader, reader_of
from fusellm.plan import probe
from fusellm.plan.cautions import cautions
from fusellm.plan.memory import of_reading, of_training
from fusellm.plan.shapes import Shapes, shapes_of
from fusellm.plan.stopwatch import Stopwatch
from fusellm.plan.text import CutInMiniature, sizes_of
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, open_recipe
from fusellm.run import Run
from fusellm.store.files import alone_in
from fusellm.store.manifest import StageFolder
from fusellm.store.planned import MemoryParts, PlannedPair, plan_of
from fusellm.store.run_folder import PLAN, PROBE, USAGE, stage_folders
from fusellm.store.usage import measured, usage_of
from fusellm.training.arguments import training_arguments

pytestmark = pytest.mark.usefixtures("unrehearsed")
RECIPES = Path(fusellm.__file__).parent / "recipes"


# Shapes


@pytest.mark.parametrize("name", ["llama", "neox", "mpt"])
def test_what_autograd_keeps_is_told_without_numbers(world: Path, name: str) -> None:
    """Oracle: the same model with numbers, run on the processor."""
    located = locate(ModelSettings(model=str(world / name)))
    shapes = shapes_of(located, 64)
    model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32).train()
    assert shapes.parameters == sum(one.numel() for one in model.parameters())
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        model.base_model(input_ids=torch.zeros((1, 64), dtype=torch.int64), use_cache=False)
    size = sum(size for place, (size, _) in kept.items() if place not in weights)
    assert shapes.kept == pytest.approx(size, rel=0.15)  # kernels of attention keep other sums


def test_operations_are_those_of_the_products(world: Path) -> None:
    """Of a Llama: 2 for each weight of its linear layers and token, and attention's own."""
    located = locate(ModelSettings(model=str(world / "llama")))
    tokens, config = 32, located.config
    shapes = shapes_of(located, tokens)
    model = AutoModelForCausalLM.from_config(config)
    linear = sum(
        one.weight.numel()
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and name != "lm_head"
    )
    attention = 4 * tokens * tokens * config.hidden_size * config.num_hidden_layers
    assert shapes.forward == pytest.approx(2 * tokens * linear + attention, rel=0.02)
    assert shapes.head == 2 * config.vocab_size * config.hidden_size
    assert shapes.operations == pytest.approx(shapes.forward / tokens + shapes.head)
    assert shapes.linear == sum(
        sum(one.weight.shape)
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and name != "lm_head"
    )


def test_an_architecture_that_cannot_be_run_without_numbers_is_estimated(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = locate(ModelSettings(model=str(world / "llama")))
    exact = shapes_of(located, 64)

    def refuse(*_: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("fusellm.plan.shapes._run", refuse)
    rough = shapes_of(located, 64)
    assert rough.parameters == exact.parameters
    assert 0.3 * exact.forward < rough.forward < 3 * exact.forward
    assert 0.2 * exact.kept < rough.kept < 5 * exact.kept


SHAPES = Shapes(1_000_000, 1_000, 64, 4, 4_000, 512, 1e9, 8_000_000)


def test_memory_of_a_training_by_its_settings(world: Path, tmp_path: Path) -> None:
    recipe = open_recipe(world / "recipe.yaml")

    def parts(**training: Any) -> MemoryParts:
        raw = recipe.model_dump(by_alias=True)
        raw["training"] |= {"rows": "packed", "row_tokens": 512} | training
        changed = fusellm.Recipe.model_validate(raw)
        arguments = training_arguments(changed, tmp_path, "fused")
        return of_training(SHAPES, changed, arguments, 4)

    plain = parts()
    assert plain.weights == 4 * SHAPES.parameters
    assert plain.gradients == 8 * SHAPES.parameters  # and what four processes exchange of them
    assert plain.optimizer == 2 * plain.weights
    assert plain.activations == 8 * SHAPES.kept  # rows of a batch
    assert parts(per_device_train_batch_size=2).activations == 2 * SHAPES.kept
    assert parts(optim="sgd").optimizer == 0
    assert parts(optim="adafactor").total < plain.total
    kept = parts(gradient_checkpointing=True)
    assert kept.activations < plain.activations / 2
    lora = parts(lora={"r": 8})
    assert lora.gradients == 8 * 8 * SHAPES.linear
    assert lora.total < plain.total
    spread = MemoryParts(8.0, 8.0, 16.0, 2.0, 1.0, sharded=4)
    assert spread.total == 6 + 3
    assert MemoryParts(8.0, 8.0, 16.0, 2.0, 1.0).total == 24 + 8
    assert MemoryParts(8.0, 8.0, 16.0, 2.0, 1.0, accumulates=True).total == 24 + 8 + 3
    assert parts(gradient_accumulation_steps=4).accumulates


# Cautions


def _readers(world: Path) -> dict[str, Reader]:
    settings = {"target": "llama", "strong": "neox", "weak": "mpt"}
    return {
        name: reader_of(ModelSettings(model=str(world / one))) for name, one in settings.items()
    }


def _pair(better: dict[str, float], width: float = 0.01) -> PlannedPair:
    interval = {name: (value - width, value + width) for name, value in better.items()}
    return PlannedPair({}, better, interval, "")


def _said(world: Path, pairs: dict[str, PlannedPair], rate: float | None = 1e-3) -> list[str]:
    readers = _readers(world)
    shapes = {name: shapes_of(one.located, 64) for name, one in readers.items()}
    return list(cautions(readers, shapes, pairs, rate))


def test_sources_that_know_less_are_told_of(world: Path) -> None:
    """Before an hour is spent: what no source knows better cannot be learnt from one."""
    good = {"strong": _pair({"prose": 0.1, "code": 0.2}), "weak": _pair({"prose": -0.1, "code": 0})}
    assert not [line for line in _said(world, good) if "costs" in line]
    none = {name: _pair({"prose": -0.1, "code": -0.2}) for name in ("strong", "weak")}
    (line, *_) = _said(world, none)
    assert line.startswith("no source costs less than the target on any of the text")
    some = {"strong": _pair({"prose": 0.1, "code": -0.1}), "weak": _pair({"prose": -1, "code": -2})}
    said = _said(world, some)
    assert any(one.startswith("on code no source costs less") for one in said)
    assert any(
        "weak costs more than the target on all of the text (2.00 bits" in one for one in said
    )
    unsure = {"strong": good["strong"], "weak": _pair({"prose": -0.1, "code": -0.2}, 0.5)}
    assert not [line for line in _said(world, unsure) if line.startswith("weak")]


@pytest.mark.parametrize(
    ("front", "says"),
    [
        ("license: llama3.2", "asks that a model improved with its outputs"),
        ("license: [llama2]", "forbids improving other language models"),
        ("license: other\nlicense_name: evil-1", "evil-1, is its own"),
        ("license: cc-by-nc-4.0", "no commercial use"),
        ("license: apache-2.0", None),
        ("license: [", None),
        ("license: other\nlicense_name: qwen-research", "allows research alone"),
        ("license: bigscience-openrail-m", "restricts uses"),
        ("a: &a [x, x]\nlicense: [*a, *a, {b: *a}]", None),
        ("", None),
    ],
)
def test_licences_that_say_something_of_outputs_are_named(
    world: Path, tmp_path: Path, front: str, says: str | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world / "neox", folder)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    reader = reader_of(ModelSettings(model=str(folder)))
    shapes = {"source": shapes_of(reader.located, 64)}
    said = list(cautions({"source": reader}, shapes, {}, None))
    assert any("the licence of" in one for one in said) == (says is not None)
    assert says is None or any(says in one for one in said)


def test_a_rate_far_from_others_and_rows_that_are_no_tokens_are_named(world: Path) -> None:
    assert any("learning rate of 1e-06 is far from" in one for one in _said(world, {}, 1e-6))
    assert not [one for one in _said(world, {}, None) if "learning rate" in one]
    readers = _readers(world)
    rows = len(readers["weak"].encoder.vocabulary) + 64
    shapes = {name: shapes_of(one.located, 64) for name, one in readers.items()}
    shapes["weak"] = Shapes(10, rows, 8, 1, 8, 64, 1.0, 1)
    assert any(
        one.startswith("weak: 64 of the") and "are no tokens" in one
        for one in cautions(readers, shapes, {}, None)
    )


# Plans of runs


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniatures that are small beside the world's text."""
    monkeypatch.setattr(probe, "_MOST_BYTES", 8_000)
    monkeypatch.setattr(probe, "_LEAST_BLOCKS", 4)
    monkeypatch.setattr(probe, "_STEPS", (3, 4))
    monkeypatch.setattr(probe, "operations_per_second", lambda: 1e12)


def test_a_plan_has_the_bytes_and_tokens_that_the_run_then_has(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little: None
) -> None:
    """Within 15 %, from half of the text."""
    monkeypatch.setattr(probe, "_MOST_BYTES", 16_000)
    changes = ["corpus.train_bytes=32_000", "corpus.held_out_bytes=8_000"]
    changes += ["training.rows=packed", "training.row_tokens=256"]
    run = Run(open_recipe(world / "recipe.yaml", changes), tmp_path / "run")
    plan = run.plan()
    assert plan_of(run.folder) == plan
    assert sorted(path.name for path in run.folder.iterdir()) == [PLAN]
    run.execute()
    stages = {one.name: one for one in plan.stages}
    usage = usage_of(run.folder)
    folders = dict(stage_folders(run.folder))
    assert set(stages) == set(folders) == set(usage)
    for name, folder in folders.items():
        size = sum(shard["bytes"] for shard in folder.shards.values())
        if name != "corpus":
            assert stages[name].bytes == pytest.approx(size, rel=0.15, abs=20_000), name
        assert (stages[name].seconds or 0) > 0
        assert stages[name].memory == pytest.approx(usage[name].memory, rel=0.3), name
        if "tokens" in folder.counts and stages[name].tokens is not None:
            assert stages[name].tokens == pytest.approx(folder.counts["tokens"], rel=0.15), name
    counted = sum(folders["corpus"].counts["bytes"]["train"].values())
    assert plan.text["train"] == pytest.approx(counted, rel=0.1)
    assert not plan.is_cut
    page = (run.folder / "report" / "index.html").read_text()
    assert "Plan and fact" in page
    assert page.count('<tr><th scope="row">train/clm</th>') == 2  # there, and under Time
    again = run.plan()
    assert again.is_cut
    body = folders["corpus"].counts["bytes"]
    assert again.text == {part: sum(body[part].values()) for part in body}


def test_all_the_text_there_is_is_known_once_it_was_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little: None
) -> None:
    raw = yaml.safe_load((world / "recipe.yaml").read_text())
    raw["target"]["model"] = str(world / "llama")
    raw["sources"] = [{"name": "second", "model": str(world / "neox")}]
    with gzip.open(tmp_path / "prose.jsonl.gz", "wb") as packed:
        packed.write((world / "prose.jsonl").read_bytes())
    raw["corpus"]["documents"] = [{"files": str(tmp_path / "prose.jsonl.gz"), "domain": "prose"}]
    run = Run(fusellm.Recipe.model_validate(raw), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"corpus.train_bytes is not set.*`fusellm corpus`"):
        run.plan()
    assert not run.folder.exists()
    monkeypatch.setattr(probe, "_MOST_BYTES", 4_000_000)
    plan = run.plan()
    run.corpus()
    counts = StageFolder(run.folder / "corpus").counts["bytes"]
    assert plan.text["train"] == sum(counts["train"].values())


def test_by_shapes_alone_no_weight_is_read_and_nothing_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    changes = ["corpus.train_bytes=1_000_000_000", "training.num_train_epochs=2"]
    run = Run(open_recipe(world / "recipe.yaml", changes), tmp_path / "run")
    plan = run.plan(shapes_only=True, processes=8)
    assert not run.folder.exists()
    stages = {one.name: one for one in plan.stages}
    assert plan.seconds is None
    assert plan.processes == 8
    twice = 2 * (stages["externalize/first"].tokens or 0)
    assert stages["train/fused"].tokens == pytest.approx(twice, rel=0.1)
    ratio = (stages["train/fused"].operations or 0) / (stages["externalize/first"].operations or 1)
    assert ratio == pytest.approx(6, rel=0.1)  # forward and backward, twice over the text
    assert set(plan.memory) == {"training", "first", "second"}


def test_the_command_shows_a_screen_and_json(
    world: Path, tmp_path: Path, command: Command, little: None
) -> None:
    changes = ["--set", "corpus.train_bytes=20_000", "--set", "corpus.held_out_bytes=4_000"]
    given = ["plan", world / "recipe.yaml", "--out", tmp_path / "run", *changes]
    code, out, error = command(*given)
    assert code == 0, error
    assert "train/fused" in out
    assert "bits per byte saved" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = command(*given, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["bytes"] > 0
    assert {one["name"] for one in body["stages"]} >= {"corpus", "fuse", "train/clm"}
    code, out, _ = command(*given, "--shapes")
    assert code == 0
    assert "bits per byte saved" not in out


@pytest.mark.parametrize(
    "training",
    [
        ["num_train_epochs=1.5", "gradient_accumulation_steps=3"],
        ["max_steps=5", "per_device_train_batch_size=3"],
        ["rows=block", "per_device_train_batch_size=7", "dataloader_drop_last=true"],
    ],
)
def test_steps_are_counted_as_trainer_counts_them(
    world: Path, tmp_path: Path, little: None, training: list[str]
) -> None:
    changes = ["corpus.train_bytes=24_000", "training.rows=packed", "training.row_tokens=256"]
    changes += [f"training.{one}" for one in training]
    run = Run(open_recipe(world / "recipe.yaml", changes), tmp_path / "run")
    plan = run.plan()
    run.execute("corpus", "externalize/target", "train/clm")
    counts = StageFolder(run.folder / "train" / "clm").counts
    (stage,) = (one for one in plan.stages if one.name == "train/clm")
    assert stage.steps == pytest.approx(counts["steps"], rel=0.12)
    assert stage.tokens == pytest.approx(counts["tokens"], rel=0.15)


def test_the_target_as_its_own_referee_is_no_source(
    world: Path, tmp_path: Path, little: None
) -> None:
    """It is measured once, under the referee's name."""
    itself = {"name": "itself", "model": str(world / "llama"), "referee": True}
    second = {"name": "second", "model": str(world / "neox")}
    changes = [f"sources={json.dumps([itself, second])}", "corpus.train_bytes=16_000"]
    plan = Run(open_recipe(world / "recipe.yaml", changes), tmp_path / "run").plan()
    assert plan.pairs["itself"].is_referee
    assert set(plan.pairs["itself"].better_by.values()) == {0.0}
    assert set(plan.pairs["second"].better_by) == {"prose", "code"}
    assert not any(one.startswith("itself costs") for one in plan.cautions)


def test_a_corpus_of_other_settings_is_not_counted(
    world: Path, tmp_path: Path, little: None
) -> None:
    first = Run(open_recipe(world / "recipe.yaml", ["corpus.train_bytes=9_000"]), tmp_path / "run")
    first.corpus()
    assert first.plan().is_cut
    other = open_recipe(world / "recipe.yaml", ["corpus.train_bytes=20_000"])
    plan = Run(other, tmp_path / "run").plan()
    assert not plan.is_cut
    assert plan.text["train"] > 15_000


def test_what_this_device_has_no_room_for_is_planned_by_shapes(
    world: Path, tmp_path: Path, little: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("fusellm.stages.train.TrainStage.execute", no_room)
    run = Run(open_recipe(world / "recipe.yaml", ["corpus.train_bytes=9_000"]), tmp_path / "run")
    plan = run.plan()
    stages = {one.name: one for one in plan.stages}
    assert stages["fuse"].seconds is not None
    assert stages["train/fused"].seconds is None
    assert stages["train/fused"].operations
    assert plan.cautions[0].startswith("this device has no room for train/fused")
    assert not plan.is_whole


def test_answers_that_are_not_written_yet_are_no_text(world: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((world / "recipe.yaml").read_text())
    raw["target"]["model"] = str(world / "llama")
    raw["sources"] = [{"name": "second", "model": str(world / "neox")}]
    entry = {"files": str(world / "prose.jsonl"), "text_field": ["text", "answer"]}
    entry |= {"context_fields": ["text"], "generated": {"max_new_tokens": 4}}
    raw["corpus"]["documents"] = [entry]
    with pytest.raises(RecipeError, match="`fusellm generate`"):
        Run(fusellm.Recipe.model_validate(raw), tmp_path / "run").plan()


def test_a_plan_of_another_recipe_is_not_in_the_report(
    world: Path, tmp_path: Path, little: None
) -> None:
    run = Run(open_recipe(world / "recipe.yaml", ["corpus.train_bytes=9_000"]), tmp_path / "run")
    run.execute()
    page = run.folder / "report" / "index.html"
    assert "Plan and fact" not in page.read_text()
    run.plan()
    run.execute("report")
    assert "Plan and fact" in page.read_text()
    other = ["corpus.train_bytes=9_000", "training.learning_rate=2e-3"]
    Run(open_recipe(world / "recipe.yaml", other), run.folder).plan()
    run.execute("report")
    assert "Plan and fact" not in page.read_text()


def test_what_a_killed_plan_has_left_is_removed(world: Path, tmp_path: Path, little: None) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / f"{PROBE}old" / "train").mkdir(parents=True)
    other.mkdir()
    (run / f"{PROBE}link").symlink_to(other)
    held = run / f"{PROBE}held"
    held.mkdir()
    with alone_in(held):
        Run(open_recipe(world / "recipe.yaml", ["corpus.train_bytes=9_000"]), run).plan()
    assert sorted(path.name for path in run.glob(f"{PROBE}*")) == [f"{PROBE}held", f"{PROBE}link"]
    assert other.exists()


def test_text_that_ran_out_is_known_and_text_that_did_not_is_not_taken_for_it() -> None:
    """Budgets are of entries; they are filled to a block."""
    documents = [{"hub": "a/small"}, {"hub": "a/large"}]
    corpus = {"documents": documents, "train_bytes": 1_000_000_000}
    raw = {"name": "one", "target": {"model": "x"}, "sources": [{"name": "s", "model": "y"}]}
    recipe = fusellm.Recipe.model_validate(raw | {"corpus": corpus})
    asked = recipe.corpus.model_copy(update={"train_bytes": 400_000, "block_bytes": 4096})
    entries = [EntryFacts("corpus", {}, 0, None)] * 2

    def train(size: int) -> float:
        cut = CutInMiniature(
            {"train": {"corpus": size}, "validation": {}, "held_out": {}}, asked, 1
        )
        return sizes_of(recipe, Path(), entries, False, cut).bytes["train"]

    assert train(297_000) == 1e9  # the small one ran out, the large one did not
    assert train(198_000) == 1e9  # to a block
    assert train(150_000) == 150_000


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    assert plan_of(tmp_path) is None
    for odd in ("{", "{}", '{"recipe": 1}', "[" * 100_000):
        (tmp_path / PLAN).write_text(odd)
        with pytest.raises(StoreError, match="not what `fusellm plan` writes"):
            plan_of(tmp_path)


# What was used


def test_usage_is_noted_of_what_has_finished(tmp_path: Path) -> None:
    with measured(tmp_path, "fuse"):
        time.sleep(0.05)
    first = usage_of(tmp_path)["fuse"]
    assert first.memory > 1e6
    with pytest.raises(KeyboardInterrupt), measured(tmp_path, "train/fused"):
        raise KeyboardInterrupt
    assert usage_of(tmp_path) == {"fuse": first}
    with measured(tmp_path, "fuse"):
        pass
    assert usage_of(tmp_path)["fuse"].seconds < first.seconds
    (tmp_path / USAGE).write_text("[")
    assert usage_of(tmp_path) == {}


def test_memory_is_that_of_the_stage_and_not_of_the_one_before(tmp_path: Path) -> None:
    for stage, size in (("large", 300), ("small", 1)):
        with measured(tmp_path, stage):
            held = bytearray(size * 1024 * 1024)
            held[::4096] = b"x" * len(held[::4096])
            del held
    usage = usage_of(tmp_path)
    assert usage["large"].memory > usage["small"].memory + 200 * 1024 * 1024


def test_what_stands_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / USAGE).symlink_to(other)
    with measured(tmp_path, "fuse"):
        pass
    assert other.read_text() == "mine"
    assert usage_of(tmp_path)["fuse"].seconds >= 0


def test_blocks_of_one_batch_are_one_move() -> None:
    """Their bar moves in a burst, once the batch is done."""
    watch = Stopwatch(Silent())
    with watch.start("evaluating", 32, "blocks") as bar:
        for _ in range(4):
            time.sleep(0.05)
            for _ in range(8):
                bar.advance()
    (loop,) = watch.taken()
    assert 0.15 < loop.steady < 0.35
    with watch.start("evaluating", 8, "blocks") as bar:
        time.sleep(0.05)
        for _ in range(8):
            bar.advance()
    (loop,) = watch.taken()
    assert loop.steady == loop.seconds > 0.04
    with watch.start("cutting text into blocks", 100, "bytes") as bar:
        for _ in range(100):
            bar.advance()
        time.sleep(0.1)  # looks for text to measure on
    (loop,) = watch.taken()
    assert loop.steady < 0.05 < loop.seconds


def test_a_stopwatch_tells_the_rate_from_what_comes_before() -> None:
    watch = Stopwatch(Silent())
    with watch.start("work", 5, "steps") as bar:
        time.sleep(0.3)  # is done once
        for _ in range(5):
            time.sleep(0.02)
            bar.advance()
    (loop,) = watch.taken()
    assert loop.done == 5
    assert loop.seconds > 0.4
    assert loop.steady < 0.25
    assert watch.taken() == []


# Recipes of real pairs, with given shapes

PAIRS = {
    "smollm2-24gb": (24e9, 1),
    "mistral-lora-24gb": (24e9, 1),
    "llama-80gb": (80e9, 1),
    "olmo-8x80gb": (80e9, 8),
}


def _config(kind: type, width: int, layers: int, heads: tuple[int, int], **more: Any) -> Any:
    """A model's configuration, as its card has it."""
    return kind(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        **more,
    )


def _configs() -> dict[str, Any]:
    def of(inner: int, vocabulary: int, **more: Any) -> dict[str, Any]:
        return {"intermediate_size": inner, "vocab_size": vocabulary, "pad_token_id": None} | more

    tied, apart = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    small = of(6912, 262_144, head_dim=256, **tied)
    return {
        "HuggingFaceTB/SmolLM2-360M": _config(
            LlamaConfig, 960, 32, (15, 5), **of(2560, 49_152, **tied)
        ),
        "Qwen/Qwen2.5-1.5B": _config(Qwen2Config, 1536, 28, (12, 2), **of(8960, 151_936, **tied)),
        "google/gemma-3-1b-pt": _config(Gemma3TextConfig, 1152, 26, (4, 1), **small),
        "mistralai/Mistral-7B-v0.3": _config(
            MistralConfig, 4096, 32, (32, 8), **of(14_336, 32_768, **apart)
        ),
        "Qwen/Qwen3-8B-Base": _config(
            Qwen3Config, 4096, 36, (32, 8), **of(12_288, 151_936, head_dim=128, **apart)
        ),
        "allenai/OLMo-2-1124-7B": _config(
            Olmo2Config, 4096, 32, (32, 32), **of(11_008, 100_352, **apart)
        ),
        "meta-llama/Llama-3.2-3B": _config(
            LlamaConfig, 3072, 28, (24, 8), **of(8192, 128_256, **tied)
        ),
        "Qwen/Qwen2.5-7B": _config(Qwen2Config, 3584, 28, (28, 4), **of(18_944, 152_064, **apart)),
        "Qwen/Qwen2.5-14B": _config(Qwen2Config, 5120, 48, (40, 8), **of(13_824, 152_064, **apart)),
        "microsoft/phi-4": _config(Phi3Config, 5120, 40, (40, 10), **of(17_920, 100_352, **apart)),
    }


PARAMETERS = {
    "HuggingFaceTB/SmolLM2-360M": 0.36e9,
    "Qwen/Qwen2.5-1.5B": 1.54e9,
    "google/gemma-3-1b-pt": 1.0e9,
    "mistralai/Mistral-7B-v0.3": 7.25e9,
    "Qwen/Qwen3-8B-Base": 8.2e9,
    "allenai/OLMo-2-1124-7B": 7.3e9,
    "meta-llama/Llama-3.2-3B": 3.21e9,
    "Qwen/Qwen2.5-7B": 7.62e9,
    "Qwen/Qwen2.5-14B": 14.8e9,
    "microsoft/phi-4": 14.7e9,
}
"""As their cards have them."""


@pytest.mark.parametrize("name", PAIRS)
def test_recipes_of_real_pairs_fit_the_devices_that_they_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each model by the figures of its card: none is loaded, and none is at hand."""
    room, processes = PAIRS[name]
    recipe = load_recipe(RECIPES / "pairs" / f"{name}.yaml")
    configs = _configs()
    monkeypatch.setattr("fusellm.plan.memory.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    for settings in (recipe.target, *recipe.sources):
        located = Located(settings, settings.model, None, configs[settings.model], "", None)
        shapes = shapes_of(located, 512)
        assert shapes.parameters == pytest.approx(PARAMETERS[settings.model], rel=0.03)
        if settings is recipe.target:
            raw = recipe.model_dump(by_alias=True)
            spread = raw["training"].pop("fsdp", None)
            alone = fusellm.Recipe.model_validate(raw)
            arguments = training_arguments(alone, tmp_path, "fused")
            parts = of_training(shapes, alone, arguments, processes)
            parts = replace(parts, sharded=processes if spread else 1)
        else:
            parts = of_reading(settings, shapes, recipe)
        assert 0.05 * room < parts.total < 0.95 * room, (settings.model, parts)


def test_the_pairs_are_all_there() -> None:
    assert {path.stem for path in (RECIPES / "pairs").glob("*.yaml")} == set(PAIRS)
