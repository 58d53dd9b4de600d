"""Running stages of a recipe or a run, and showing what comes of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fusellm.cli.console import Terminal
from fusellm.cli.evaluate_screen import as_object, results_of, show
from fusellm.cli.folder import show_status
from fusellm.cli.launch import (
    require_devices,
    require_joined,
    require_one_process,
    speaks,
    train_on,
)
from fusellm.errors import StoreError
from fusellm.recipe_file import changed_evaluation, load_recipe, resolve_paths

if TYPE_CHECKING:
    from fusellm.config import Recipe
    from fusellm.pipeline import Pipeline
    from fusellm.stages.externalize.task import EngineSettings

_stderr = Console(stderr=True)
_stdout = Console()


def open_recipe(place: Path, changes: Sequence[str]) -> "Recipe":
    """The recipe of a file or of a run, with its paths made absolute."""
    recipe_path = place / "recipe.yaml" if place.is_dir() else place
    if place.is_dir() and not recipe_path.exists():
        raise StoreError(f"{place} is not a run: it has no recipe.yaml; give a recipe instead")
    return resolve_paths(load_recipe(recipe_path, changes), recipe_path.parent)


def open_pipeline(
    place: Path,
    out: Path | None,
    changes: Sequence[str],
    engine: "EngineSettings | None" = None,
    nproc: int = 1,
    given: Mapping[str, Any] | None = None,
) -> "Pipeline":
    """The pipeline of a recipe or a run.

    Args:
        given: keys of `evaluation:` that the command line has other values for.
    """
    from fusellm.pipeline import Pipeline
    from fusellm.progress import Silent
    from fusellm.stages.externalize.task import LOCAL

    recipe = open_recipe(place, changes)
    run = out or (place if place.is_dir() else Path("runs") / recipe.name)
    return Pipeline(
        recipe,
        run,
        Terminal(_stderr) if speaks() else Silent(),
        engine or LOCAL,
        nproc if nproc > 1 else None,
        changed_evaluation(recipe.evaluation, given) if given else None,
    )


def execute(
    stages: tuple[str, ...],
    place: Path,
    out: Path | None,
    changes: list[str],
    redo: bool,
    as_json: bool,
    engine: "EngineSettings | None" = None,
    push_to: str | None = None,
    nproc: int = 1,
) -> None:
    """Run stages, or go on with them, and show what comes of them."""
    if stages != ("train",):
        require_one_process(stages[0] if len(stages) == 1 else "run")
    require_devices(nproc)
    if push_to is not None:
        from fusellm.models.hub import require_access

        require_access(push_to)
    pipeline = open_pipeline(place, out, changes, engine, nproc)
    require_joined()
    if nproc > 1:
        if "evaluate" in stages:
            pipeline.prepare_suites()
        pipeline.execute(stages[: stages.index("train")], redo)
        if pipeline.unfinished("train"):
            train_on(nproc, pipeline.run)
    pipeline.execute(stages, redo)
    if not speaks():
        return
    if {"evaluate", "report"} & set(stages):
        _show_results(pipeline.run, as_json, "report" in stages)
    elif as_json:
        show_status(pipeline.run, as_json=True)
    if push_to is not None:
        _push(pipeline, push_to)


def _push(pipeline: "Pipeline", repo: str) -> None:
    from fusellm.models.hub import push_model
    from fusellm.stages.train import FUSED, folder_of

    folder = folder_of(pipeline.run, FUSED)
    with Terminal(_stderr).start(f"uploading {folder}", 0, "files"):
        address = push_model(folder, repo, f"{pipeline.recipe.name}: fused by fusellm")
    _stderr.print(f"The fused model is at {address}", highlight=False, soft_wrap=True)


def _show_results(run: Path, as_json: bool, with_page: bool) -> None:
    found = results_of(run)
    if as_json:
        print(json.dumps(as_object(found), ensure_ascii=False))
        return
    show(found, _stdout)
    if with_page:
        _stdout.print(f"Report: {run / 'report' / 'index.html'}", highlight=False, soft_wrap=True)
        model = run / "train" / "fused"
        _stdout.print(f"The fused model: {model}", highlight=False, soft_wrap=True)
