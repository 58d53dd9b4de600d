"""`fusellm evaluate --list`: the suites, and whether their data is at hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fusellm.cli.console import STDOUT, json_text
from fusellm.errors import EvaluationError
from fusellm.recipe_file import changed_evaluation, open_recipe
from fusellm.text_table import few

_MOST_NAMED = 4


def show_list(places: Sequence[str], given: Mapping[str, Any], as_json: bool) -> None:
    """Print the suites.

    Args:
        places: a run or a recipe, whose `evaluation:` says where data is; or none.
        given: keys of that block that the command line has other values for.
    """
    from fusellm.config import EvaluationSettings
    from fusellm.evaluation.suites.at_hand import suites_at_hand

    if len(places) > 1:
        raise EvaluationError("--list takes a run or a recipe, or none; it shows no models")
    own = open_recipe(Path(places[0]), ()).evaluation if places else EvaluationSettings()
    rows = suites_at_hand(changed_evaluation(own, given))
    if as_json:
        print(json_text(rows))
        return
    table = Table.grid(padding=(0, 2, 1, 0), collapse_padding=False)
    for row in rows:
        documents = f"{row['documents']:,} documents" if row["documents"] else "any number"
        lines = (
            f"{row['about']}.",
            f"{row['contains']}; {documents}.",
            f"Data: {row['data']}. At hand: {_told(row)}.",
        )
        table.add_row(Text(row["suite"], style="bold"), "\n".join(lines))
    STDOUT.show(
        table,
        "Any task of lm_eval goes by its own name too, with --allow-download. --data-dir names the "
        "folder with the data; docs/evaluation.md says what each suite measures.",
    )


def _told(row: Mapping[str, Any]) -> str:
    missing = list(row["missing"])
    if not missing:
        return "yes"
    if len(missing) == len(row["tasks"]):
        return "no"
    return f"all but {few(missing, _MOST_NAMED)}"
