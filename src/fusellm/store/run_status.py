"""How far a run is: its stages, with their sizes and times."""

from pathlib import Path
from typing import Any

from fusellm.recipe_file import load_recipe
from fusellm.store.externalized import TARGET
from fusellm.store.run_folder import RECIPE, SUITES, stage_folders, suites_of
from fusellm.store.tables import folder_bytes


def status_of(run: Path) -> list[dict[str, Any]]:
    """How far each stage folder of a run is, in the order of the stages.

    Returns:
        Of each `stage` whether it is `complete` and `in_recipe`, its `shards`, `bytes` and
        `seconds`; of suites, whose time is not known, None.

    Raises:
        StoreError: the folder is no run, or a manifest is damaged.
    """
    folders = list(stage_folders(run))
    sources = {source.name for source in load_recipe(run / RECIPE).sources} | {TARGET}
    rows: list[dict[str, Any]] = [
        {
            "stage": name,
            "complete": folder.complete,
            "in_recipe": not name.startswith("externalize/") or name.split("/")[1] in sources,
            "shards": len(folder.shards),
            "bytes": folder_bytes(folder.path),
            "seconds": round(folder.seconds, 1),
        }
        for name, folder in folders
    ]
    if (suites := suites_of(run)) is not None:
        of_suites = {"stage": SUITES, "complete": suites[0], "shards": suites[1]}
        size = {"bytes": folder_bytes(run / SUITES)}
        rows.append(of_suites | size | {"in_recipe": True, "seconds": None})
    return rows
