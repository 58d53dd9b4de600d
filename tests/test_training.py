"""Training on the tiny world: every setting trains, is logged, is resumed, and is saved whole."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from fusellm.cli.main import main
from fusellm.config import LoraSettings, ModelSettings
from fusellm.errors import FusellmError, IdentityError, ModelError, NumericsError, RecipeError
from fusellm.models import adapters, hub
from fusellm.models.adapters import with_adapters, without_adapters
from fusellm.models.heads import check_head
from fusellm.models.load import load_model, locate
from fusellm.objective.schedule import LambdaSchedule
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.blocks import open_corpus, read_part
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard
from fusellm.training import rows as training_rows
from fusellm.training import run_trainer as trainers
from fusellm.training.collator import Collator
from fusellm.training.forward import objective_inputs, teach_objective
from fusellm.training.rows import RowOrder, RowsOfLikeLength
from fusellm.training.validation import Validation
from stores import fused_rows, outcome_table

CPU = torch.device("cpu")
FAST = ("training.learning_rate=1e-2", "training.eval_on_start=true")


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    """The tiny world's run with some settings changed."""
    recipe = load_recipe(world / "recipe.yaml", changes)
    return Pipeline(resolve_paths(recipe, world), run, Silent())


def prepare(world: Path, run: Path, *changes: str) -> Path:
    pipeline(world, run, *changes).execute(["corpus", "externalize", "fuse"])
    return run


@pytest.fixture(scope="module")
def fused(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before its trainings."""
    return prepare(world, tmp_path_factory.mktemp("fused") / "run")


TOP = ("externalize.scheme=top", "externalize.k=10", "fusion.strategy=bytes")


@pytest.fixture(scope="module")
def fused_top(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the most probable tokens, mapped to single tokens."""
    return prepare(world, tmp_path_factory.mktemp("top") / "run", *TOP)


Train = Callable[..., Path]


@pytest.fixture
def trained(world: Path, fused: Path, tmp_path: Path) -> Train:
    """Trains the fused model on a copy of the run; gives its folder."""
    count = [0]

    def go(*changes: str, base: Path = fused, which: str = "train/fused") -> Path:
        count[0] += 1
        run = tmp_path / str(count[0])
        shutil.copytree(base, run)
        pipeline(world, run, *changes).execute([which])
        return run / which

    return go


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(folder) if "loss" in entry]


def validations_of(folder: Path) -> list[float]:
    return [entry["validation"]["mean"] for entry in log_of(folder) if "validation" in entry]


def measured(world: Path, folder: Path, *changes: str) -> float:
    """Validation bits per byte of what a folder holds, loaded as any model is."""
    run = folder.parents[1]
    recipe = pipeline(world, run, *changes)
    blocks = read_part(open_corpus(run), "validation")
    model = load_model(locate(ModelSettings(model=str(folder))), CPU)
    encoder = recipe.readers["target"].encoder
    return Validation(encoder, blocks, recipe.recipe).measure(model)["mean"]


def weights_of(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


# Validation


def test_validation_is_in_the_precision_that_is_trained_in(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 it took a third of a training in bfloat16."""
    kinds: list[torch.dtype | None] = []
    measure = Validation.measure

    def recorded(self: Validation, model: Any) -> dict[str, float]:
        is_on = torch.is_autocast_enabled("cpu")
        kinds.append(torch.get_autocast_dtype("cpu") if is_on else None)
        return measure(self, model)

    monkeypatch.setattr(Validation, "measure", recorded)
    half = validations_of(trained("training.bf16=true"))
    plain = validations_of(trained())
    assert kinds == [torch.bfloat16] * len(half) + [None] * len(plain)
    assert half == pytest.approx(plain, rel=0.02)


# λ and divergences


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LambdaSchedule(0.9), [0.9, 0.9, 0.9, 0.9]),
        (LambdaSchedule(0.2, "linear", 0.6), [0.2, 0.3, 0.4, 0.5]),
        (LambdaSchedule(1.0, "linear", 0.0), [1.0, 0.75, 0.5, 0.25]),
        (LambdaSchedule(0.0, "cosine", 1.0), [0.0, 0.1464, 0.5, 0.8536]),
        # λ + (1 − λ) · global_step / max_steps, as FuseLLM's own trainer writes it
        (LambdaSchedule(0.9, "authors"), [0.9, 0.925, 0.95, 0.975]),
    ],
)
def test_schedules_of_lambda(schedule: LambdaSchedule, expected: list[float]) -> None:
    assert [schedule.at(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-4)


def test_lambda_follows_its_schedule_and_is_logged(trained: Train) -> None:
    changes = (
        "objective.lambda_schedule=linear",
        "objective.lambda_end=1",
        "training.logging_steps=1",
    )
    log = losses_of(trained(*changes))
    steps = log[0]["steps"]
    assert [entry["lambda"] for entry in log] == pytest.approx(
        [0.5 + 0.5 * n / steps for n in range(steps)]
    )
    for entry in log:
        parts = entry["lambda"] * entry["clm_loss"] + (1 - entry["lambda"]) * entry["fusion_loss"]
        assert entry["fused_share"] == 1  # the target is a source
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)


def test_kl_trains_as_cross_entropy_does(trained: Train) -> None:
    """Their gradients are one; the losses are apart by the fused distribution's entropy."""
    plain, kl = trained(*FAST), trained(*FAST, "objective.divergence=kl")
    mine, theirs = load_file(kl / "model.safetensors"), load_file(plain / "model.safetensors")
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4)
    apart = [
        a["fusion_loss"] - b["fusion_loss"]
        for a, b in zip(losses_of(plain), losses_of(kl), strict=True)
    ]
    assert min(apart) > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        ("objective.divergence=reverse_kl",),
        ("objective.rest=renormalize", "objective.temperature=2"),
        ("objective.rest=renormalize", "objective.temperature=0.5", "objective.divergence=kl"),
    ],
)
def test_other_divergences_train(trained: Train, fused_top: Path, changes: Sequence[str]) -> None:
    folder = trained(*TOP, *FAST, *changes, base=fused_top)
    found = validations_of(folder)
    assert found[-1] < found[0]
    assert all(0 < entry["kept_mass"] < 1 for entry in losses_of(folder))


def test_fused_distributions_are_flattened_by_the_temperature(world: Path, fused_top: Path) -> None:
    rows = fused_rows(fused_top, StageFolder(fused_top / "corpus"))
    blocks = [block for row in range(4) for block in rows[row]]
    folder, names = StageFolder(fused_top / "fuse"), ["first", "second"]
    plain, kept = outcome_table(folder, names, True).outcomes(blocks)
    warm, same = outcome_table(folder, names, True, 2.0).outcomes(blocks)
    assert np.array_equal(kept, same)
    assert warm["rest"].max() == 0
    for part in range(0, len(plain["position"]), 7):
        mine = plain["part"] == part
        expected = torch.softmax(plain["mass"][mine].log() / 2, dim=0)
        torch.testing.assert_close(warm["mass"][mine], expected * plain["mass"][mine].sum())


def test_a_setting_of_training_alone_leaves_fuse_as_it_is(
    world: Path, fused: Path, tmp_path: Path
) -> None:
    changes = ("objective.lambda_schedule=authors", "objective.divergence=kl", "training.keep=best")
    plain, other = pipeline(world, fused), pipeline(world, fused, *changes)
    identities = {
        part.name: part.identity() for part in plain.stages if part.command in ("fuse", "train")
    }
    for part in other.stages:
        if part.command == "fuse":
            assert part.identity() == identities["fuse"]
        if part.name == "train/fused":
            (differences,) = [part.identity().differences(identities["train/fused"])]
            assert [text.split()[0] for text in differences] == [
                "objective.divergence",
                "objective.lambda_schedule",
                "training.keep",
                "training.validations",
            ]
    # How often there are validations counts only where they decide what is kept.
    assert "validations" not in identities["train/fused"].settings["training"]


# What Trainer's users know


@pytest.mark.parametrize(
    "changes",
    [
        ("training.bf16=true",),
        ("training.gradient_checkpointing=true",),
        ("training.gradient_accumulation_steps=3", "training.num_train_epochs=2"),
        ("training.torch_compile=true", "training.torch_compile_backend=aot_eager"),
        ("training.rows=packed", "training.row_tokens=200", "objective.lambda_schedule=authors"),
        ("training.lora={r: 4}",),
        ("training.lora={r: 4}", "training.bf16=true", "training.gradient_checkpointing=true"),
        ("training.lora={r: 4, target_modules: [lm_head]}", "training.bf16=true"),
        ("training.lora={r: 4}", "target.dtype=bfloat16"),
        ("training.lora={modules_to_save: [embed_tokens]}", "target.dtype=bfloat16"),
        (
            "training.lora={r: 4}",
            "training.torch_compile=true",
            "training.torch_compile_backend=aot_eager",
        ),
    ],
    ids=" ".join,
)
def test_it_trains_with(trained: Train, changes: Sequence[str]) -> None:
    found = validations_of(trained(*FAST, *changes))
    assert found[-1] < 0.98 * found[0]


def test_gradients_that_are_accumulated_are_those_of_one_batch(trained: Train) -> None:
    """Each micro-batch is divided by the predicted tokens of the whole, not by its own."""
    one = trained(*FAST, "training.per_device_train_batch_size=8")
    two = trained(
        *FAST, "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"
    )
    mine, theirs = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4)
    for a, b in zip(losses_of(one), losses_of(two), strict=True):
        for key in ("loss", "clm_loss", "fusion_loss", "kept_mass", "tokens", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_rows_have_the_loss_of_one_block_a_row(
    world: Path, fused: Path, packed: bool
) -> None:
    """With fused distributions, and with a row of its own for each block either way."""
    rows = fused_rows(fused, StageFolder(fused / "corpus"))
    blocks = [rows[n][0] for n in range(6)]
    table = outcome_table(StageFolder(fused / "fuse"), ["first", "second"], False)
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    batches = [
        Collator(table, packed=False)([[block] for block in blocks]),
        Collator(table, packed=True)([blocks[:4], blocks[4:]] if packed else [[b] for b in blocks]),
    ]
    found = []
    for batch in batches:
        model.zero_grad()
        teach_objective(model)
        loss = model(**objective_inputs(batch, 0.3))["loss"]
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert batches[0]["counts"] == batches[1]["counts"]


class Recorder(TrainerCallback):
    """Stands for what `report_to` names."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.usefixtures("unrehearsed")
def test_the_parts_of_the_loss_go_to_whatever_report_to_names(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks", lambda _: [Recorder]
    )
    folder = trained()
    lines = [logs for logs in Recorder.seen if "loss" in logs]
    names = {
        *("clm_loss", "fusion_loss", "lambda", "kept_mass", "fused_share"),
        *("tokens_per_second", "tokens"),
    }
    assert lines
    assert all(names < set(logs) for logs in lines)
    assert not any(value is None for logs in lines for value in logs.values())
    assert any("eval_mean" in logs for logs in Recorder.seen)
    own = losses_of(folder)
    assert [entry["step"] for entry in own][-1] == own[0]["steps"]  # the last step is logged
    total = sum(len(block["ids"]) for block in _all_blocks(folder.parents[1]))
    assert own[-1]["tokens"] == total


def _all_blocks(run: Path) -> list[Any]:
    rows = fused_rows(run, StageFolder(run / "corpus"))
    return [block for n in range(len(rows)) for block in rows[n]]


def test_the_baseline_logs_no_fusion(trained: Train) -> None:
    for entry in losses_of(trained("training.logging_steps=1", which="train/clm")):
        assert entry["lambda"] == 1
        assert entry["fused_share"] == 0
        assert "fusion_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["clm_loss"], rel=1e-4)


# Resuming


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.mark.parametrize(
    "changes",
    [
        ("objective.lambda_schedule=cosine", "objective.lambda_end=1"),
        ("training.lora={r: 4, dropout: 0.1, target_modules: [q_proj, lm_head]}",),
        ("training.lora={r: 4, modules_to_save: [lm_head], merge: false}",),
        ("training.keep=best", "training.validations=8", "training.learning_rate=3e-2"),
        (
            *("training.keep=best", "training.validations=8", "training.learning_rate=0.1"),
            *("training.early_stop_validations=2", "training.lr_scheduler_type=constant"),
        ),
    ],
    ids=" ".join,
)
def test_killed_and_resumed_it_ends_with_the_same_weights(
    world: Path,
    fused: Path,
    trained: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Sequence[str],
) -> None:
    changes = (*changes, "training.logging_steps=1")
    whole = trained(*changes)
    run = tmp_path / "killed"
    shutil.copytree(fused, run)
    original, steps = Trainer.training_step, [0]

    def dying(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 11:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", dying)
        with pytest.raises(Killed):
            pipeline(world, run, *changes).execute(["train/fused"])
    moved = run.with_name("moved")  # a checkpoint's path is not what it is known by
    run.rename(moved)
    assert list(moved.glob("train/fused-checkpoints/checkpoint-*"))
    pipeline(world, moved, *changes).execute(["train/fused"])
    assert weights_of(moved / "train" / "fused") == weights_of(whole)
    mine, theirs = losses_of(moved / "train" / "fused"), losses_of(whole)
    for name in ("lambda", "loss", "step", "tokens"):
        assert [entry[name] for entry in mine] == [entry[name] for entry in theirs]
    assert not (moved / "train" / "fused-checkpoints").exists()


# A store that is larger than memory


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stores are read by windows of two record batches; gives those that are read, in turn."""
    read: list[tuple[str, int]] = []
    own = Shard._read

    def counted(self: Shard, n: int) -> Any:
        read.append((self._name, n))
        return own(self, n)

    monkeypatch.setattr(Shard, "_read", counted)
    monkeypatch.setattr(training_rows, "_CACHED_WHOLE_BYTES", 0)
    monkeypatch.setattr(training_rows, "_WINDOW_BATCHES", 2)
    return read


@pytest.mark.parametrize("packed", [True, False])
def test_a_large_store_is_read_once_an_epoch(
    fused: Path, windowed: list[tuple[str, int]], packed: bool
) -> None:
    corpus = StageFolder(fused / "corpus")
    rows = fused_rows(fused, corpus, seed=3)
    batches = sum(shard.record_batches for shard in rows._blocks._shards)
    assert batches > 4
    if packed:
        rows.pack(128)
    orders = [RowOrder(rows.windows(), 3, 8)]
    orders += [] if packed else [RowsOfLikeLength(rows.row_tokens(), rows.windows(), 8, 3)]
    for sampler in orders:
        seen = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            windowed.clear()
            order = list(sampler)
            blocks = [block["block"] for row in order for block in rows[row]]
            assert sorted(blocks) == list(range(len(rows.lengths)))
            kept = [n for shard in rows._blocks._shards for n in shard._cache]
            assert len(kept) <= 4
            # A row of leftovers, and one that ends in a later window, read a batch again.
            assert batches - 4 <= len(windowed) <= batches + len(kept) + (10 if packed else 8)
            seen.append(blocks)
        assert seen[0] != seen[1]
        nearby = np.mean(np.abs(np.diff(seen[0])) == 1)
        assert nearby < 0.1  # shuffled


@pytest.mark.usefixtures("windowed")
@pytest.mark.parametrize("rows", ["block", "packed"])
def test_a_large_store_trains_as_well(trained: Train, rows: str) -> None:
    folder = trained(*FAST, f"training.rows={rows}", "training.row_tokens=256")
    values = validations_of(folder)
    assert values[-1] < values[0] - 0.2


def test_rows_that_workers_read_ahead_train_the_same(trained: Train) -> None:
    ahead = trained("training.dataloader_num_workers=1")
    assert weights_of(ahead) == weights_of(trained())


# Which model is kept


def test_the_best_validation_is_kept_and_training_stops_early(world: Path, trained: Train) -> None:
    changes = (
        *("training.learning_rate=0.1", "training.lr_scheduler_type=constant"),
        *("training.validations=8", "training.early_stop_validations=2"),
    )
    best, last = trained(*changes, "training.keep=best"), trained(*changes)
    found = validations_of(best)
    assert found == validations_of(last)
    assert min(found) not in found[-2:]
    assert len(found) == found.index(min(found)) + 3  # two in a row that are no better
    counts = StageFolder(best).counts
    assert counts["kept_step"] < counts["steps"] < losses_of(best)[0]["steps"]
    assert losses_of(best)[-1]["step"] == counts["steps"]
    assert measured(world, best) == pytest.approx(min(found), rel=1e-6)
    assert measured(world, last) == pytest.approx(found[-1], rel=1e-6)


def test_the_best_of_adapters_is_kept(world: Path, trained: Train) -> None:
    changes = (
        *("training.learning_rate=0.3", "training.lr_scheduler_type=constant"),
        *("training.validations=8", "training.keep=best", "training.lora={r: 4}"),
    )
    folder = trained(*changes)
    found = validations_of(folder)
    assert found.index(min(found)) < len(found) - 1
    assert measured(world, folder) == pytest.approx(min(found), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("training.load_best_model_at_end=true", "training.keep: best keeps the model of"),
        ("training.metric_for_best_model=loss", "training.keep: best keeps the model of"),
        ("training.logging_nan_inf_filter=true", "a loss that is no number stops the training"),
        ("training.push_to_hub=true", "give --push-to-hub to fusellm train"),
    ],
)
def test_what_the_run_decides_cannot_be_set(
    world: Path, fused: Path, change: str, part: str
) -> None:
    with pytest.raises(RecipeError, match=part):
        pipeline(world, fused, change)


def test_the_best_needs_checkpoints(world: Path, fused: Path) -> None:
    with pytest.raises(RecipeError, match=r"save_strategy: no saves none"):
        pipeline(world, fused, "training.keep=best", "training.save_strategy=no")


# What is saved


def test_a_saved_model_is_whole_and_has_no_pickle(world: Path, trained: Train) -> None:
    folder = trained()
    names = {path.name for path in folder.rglob("*")}
    assert {
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("generation_config.json", "config.json", "README.md"),
    } <= names
    assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache
    assert "with λ = 0.5 (" in (folder / "README.md").read_text()


TIED = "llama"
HEADS = [
    (TIED, "{r: 4, target_modules: [q_proj, lm_head]}"),
    (TIED, "{r: 4, target_modules: [q_proj, embed_tokens]}"),
    (TIED, "{r: 4, target_modules: [q_proj], modules_to_save: [lm_head]}"),
    (TIED, "{r: 4, target_modules: [q_proj], modules_to_save: [embed_tokens]}"),
    (TIED, "{r: 4, target_modules: all-linear}"),
]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("name", "lora"), HEADS)
def test_saved_with_adapters_it_is_what_was_trained(
    world: Path, trained: Train, name: str, lora: str, merge: bool
) -> None:
    """Tied heads too: where one end has an adapter, the merged model has two weights."""
    lora = lora.replace("}", f", merge: {str(merge).lower()}}}")
    folder = trained(*FAST, f"training.lora={lora}")
    found = validations_of(folder)
    assert found[-1] < 0.98 * found[0]
    assert measured(world, folder) == pytest.approx(found[-1], rel=1e-5)
    names = {path.name for path in folder.iterdir()}
    assert ("model.safetensors" in names) == merge
    assert ("adapter_model.safetensors" in names) != merge
    assert {"README.md", "tokenizer.json"} <= names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)  # transformers reads adapters too
    ids = tokenizer("the model", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3


def test_a_run_with_an_adapter_folder_goes_to_its_end(
    world: Path, fused: Path, tmp_path: Path
) -> None:
    values = []
    for merge in ("true", "false"):
        run = tmp_path / merge
        shutil.copytree(fused, run)
        lora = f"training.lora={{r: 4, target_modules: [q_proj, lm_head], merge: {merge}}}"
        pipeline(world, run, *FAST, lora, "training.clm_baseline=false").execute()
        found = json.loads((run / "report" / "results.json").read_text())
        values.append({(r["model"], r["task"]): r["value"] for r in found})
    assert values[0]["fused", "mean"] < values[0]["target", "mean"]
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=1e-5)
    with pytest.raises(ModelError, match="leave quantization and device_map out"):
        locate(ModelSettings(model=str(run / "train" / "fused"), device_map="auto"))


# Adapters


def dense_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the architecture's own forward, through all its logits."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=ids).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", LoraSettings(r=4, target_modules=["lm_head", "q_proj"])),
        ("llama", LoraSettings(r=4, target_modules=["lm_head"], dropout=0.5)),
        ("llama", LoraSettings(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("neox", LoraSettings(r=4, target_modules=["embed_out", "query_key_value"])),
        ("neox", LoraSettings(r=4, target_modules=["dense"], modules_to_save=["embed_out"])),
        ("mpt", LoraSettings(r=4)),
    ],
)
def test_the_objective_with_adapters_has_the_gradients_of_full_logits(
    world: Path, name: str, lora: LoraSettings
) -> None:
    torch.manual_seed(0)
    loaded = load_model(locate(ModelSettings(model=str(world / name))), CPU)
    model = with_adapters(loaded, lora, None)
    for part, weight in model.named_parameters():
        if "lora_B" in part:  # zero when new
            torch.nn.init.normal_(weight, std=0.1)
    model.train()
    ids = torch.randint(3, 300, (2, 9))
    expected = dense_gradients(model, ids)
    assert expected
    assert all("lora" in key or "modules_to_save" in key for key in expected)
    model.zero_grad()
    torch.manual_seed(3)
    teach_objective(without_adapters(model))
    batch = {"input_ids": ids, "labels": ids}
    found = model(**objective_inputs(batch, 1.0))
    assert set(found) == {"loss", "clm", "fusion"}  # the objective's, not the model's own
    found["loss"].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    check_head(without_adapters(model.eval()))


def test_adapters_that_do_not_fit_are_refused(world: Path, trained: Train) -> None:
    with pytest.raises(ModelError, match=r"does not fit LlamaForCausalLM: .*named down_proj, "):
        trained("training.lora={target_modules: [nothing]}")


def test_a_missing_peft_is_named_before_any_work(
    world: Path, fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'fusellm\[lora\]'"):
        pipeline(world, fused, "training.lora={}")


# NaN


def blocks_of_step(run: Path, step: int) -> list[int]:
    """Numbers of the blocks that a training of this run reads at a step, from 1."""
    rows = fused_rows(run, StageFolder(run / "corpus"))
    order = list(RowsOfLikeLength(rows.row_tokens(), rows.windows(), 8, 0))
    return [int(rows[n][0]["block"]) for n in order[8 * (step - 1) : 8 * step]]


def checkpoints_are_finite(run: Path) -> bool:
    found = list(run.glob("train/fused-checkpoints/*/model.safetensors"))
    weights = [weight for path in found for weight in load_file(path).values()]
    return bool(weights) and all(bool(weight.isfinite().all()) for weight in weights)


@pytest.mark.usefixtures("unrehearsed")
def test_a_loss_that_is_no_number_stops_with_the_batch_named(
    world: Path, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fused, run)
    original, steps = Trainer.compute_loss, [0]
    compute = trainers.ObjectiveTrainer.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if steps[0] == 8 else loss

    assert original is not compute
    with monkeypatch.context() as patch:
        patch.setattr(trainers.ObjectiveTrainer, "compute_loss", broken)
        with pytest.raises(NumericsError) as caught:
            pipeline(world, run, "training.save_steps=2").execute(["train/fused"])
    message = str(caught.value)
    assert message.startswith("the loss of step 8 is nan, at the blocks ")
    for number in blocks_of_step(run, 8):
        assert f" {number} (" in message
    assert ".jsonl:" in message or ".py:" in message
    assert (
        f"the last good checkpoint is kept: {run}/train/fused-checkpoints/checkpoint-6" in message
    )
    assert checkpoints_are_finite(run)
    pipeline(world, run, "training.save_steps=2").execute(["train/fused"])  # and goes on from there
    assert StageFolder(run / "train" / "fused").complete


@pytest.mark.usefixtures("unrehearsed")
@pytest.mark.parametrize("save_steps", [1, 5])
def test_a_gradient_that_is_no_number_stops_before_its_weights_are_saved(
    world: Path, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fused, run)
    original, steps = Trainer._clip_grad_norm, [0]

    def broken(self: Any, model: torch.nn.Module) -> Any:
        steps[0] += 1
        if steps[0] == 7:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return original(self, model)

    monkeypatch.setattr(Trainer, "_clip_grad_norm", broken)
    with pytest.raises(NumericsError) as caught:
        pipeline(world, run, f"training.save_steps={save_steps}").execute(["train/fused"])
    message = str(caught.value)
    assert message.startswith("the gradient of step 7 has the norm nan, at the blocks ")
    for number in blocks_of_step(run, 7):
        assert f" {number} (" in message
    assert checkpoints_are_finite(run)


def test_a_learning_rate_that_is_far_too_high_stops(trained: Train) -> None:
    with pytest.raises(NumericsError, match=r"Lower training\.learning_rate"):
        trained("training.learning_rate=1e9", "training.max_grad_norm=0")


# The hub


class Hub:
    """Stands for the hub's API."""

    done: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    refuses: Exception | None = None

    def whoami(self) -> dict[str, str]:
        if self.refuses is not None:
            raise self.refuses
        return {"name": "someone"}

    def create_repo(self, repo: str, **how: Any) -> str:
        self.done.append(("create", {"repo": repo, **how}))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **how: Any) -> None:
        self.done.append(("upload", how))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "done", [])
    return Hub


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fusellm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_fused_model_is_pushed_private_and_without_what_is_the_runs(
    world: Path,
    fused: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offered: type[Hub],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fused, run)
    push = ("--push-to-hub", "someone/fused-model")
    assert run_command(monkeypatch, "train", str(run), *push) == 0
    assert "https://huggingface.co/someone/fused-model" in capsys.readouterr().err
    (created, how), (uploaded, what) = offered.done
    assert (created, uploaded) == ("create", "upload")
    assert how == {"repo": "someone/fused-model", "private": True, "exist_ok": True}
    assert what["folder_path"] == run / "train" / "fused"
    assert "manifest.json" in what["ignore_patterns"]
    card = (run / "train" / "fused" / "README.md").read_text()
    assert "- prose.jsonl" in card
    assert str(world) not in card  # nothing of this machine


@pytest.mark.parametrize(
    ("repo", "refuses", "part"),
    [
        ("someone/model", OSError("offline mode is enabled"), "log in with `hf auth login`"),
        ("model", None, "name the owner too, as in owner/model"),
        ("a/b/c", None, "--push-to-hub a/b/c: "),
    ],
)
def test_a_hub_that_does_not_let_in_is_named_before_any_work(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    offered: type[Hub],
    repo: str,
    refuses: Exception | None,
    part: str,
) -> None:
    monkeypatch.setattr(Hub, "refuses", refuses)
    recipe, out = str(world / "recipe.yaml"), tmp_path / "run"
    push = ("--push-to-hub", repo)
    assert run_command(monkeypatch, "run", recipe, "--out", str(out), *push) == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_offline_the_hubs_own_words_are_told() -> None:
    with pytest.raises(FusellmError, match="--push-to-hub someone/model: the hub does not let you"):
        hub.require_access("someone/model")


def test_another_rank_of_adapters_redoes_training(world: Path, fused: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fused, run)
    pipeline(world, run, "training.lora={r: 4}").execute(["train/fused"])
    with pytest.raises(IdentityError, match=r"training\.lora\.r was 4 and is now 8"):
        pipeline(world, run, "training.lora={r: 8}").execute(["train/fused"])
