"""What `check` passes of a recipe's training trains: each setting of transformers is tried."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from fusellm.config import Recipe
from fusellm.errors import NumericsError, RecipeError
from fusellm.pipeline import Pipeline
from fusellm.progress import Silent
from fusellm.recipe_file import load_recipe, resolve_paths
from fusellm.stages import train
from fusellm.training.values import checked

SETTINGS = [field.name for field in fields(TrainingArguments)]
VALUES: tuple[Any, ...] = (
    None, True, -3, 0, 2, 2**70, -0.5, 1.5, math.nan, math.inf, "", "x", "no", "1e-4", [], ["x"],
    {}, {"x": 1},
)  # fmt: skip
OVERRIDES = {"max_steps": 2, "save_steps": 2}
TRIED = dict.fromkeys(SETTINGS, VALUES) | {
    "report_to": (*VALUES, *INTEGRATION_TO_CALLBACK, "all", "none"),
    "optim": (*VALUES, *(name.value for name in OptimizerNames)),
    "lr_scheduler_type": (*VALUES, *(name.value for name in SchedulerType)),
    "torch_compile_mode": (*VALUES, "max-autotune-no-cudagraph"),
}


@pytest.fixture(scope="module")
def fused(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything but a trained model."""
    run = tmp_path_factory.mktemp("settings") / "run"
    Pipeline(recipe_of(world, {}), run, Silent()).execute(["corpus", "externalize", "fuse"])
    return run


def recipe_of(world: Path, training: dict[str, Any]) -> Recipe:
    """The world's recipe with other settings of training."""
    found = load_recipe(world / "recipe.yaml", [])
    block = found.training.model_dump() | OVERRIDES | {"clm_baseline": False} | training
    raw = found.model_dump(by_alias=True) | {"training": block}
    return resolve_paths(Recipe.model_validate(raw), world)


def refusal(recipe: Recipe, run: Path, thorough: bool = True) -> str | None:
    """What is said of a recipe before anything is read; None if it is taken."""
    try:
        train.check(recipe, run)
        if thorough:
            train.rehearse(recipe)
    except RecipeError as error:
        return str(error)
    return None


def test_a_target_that_adds_a_loss_of_its_router_is_refused_before_any_work(
    world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "llama", tmp_path / "experts")
    path = tmp_path / "experts" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    mixture = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    for routed in (True, False):
        path.write_text(json.dumps(config | mixture | {"output_router_logits": routed}))
        recipe = recipe_of(world, {})
        target = recipe.target.model_copy(update={"model": str(tmp_path / "experts")})
        recipe = recipe.model_copy(update={"target": target})
        run = Pipeline(recipe, tmp_path / "run", Silent())
        if routed:
            with pytest.raises(RecipeError, match=r"target\.model: .*experts adds a loss of its"):
                run.check()
            with pytest.raises(RecipeError, match="output_router_logits: false in the config"):
                run.execute(["corpus"])
            assert not (tmp_path / "run").exists()
        else:
            train.check_target(run.context.target.located)


def assert_clear(message: str, key: str) -> None:
    """One line that names the setting."""
    assert "\n" not in message
    assert f"training.{key}" in message or f"training.{key.replace('gradient', 'activation')}" in (
        message
    ), message
    assert len(message) < 600, message


@pytest.mark.parametrize("key", SETTINGS)
def test_whatever_a_setting_is_it_is_taken_or_refused_in_one_line(world: Path, key: str) -> None:
    taken = []
    for value in TRIED[key]:
        said = refusal(recipe_of(world, {key: value}), world, thorough=False)
        if said is None:
            taken.append(value)
        else:
            assert_clear(said, key)
    wrong = [value for value in taken if isinstance(value, float) and not math.isfinite(value)]
    assert not wrong
    assert len(taken) < len(TRIED[key])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(8))
def test_what_check_takes_trains(world: Path, fused: Path, tmp_path: Path, part: int) -> None:
    """Each setting with each value that is taken, in a training of its own."""
    trained = 0
    for key in SETTINGS[part::8]:
        for n, value in enumerate(TRIED[key]):
            if key in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
                continue  # half a minute each
            if key == "fsdp":
                continue  # wants several processes, of which `check` is not told
            recipe = recipe_of(world, {key: value})
            said = refusal(recipe, fused)
            if said is not None:
                assert_clear(said, key)
                continue
            run = tmp_path / f"{key}-{n}"
            shutil.copytree(fused, run)
            try:
                Pipeline(recipe, run, Silent()).execute(["train/fused"])
            except NumericsError:
                pass  # a learning rate that is too high, say
            except Exception as error:
                raise AssertionError(f"{key}: {value!r} was taken, and {error!r}") from error
            trained += 1
            shutil.rmtree(run)
    print(f"\n{trained} trainings")
    assert trained > 10


BEFORE_ANYTHING_IS_READ = [
    ({"report_to": "wandb"}, "training.report_to: 'wandb' cannot be used: .*pip install wandb"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, and has to be 1 or"),
    ({"per_device_train_batch_size": True}, "batch_size: true is not a whole number$"),
    ({"seed": 2**32}, "training.seed is 4294967296, and has to be a number up to 4294967295"),
    ({"dataloader_num_workers": 999}, "dataloader_num_workers is 999, and has to be 0 to 128"),
    ({"max_grad_norm": -1}, "training.max_grad_norm is -1, and has to be 0 or more"),
    ({"max_steps": 0}, "training.max_steps is 0, and has to be 1 or more; -1 is for all epochs"),
    ({"num_train_epochs": 0}, "training.num_train_epochs is 0, and has to be more than 0"),
    ({"learning_rate": "fast"}, "training.learning_rate: 'fast' is not a number$"),
    ({"learning_rate": [1e-4]}, r"training.learning_rate: \[0.0001\] is not a number$"),
    (
        {"learning_rate": math.nan},
        "training.learning_rate is nan, and has to be a number up to",
    ),
    ({"optim": "adamw_bnb_8bit"}, "training.optim: 'adamw_bnb_8bit' cannot be used: .*install"),
    ({"optim": "adam"}, "training.optim: 'adam' cannot be used: .* not a valid OptimizerNames"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type: .*min_lr"),
    ({"lr_scheduler_kwargs": {"x": 1}}, "training.lr_scheduler_kwargs: {'x': 1} cannot be used"),
    ({"use_liger_kernel": True}, "training.use_liger_kernel: true .*pip install liger-kernel"),
    ({"dataloader_prefetch_factor": 2}, "training.dataloader_prefetch_factor: 2 cannot be used"),
    ({"dataloader_persistent_workers": True}, "training.dataloader_persistent_workers: true"),
    ({"save_total_limit": 0}, "training.save_total_limit is 0, and has to be 1 or more"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size cannot be set: rows are in an order"),
    ({"fp16": True, "bf16": True}, "training.(fp16|bf16): true cannot be used"),
    ({"clm": {"learning_rate": "x"}}, "training.clm.learning_rate: 'x' is not a number$"),
    ({"clm": {"optim": "lomo"}}, "training.clm.optim: 'lomo' cannot be used: .*lomo"),
    ({"torch_compile_backend": "x"}, "training.torch_compile_backend: 'x' cannot be used: backe"),
]


@pytest.mark.parametrize(("training", "what"), BEFORE_ANYTHING_IS_READ)
def test_it_is_said_before_anything_is_read(
    world: Path, tmp_path: Path, training: dict[str, Any], what: str
) -> None:
    run = tmp_path / "run"
    recipe = recipe_of(world, training)
    with pytest.raises(RecipeError, match=what):
        Pipeline(recipe, run, Silent()).check()
    with pytest.raises(RecipeError, match=what):
        Pipeline(recipe, run, Silent()).execute()
    assert not run.exists()


def test_a_setting_of_a_recipe_is_read_as_yaml_has_it(world: Path) -> None:
    """YAML calls 1e-4 a text; Python calls true a number."""
    text = "learning_rate: 1e-4\nwarmup_steps: 0.1\nlogging_strategy: no\nbf16: false"
    arguments = train.training_arguments(recipe_of(world, yaml.safe_load(text)), world, "clm")
    assert arguments.learning_rate == 1e-4
    assert arguments.logging_strategy == "no"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("bf16", "perhaps", "true or false"),
        ("lr_scheduler_kwargs", 3, "a text, a mapping or null"),
        ("report_to", 3, "a text, a list of texts or null"),
        ("save_steps", None, "a number"),
        ("run_name", ["x"], "a text or null"),
        ("report_to", [3], "a text, a list of texts or null"),
    ],
)
def test_a_wrong_type_is_named(key: str, value: Any, kind: str) -> None:
    with pytest.raises(RecipeError, match=f"^training.{key}: .* is not {kind}$"):
        checked("training", key, value)


def test_a_rehearsal_leaves_nothing_behind(world: Path, tmp_path: Path) -> None:
    def chance() -> tuple[Any, ...]:
        return random.random(), np.random.random(), float(torch.rand(1))

    def seeded(work: Callable[[], object]) -> tuple[Any, ...]:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        work()
        return chance()

    recipe = recipe_of(world, {"full_determinism": True, "bf16": True})
    assert seeded(lambda: train.rehearse(recipe)) == seeded(lambda: None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert train.training_arguments(recipe_of(world, {}), tmp_path, "fused").mixed_precision == "no"
