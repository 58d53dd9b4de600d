"""The examples run, offline, and do what they say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusellm
from fusellm.recipe_file import resolve_paths
from fusellm.training.arguments import training_arguments

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ("align_two_tokenizers", "fuse_in_memory", "own_fusion_function", "own_trainer")


def test_all_examples_are_tested() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == set(SCRIPTS)
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["tour.ipynb"]
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 60, path


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own, without the hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        "align_two_tokenizers": "' import' becomes [' import', ' imported']",
        "fuse_in_memory": "positions have a distribution; python",
        "own_fusion_function": "softmax_of_both:  {'python': ",
        "own_trainer": "BitsPerByte(value=",
    }[name]
    assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is left lying about
    if name == "fuse_in_memory":
        losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "step" in line]
        assert losses == sorted(losses, reverse=True)
        assert len(losses) == 3


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    """Cell by cell; it is stored without outputs."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    assert names["after"].value < names["before"].value


def module(name: str) -> ModuleType:
    """An example as a module, of which nothing is run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_own_trainer_does_what_the_command_does(world: Path, tmp_path: Path) -> None:
    """On the rows of a run, by the same settings: the same losses and weights, to the last bit."""
    settings = ["training.logging_steps=1", "training.validations=0"]
    recipe = fusellm.load_recipe(world / "recipe.yaml", settings)
    run = fusellm.Run(resolve_paths(recipe, world), tmp_path / "run")
    run.corpus().externalize().fuse().train("fused")
    lines = (tmp_path / "run/train/fused/log.jsonl").read_text("utf-8").splitlines()
    expected = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    arguments = training_arguments(run.recipe, tmp_path / "own", "fused")
    named = (
        *("per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "max_grad_norm"),
        *("num_train_epochs", "seed", "train_sampling_strategy", "logging_steps", "use_cpu"),
    )
    given = {name: getattr(arguments, name) for name in named}
    torch.manual_seed(arguments.seed)
    trainer = module("own_trainer").main(run, str(tmp_path / "own"), **given)
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == expected
    model, _ = run.model("fused", device="cpu")
    for mine, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
