"""Two processes train what one does with the same global batch: DDP and FSDP2, on gloo."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file

from fusellm.cli import launch
from fusellm.cli.main import main
from fusellm.errors import IdentityError, RecipeError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.reading import batches
from fusellm.reading.batches import read_blocks
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.manifest import StageFolder
from fusellm.store.writer import StageWriter
from fusellm.training.launch import require_devices
from fusellm.training.processes import require_joined
from fusellm.training.rows import FILLER, RowOrder, RowsOfLikeLength

HERE = Path(__file__).resolve().parent
# Of plain gradient descent the weights are as far apart as the gradients are; AdamW makes a step of
# the rate's size out of a gradient that is rounding.
BASE = (
    *("training.optim=sgd", "training.learning_rate=0.3", "training.lr_scheduler_type=constant"),
    *("training.logging_steps=1", "training.max_steps=8", "training.validations=1"),
)
UNTIED = "target.model=neox"
RESUMES = Version(transformers.__version__) >= Version("5.23")
"""5.17 loads no optimizer's state on a CPU where there are several processes."""


@dataclass(frozen=True)
class Case:
    """A training: by how many rows, and how."""

    changes: tuple[str, ...] = ()
    fsdp: bool = False
    rows: int = 8
    tolerance: float = 1e-5
    dies_at: int | None = None


LORA_TIED = "training.lora={r: 4, target_modules: [q_proj, lm_head]}"
LORA_UNTIED = "training.lora={r: 4, target_modules: [query_key_value, embed_out]}"
COPIED = "training.lora={r: 4, target_modules: [q_proj], modules_to_save: [lm_head]}"
PACKED = ("training.rows=packed", "training.row_tokens=128", "training.max_steps=3")
TWICE = "training.gradient_accumulation_steps=2"
RESUMED = (
    *("training.save_steps=2", "training.optim=adamw_torch", "training.learning_rate=1e-3"),
    *("training.max_steps=-1", "training.num_train_epochs=2"),
)
CASES = {
    # 180 rows in steps of 34: the last step of an epoch has 10, of which one process reads none.
    "ddp-tied-whole-epoch": Case(("training.max_steps=-1",), rows=34),
    "fsdp-tied-whole-epoch": Case(("training.max_steps=-1",), True, rows=34),
    "ddp-tied": Case(),
    "ddp-untied": Case((UNTIED,)),
    "fsdp-untied": Case((UNTIED,), True),
    "ddp-tied-lora-on-the-head": Case((LORA_TIED,)),
    "fsdp-tied-lora-on-the-head": Case((LORA_TIED,), True),
    "ddp-untied-lora-on-the-head": Case((UNTIED, LORA_UNTIED)),
    "fsdp-untied-lora-on-the-head": Case((UNTIED, LORA_UNTIED), True),
    "fsdp-a-copy-of-the-tied-head": Case((COPIED,), True, tolerance=1e-4),
    "ddp-packed-and-accumulated": Case((*PACKED, TWICE)),
    "fsdp-packed-and-accumulated": Case((*PACKED, TWICE), True),
    "fsdp-best": Case(("training.keep=best", "training.validations=4"), True),
    "ddp-bf16": Case(("training.bf16=true",), tolerance=1e-2),
    "fsdp-bf16": Case(("training.bf16=true",), True, tolerance=1e-2),
    # Six steps an epoch: they go on in the second, after two of its steps.
    "ddp-resumed": Case(RESUMED, rows=34, dies_at=10),
    "fsdp-resumed": Case(RESUMED, True, rows=34, dies_at=10),
}


def pipeline(world: Path, run: Path, *changes: str) -> Pipeline:
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", changes), world)
    return Pipeline(recipe, run, Silent())


def folder_of(place: Path, name: str, processes: int) -> Path:
    return place / f"{name}-{processes}" / "train" / "fused"


@pytest.fixture(scope="module")
def several(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with each case's run, trained by one process and by two."""
    place = tmp_path_factory.mktemp("several")
    for name, changes in (("tied", ()), ("untied", (UNTIED,))):
        pipeline(world, place / name, *changes).execute(["corpus", "externalize", "fuse"])
    launched = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if case.dies_at and not RESUMES:
            continue
        for processes in (1, 2):
            run = folder_of(place, name, processes).parents[1]
            shutil.copytree(place / ("untied" if UNTIED in case.changes else "tied"), run)
            rows = f"training.per_device_train_batch_size={case.rows // processes}"
            changes = [*BASE, *case.changes, rows]
            if processes == 1:
                pipeline(world, run, *changes).execute(["train/fused"])
                continue
            told: dict[str, Any] = {"recipe": str(world / "recipe.yaml"), "run": str(run)}
            told |= {"changes": changes, "fsdp": case.fsdp}
            if case.fsdp:
                changes.append("training.fsdp=true")
            launched += [told | {"dies_at": at} for at in {case.dies_at, None}]
    torch.set_num_threads(threads)
    launched.sort(key=lambda one: one["dies_at"] is None)  # the killed before the resumed
    (place / "cases.json").write_text(json.dumps(launched), encoding="utf-8")
    shutil.copytree(place / "tied", place / "faulty")
    torchrun(HERE / "several.py", str(place / "cases.json"), str(place / "faulty"))
    return place


def torchrun(script: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    told = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank0]"))
    assert done.returncode == 0, told or done.stderr[-3000:]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if RESUMES or not case.dies_at])
def test_two_processes_train_what_one_does(several: Path, name: str) -> None:
    one, two = (folder_of(several, name, processes) for processes in (1, 2))
    tolerance = CASES[name].tolerance
    expected, found = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, two))
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(log_of(two), log_of(one), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "clm_loss", "fusion_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(theirs[key], rel=max(tolerance, 1e-4)), key
        for key in mine.keys() & {"lambda", "fused_share", "tokens", "step", "learning_rate"}:
            assert mine[key] == theirs[key]
        if "validation" in mine:
            assert mine["validation"] == pytest.approx(theirs["validation"], rel=tolerance)
    assert StageFolder(one).counts == StageFolder(two).counts


def test_the_command_trains_on_several_processes(
    world: Path, several: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `--nproc` starts are real commands; the model is known as finished by one process."""
    run = tmp_path / "run"
    shutil.copytree(several / "tied", run)
    settings = (*BASE, "training.per_device_train_batch_size=4", "training.clm_baseline=false")
    changes = [f"--set={change}" for change in settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fusellm", "train", str(run), "--nproc", "2", *changes])
        patch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 0
    told = capfd.readouterr().err
    assert told.count("training fused: 8 steps") == 1
    twice = load_file(next(folder_of(several, "ddp-tied", 1).glob("*.safetensors")))
    found = load_file(next((run / "train" / "fused").glob("*.safetensors")))
    for key, weight in twice.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)
    as_one = pipeline(world, run, *settings)
    as_one.execute(["train", "evaluate"])
    assert StageFolder(run / "evaluate").complete


def test_a_training_goes_on_with_as_many_processes(world: Path, several: Path) -> None:
    run = several / "begun"
    shutil.copytree(several / "tied", run)
    one = pipeline(world, run, *BASE)
    two = Pipeline(one.recipe, run, Silent(), training_processes=2)
    part = next(part for part in two.stages if part.name == "train/fused")
    with StageWriter.open(run / "train" / "fused", part.identity()):
        pass
    with pytest.raises(IdentityError, match=r"was begun by 2 process\(es\).* --nproc 2`, or add"):
        pipeline(world, run, *BASE).execute(["train"])
    pipeline(world, run, *BASE).execute(["train/fused"], redo=True)


@pytest.mark.parametrize(
    ("environment", "arguments", "part"),
    [
        ("2", ["run"], "2 processes were started, and `fusellm run` is the work of one"),
        ("2", ["fuse"], "`fusellm fuse` is the work of one"),
        ("2", ["train", "--nproc", "2"], "a launcher has started 2 already"),
    ],
)
def test_processes_that_have_nothing_to_do_are_refused(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: str,
    arguments: list[str],
    part: str,
) -> None:
    command, *options = arguments
    monkeypatch.setenv("WORLD_SIZE", environment)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["fusellm", command, str(world / "recipe.yaml"), *options])
    with pytest.raises(SystemExit):
        main()
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "count", "part"),
    [
        (["training.fsdp=true"], 1, "there is one: give --nproc N"),
        (["training.fsdp=true", "training.fsdp_config={version: 1}"], 2, "by FSDP2 only"),
        (["training.average_tokens_across_devices=false"], 2, "has no meaning with several"),
        (["training.save_on_each_node=true"], 2, "all processes share the run's folder"),
        (["training.train_sampling_strategy=batch_rebalance"], 1, "is not one of random, seq"),
    ],
)
def test_settings_that_several_processes_cannot_have_are_refused(
    world: Path, several: Path, changes: list[str], count: int, part: str
) -> None:
    """Before any work; a run that is not to be trained may have them."""

    def trained() -> None:
        one = pipeline(world, several / "tied", *changes)
        Pipeline(one.recipe, one.run, Silent(), training_processes=count).execute(["train"])

    with pytest.raises(RecipeError) as caught:
        trained()
    assert part in str(caught.value)


def test_a_fault_that_one_process_meets_ends_all(several: Path) -> None:
    """A loss that is no number is told once, by all, where it is known to one alone."""
    assert "loss of step 3 is nan, at the blocks" in (several / "fault").read_text()


def test_processes_that_have_not_found_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_joined()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="WORLD_SIZE says 2 processes, and this one is alone"):
        require_joined()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    require_devices(2)
    with pytest.raises(RecipeError, match=r"--nproc 3: this machine has 2 GPU\(s\)"):
        require_devices(3)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_is_told_by_whom_it_is_known_to(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.0)
    launch.tell("no")
    expected = {"0": "fusellm: no\n", "1": "fusellm (process 1): no\n"}
    assert capsys.readouterr().err == expected[rank]


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 5),
    processes=st.integers(1, 4),
    seed=st.integers(0, 9),
    alike=st.booleans(),
)
def test_every_row_is_read_once_whatever_the_number_of_processes(
    rows: int, batch: int, processes: int, seed: int, alike: bool
) -> None:
    """Steps have the same rows in the same order as one process with the global batch has."""
    lengths = [3 + n % 7 for n in range(rows)]
    windows = np.arange(rows) // 20
    step = batch * processes

    def order(processes: int) -> list[int]:
        if alike:
            return list(RowsOfLikeLength(lengths, windows, step, seed, step, processes))
        return list(RowOrder(windows, seed, step, processes))

    found = order(processes)
    assert sorted(n for n in found if n != FILLER) == list(range(rows))
    assert found[: len(order(1))] == order(1)
    assert len(found) % step == 0 or processes == 1
    assert len(found) - rows < step


@given(blocks=st.integers(0, 9), processes=st.integers(1, 4))
def test_processes_divide_the_batches_of_a_validation(blocks: int, processes: int) -> None:
    """Each reads as many, as FSDP needs, and all are read."""
    ids = [np.arange(2 + n) for n in range(blocks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_hidden", lambda *_: (None, None))
        model: Any = torch.nn.Module()
        shares = [
            [batch for batch, _ in read_blocks(model, ids, 1, lambda *_: 0, share=(n, processes))]
            for n in range(processes)
        ]
    assert len({len(share) for share in shares}) == 1
    assert sorted({n for share in shares for batch in share for n in batch}) == list(range(blocks))
    assert len(shares[0]) == -(-blocks // processes)
