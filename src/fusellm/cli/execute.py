"""Running stages of a recipe or a run, and showing what comes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.evaluate_screen import as_object, results_of, show
from fusellm.cli.folder import show_status
from fusellm.cli.launch import (
    join,
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


def open_recipe(place: Path, changes: Sequence[str]) -> "Recipe":
    """The recipe of a file or of a run, with its paths made absolute."""
    recipe_path = place / "recipe.yaml" if place.is_dir() else place
    if place.is_dir() and not recipe_path.exists():
        raise StoreError(f"{place} is not a run: it has no recipe.yaml; give a recipe instead")
    return resolve_paths(load_recipe(recipe_path, changes), recipe_path.parent)


def run_of(place: Path, out: Path | None, recipe: "Recipe") -> Path:
    """The folder of the run that a command is about."""
    return out or (place if place.is_dir() else Path("runs") / recipe.name)


def open_pipeline(
    place: Path,
    out: Path | None,
    changes: Sequence[str],
    engine: "EngineSettings | None" = None,
    nproc: int = 1,
    given: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> "Pipeline":
    """The pipeline of a recipe or a run.

    Args:
        trusted: whether --trust-remote-code is given.
        given: keys of `evaluation:` that the command line has other values for.
    """
    from fusellm.models.remote_code import trusted_code
    from fusellm.pipeline import Pipeline
    from fusellm.progress import Silent
    from fusellm.stages.externalize.task import LOCAL

    recipe = open_recipe(place, changes)
    progress = Terminal(STDERR) if speaks() else Silent()
    for model in (recipe.target, *recipe.sources):
        told = trusted_code(model, trusted)
        if told is not None:
            progress.say(told)
    return Pipeline(
        recipe,
        run_of(place, out, recipe),
        progress,
        engine or LOCAL,
        nproc if nproc > 1 else None,
        changed_evaluation(recipe.evaluation, given) if given else None,
        trusted,
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
    trusted: bool = False,
) -> None:
    """Run stages, or go on with them, and show what comes of them."""
    if stages != ("train",):
        require_one_process(stages[0] if len(stages) == 1 else "run")
    require_devices(nproc)
    if push_to is not None:
        from fusellm.models.hub import require_access

        require_access(push_to)
    join()
    pipeline = open_pipeline(place, out, changes, engine, nproc, trusted=trusted)
    require_joined()
    if nproc > 1:
        if "evaluate" in stages:
            pipeline.prepare_suites()
        pipeline.execute(stages[: stages.index("train")], redo)
        if pipeline.unfinished("train"):
            train_on(nproc, pipeline.run, trusted)
    pipeline.execute(stages, redo)
    if not speaks():
        return
    if "report" in stages:
        show_results(pipeline.run, as_json)
    elif as_json:
        show_status(pipeline.run, as_json=True)
    if push_to is not None:
        _push(pipeline, push_to)


def _push(pipeline: "Pipeline", repo: str) -> None:
    from fusellm.models.hub import push_model
    from fusellm.stages.train import FUSED, folder_of

    folder = folder_of(pipeline.run, FUSED)
    with Terminal(STDERR).start(f"uploading {folder}", 0, "files"):
        address = push_model(folder, repo, f"{pipeline.recipe.name}: fused by fusellm")
    STDERR.say(f"The fused model is at {address}")


def show_results(run: Path, as_json: bool) -> None:
    """Print a run's results, and where its report and its model are."""
    found = results_of(run)
    if as_json:
        print(json_text(as_object(found)))
        return
    show(found, STDOUT)
    STDOUT.say(f"Report: {run / 'report' / 'index.html'}")
    STDOUT.say(f"The fused model: {run / 'train' / 'fused'}")
