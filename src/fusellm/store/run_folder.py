"""A run's folder: its stages, how far they are, and what can be removed of it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fusellm.config import Recipe
from fusellm.errors import RecipeError, StoreError
from fusellm.recipe_file import RECIPE as RECIPE
from fusellm.recipe_file import load_recipe
from fusellm.store.files import from_json, require_inside
from fusellm.store.manifest import MANIFEST, StageFolder

STAGES = ("generate", "corpus", "externalize", "fuse", "train", "evaluate", "report")
FUSED, CLM = "fused", "clm"
"""What is trained: the fused model, and the baseline on the same text without fusion."""
ASIDE = "aside"
SUITES = "evaluate-suites"
"""What models answered to the documents of suites: a record a task, and no manifest."""
INDEX = "index.json"
"""In that folder: which records belong together."""
NOW = (".now.json", ".now.json.half")
"""What a run is doing, and the same while it is being written."""
USAGE = ".usage.json"
"""What each stage has used."""
CONTINUATIONS = "continuations.json"
"""What every model writes behind the same held-out beginnings."""
PLAN, PROBE = "plan.json", ".plan-"
"""What was planned, before the run or beside it; and how folders begin in which a plan is tried."""
SAVED_WHOLE = "saved-whole"
"""In a checkpoint's folder, once all of it is on disk."""


def recipe_text(recipe: Recipe, run: Path) -> str:
    """A recipe as a run keeps it.

    What another round of the same folder has trained is named from here, so that all can be moved.
    """
    settings = recipe.model_dump(mode="json", by_alias=True)
    rounds = f"{run.resolve().parent}{os.sep}round-"
    for model in (settings["target"], *settings["sources"]):
        place = str(Path(model["model"]).resolve())
        if place.startswith(rounds):
            model["model"] = os.path.relpath(place, run.resolve())
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def trained_folder(run: Path, which: str) -> Path:
    """Folder of the fused model or the CLM baseline."""
    return run / "train" / which


def checkpoints_folder(run: Path, which: str) -> Path:
    """Folder of the checkpoints of an unfinished training."""
    return run / "train" / f"{which}-checkpoints"


def suites_of(run: Path) -> tuple[bool, int] | None:
    """Whether all suites that were begun are finished, and how many records there are.

    Returns:
        None if none was begun.
    """
    begun = [path for path in (run / SUITES).glob("*") if path.is_dir() and path.name != ASIDE]
    if not begun:
        return None
    index = run / SUITES / INDEX
    try:
        finished = from_json(index.read_text(encoding="utf-8")) if index.exists() else {}
    except ValueError:  # `evaluate` says what is wrong with it
        finished = {}
    records = sum(len(list(path.glob("*/*.jsonl"))) for path in begun)
    return len(finished) >= len(begun), records


def records_of(run: Path, models: Sequence[str]) -> list[Path]:
    """What the trained models among `models` answered to suites, and the index of all answers."""
    trained = [model for model in models if model in (FUSED, CLM)]
    records = [path for model in trained for path in sorted((run / SUITES).glob(f"*/{model}"))]
    return [*records, run / SUITES / INDEX] if records else []


def removable(run: Path, stores: bool, everything: bool) -> list[Path]:
    """Files and folders that `clean` removes: what was set aside, checkpoints, and more if asked.

    Nothing is named that a run did not make. With `stores` the manifests and counts of the stores
    stay, so that the run is still known as finished.

    Raises:
        StoreError: the folder is no run, a link leads out of it, or the models that need the stores
            are not trained yet.
    """
    folders = dict(stage_folders(run))
    if not folders:
        raise StoreError(f"{run} holds no stage of a run; nothing is removed")
    if everything:
        names = (*STAGES, SUITES, ASIDE, RECIPE, CONTINUATIONS, PLAN, USAGE, *NOW)
        paths = [path for name in names if (path := run / name).exists() or path.is_symlink()]
        return [*paths, *sorted(run.glob(f"{PROBE}*"))]
    paths = [run / ASIDE, run / SUITES / ASIDE, *(run / "train").glob("*-checkpoints")]
    if stores:
        unfinished = [name for name, folder in folders.items() if not folder.complete]
        if unfinished or "evaluate" not in folders:
            raise StoreError(
                f"{run} is unfinished ({', '.join(unfinished) or 'not evaluated'}) and still needs "
                "its stores; finish it with `fusellm run`, or give --all"
            )
        paths += [*(run / "externalize").rglob("*.arrow"), *(run / "fuse").glob("*.arrow")]
    for path in paths:
        require_inside(path.parent, run)
    return [path for path in paths if path.exists()]


def rounds_in(run: Path) -> list[Path]:
    """The runs of a folder that has rounds, in their order; none of one that is a run itself."""
    begun = [path.parent for path in run.glob(f"round-*/{RECIPE}")]
    numbered = [path for path in begun if path.name.removeprefix("round-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("round-")))


def planned_rounds(run: Path) -> int:
    """How many rounds the recipe of a folder has."""
    try:
        return load_recipe(run / RECIPE).rounds
    except RecipeError:
        return 1


def require_no_rounds(run: Path) -> None:
    """Check that a folder is not one of several runs.

    Raises:
        StoreError: it is; they are named.
    """
    rounds = rounds_in(run)
    if rounds:
        named = ", ".join(map(str, rounds))
        raise StoreError(f"{run} has rounds, each a run of its own; give one of {named}")


def stage_folders(run: Path) -> Iterator[tuple[str, StageFolder]]:
    """The stage folders of a run that have begun, in the order of the stages.

    Raises:
        StoreError: the folder is no run, or a manifest is damaged.
    """
    require_no_rounds(run)
    if not (run / RECIPE).exists():
        what = "it is a file" if run.is_file() else f"it has no {RECIPE}"
        raise StoreError(f"{run} is not a run: {what}; give the folder of a run, as runs/NAME")
    for stage in STAGES:
        for path in sorted([run / stage, *(run / stage).glob("*")]):
            if (path / MANIFEST).exists():
                yield str(path.relative_to(run)), StageFolder(path)
