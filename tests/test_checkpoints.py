"""Checkpoints that were damaged after they were saved, and disks that are full when one is."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import Trainer

from fusellm.errors import StoreError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.store.files import saving_explained
from fusellm.training.checkpoints import (
    damaged_file,
    last_checkpoint,
    require_intact,
    seal,
)
from fusellm.training.run_trainer import ObjectiveTrainer
from stores import flip


class Telling(Silent):
    """Keeps what it is told to say."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def checkpoints_of(run: Path, *steps: int) -> Path:
    """Whole checkpoints of these steps."""
    folder = run / "train" / "fused-checkpoints"
    for step in steps:
        place = folder / f"checkpoint-{step}"
        (place / "shards").mkdir(parents=True)
        (place / "model.safetensors").write_bytes(bytes([step]) * 900)
        (place / "shards" / "0.distcp").write_bytes(bytes([step]) * 300)
        seal(place)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.distcp", "saved-whole"])
def test_each_changed_byte_of_a_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    place = checkpoints_of(tmp_path, 3) / "checkpoint-3"
    assert damaged_file(place) is None
    require_intact(place)
    data = (place / name).read_bytes()
    for offset in range(0, len(data), 31):
        flip(place / name, offset)
        assert damaged_file(place) is not None, offset
        (place / name).write_bytes(data)
    (place / name).write_bytes(data[:-2])  # the last of JSON is a line end
    assert damaged_file(place) is not None
    if name != "saved-whole":
        (place / name).unlink()
        assert damaged_file(place) == place / name
        with pytest.raises(StoreError, match=f"{name} was damaged .*; remove {place}, and"):
            require_intact(place)


def test_of_several_checkpoints_the_last_that_is_whole_is_taken(tmp_path: Path) -> None:
    folder = checkpoints_of(tmp_path, 3, 6, 9)
    (folder / "checkpoint-12").mkdir()  # a kill left it
    told = Telling()
    assert last_checkpoint(folder, told) == str(folder / "checkpoint-9")
    assert told.said == []
    assert not (folder / "checkpoint-12").exists()
    for name in ("checkpoint-9/model.safetensors", "checkpoint-6/shards/0.distcp"):
        flip(folder / name, 7)
    assert last_checkpoint(folder, told) == str(folder / "checkpoint-3")
    first, second = sorted(told.said)
    assert f"{folder / 'checkpoint-6/shards/0.distcp'} was damaged after it was saved" in first
    assert (
        f"kept as {folder / 'damaged-checkpoint-9'}, and training goes on from {folder}" in second
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-3", "damaged-checkpoint-6", "damaged-checkpoint-9",
    ]  # fmt: skip
    flip(folder / "checkpoint-3" / "model.safetensors", 7)
    assert last_checkpoint(folder, told) is None
    assert "training begins anew" in told.said[-1]


def test_a_checkpoint_from_before_there_were_checksums_is_taken(tmp_path: Path) -> None:
    folder = checkpoints_of(tmp_path, 3)
    (folder / "checkpoint-3" / "saved-whole").write_text("")
    assert last_checkpoint(folder, Silent()) == str(folder / "checkpoint-3")


def test_a_library_that_does_not_say_why_it_could_not_save(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of another kind"), saving_explained(tmp_path):
        raise RuntimeError("of another kind")
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """Stands for a kill."""


def _killed_at(step: int, patch: pytest.MonkeyPatch) -> None:
    original, steps = Trainer.training_step, [0]

    def dying(self: Trainer, *args: object, **kwargs: object) -> object:
        steps[0] += 1
        if steps[0] == step:
            raise Killed
        return original(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", dying)


@pytest.mark.parametrize("damaged", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    told = Telling()
    recipe = load_recipe(world / "recipe.yaml", ["training.save_total_limit=2"])
    recipe = resolve_paths(recipe, world)
    whole = tmp_path / "whole"
    Pipeline(recipe, whole, Silent()).execute(["corpus", "externalize", "fuse"])
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    Pipeline(recipe, whole, Silent()).execute(["train/fused"])
    with monkeypatch.context() as patch:
        _killed_at(9, patch)
        with pytest.raises(Killed):
            Pipeline(recipe, run, Silent()).execute(["train/fused"])
    folder = run / "train" / "fused-checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    file = folder / "checkpoint-6" / damaged
    flip(file, file.stat().st_size // 2)
    Pipeline(recipe, run, told).execute(["train/fused"])
    (said,) = told.said
    assert said.startswith(f"{file} was damaged")
    assert said.endswith(f"training goes on from {folder / 'checkpoint-3'}")
    mine, theirs = (place / "train" / "fused" / "model.safetensors" for place in (run, whole))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_damaged_best_checkpoint_is_not_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["training.keep=best", "training.validations=4"]
    recipe = resolve_paths(load_recipe(world / "recipe.yaml", changes), world)
    run = tmp_path / "run"
    Pipeline(recipe, run, Silent()).execute(["corpus", "externalize", "fuse"])
    own = ObjectiveTrainer._load_best_model

    def damaged(self: ObjectiveTrainer) -> None:
        file = Path(str(self.state.best_model_checkpoint)) / "model.safetensors"
        flip(file, file.stat().st_size // 2)
        own(self)

    monkeypatch.setattr(ObjectiveTrainer, "_load_best_model", damaged)
    with pytest.raises(StoreError, match=r"model.safetensors was damaged after it was saved"):
        Pipeline(recipe, run, Silent()).execute(["train/fused"])
    manifest = json.loads((run / "train" / "fused" / "manifest.json").read_text())
    assert not manifest["complete"]
