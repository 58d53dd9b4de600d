"""How far a run is: its stages, with their sizes and times."""

from pathlib import Path
from typing import Any

from fusellm.config import Recipe
from fusellm.recipe_file import load_recipe
from fusellm.store.externalized import TARGET
from fusellm.store.files import from_json
from fusellm.store.manifest import StageFolder
from fusellm.store.run_folder import (
    CLM,
    FUSED,
    RECIPE,
    SAVED_WHOLE,
    STAGES,
    SUITES,
    checkpoints_folder,
    stage_folders,
    suites_of,
)
from fusellm.store.tables import folder_bytes

_ORDER = (*STAGES[:-1], SUITES, STAGES[-1])  # the report is of all


def status_of(run: Path) -> list[dict[str, Any]]:
    """How far each stage of a run is, in their order.

    Returns:
        Of each `stage` whether it is `begun`, `complete` and `in_recipe`, its `shards`, `bytes` and
        `seconds`; of a training that is not finished the `step` of its last checkpoint, and of how
        many `steps`. None for what is not known.

    Raises:
        StoreError: the folder is no run, or a manifest is damaged.
    """
    folders = dict(stage_folders(run))
    planned = _stages_of(load_recipe(run / RECIPE))
    suites = suites_of(run)
    if suites is not None and SUITES not in planned:  # the command line has named them
        planned.append(SUITES)
    names = dict.fromkeys([*planned, *folders])
    rows = []
    for name in sorted(names, key=lambda name: _ORDER.index(name.split("/")[0])):
        row: dict[str, Any] = {"stage": name, "begun": name in folders, "complete": False}
        row |= {"in_recipe": name in planned, "shards": 0, "bytes": 0, "seconds": None}
        row |= {"step": None, "steps": None}
        if name in folders:
            row |= _of_folder(run, name, folders[name])
        elif name == SUITES and suites is not None:
            size = folder_bytes(run / SUITES)
            row |= {"begun": True, "complete": suites[0], "shards": suites[1], "bytes": size}
        elif name == "report" and (run / name / "index.html").exists():
            row |= {"begun": True, "complete": True, "bytes": folder_bytes(run / name)}
        rows.append(row)
    return rows


def _stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe asks for."""
    read = [f"externalize/{name}" for name in (TARGET, *(one.name for one in recipe.sources))]
    trained = [f"train/{FUSED}", *[f"train/{CLM}"] * recipe.training.clm_baseline]
    suites = [SUITES] * bool(recipe.evaluation.suites)
    generated = [f"generate/{entry}" for entry in recipe.corpus.generated]
    return [*generated, "corpus", *read, "fuse", *trained, "evaluate", *suites, "report"]


def _of_folder(run: Path, name: str, folder: StageFolder) -> dict[str, Any]:
    row: dict[str, Any] = {"complete": folder.complete, "shards": len(folder.shards)}
    row |= {"bytes": folder_bytes(folder.path), "seconds": round(folder.seconds, 1)}
    if name.startswith("train/") and not folder.complete:
        row |= _saved(checkpoints_folder(run, name.removeprefix("train/")))
    return row


def _saved(checkpoints: Path) -> dict[str, int | None]:
    """The step of the last checkpoint that is whole, and of how many."""
    paths = (path.parent for path in checkpoints.glob(f"checkpoint-*/{SAVED_WHOLE}"))
    by_step = {int(n): path for path in paths if (n := path.name.partition("-")[2]).isdigit()}
    if not by_step:
        return {}
    step = max(by_step)
    try:
        state = from_json((by_step[step] / "trainer_state.json").read_text(encoding="utf-8"))
        steps = state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):  # who goes on from it says what is wrong
        steps = None
    return {"step": step, "steps": steps if isinstance(steps, int) else None}
