"""The options of `fusellm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.options import folder
from fusellm.cli.setting_options import SettingOptions
from fusellm.config import EvaluationSettings

Places = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN|RECIPE|MODEL…",
        help="The folder of a run or its recipe; or models: folders, GGUF files, names on the hub, "
        "zoo/NAME.",
        show_default=False,
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME",
        help="What to measure; may be repeated. A suite of --list, or a task of lm_eval. Of a run, "
        "if not given, lm (held-out bits per byte) and what the recipe says; of models, needed.",
    ),
]
ListSuites = Annotated[
    bool,
    typer.Option(
        "--list", help="Show the suites, where their data comes from, and whether it is at hand."
    ),
]
with_settings = SettingOptions(
    EvaluationSettings,
    (
        *("data_dir", "allow_download", "tasks", "limit", "batch_size", "too_long"),
        *("max_new_tokens", "samples", "temperature", "top_p", "pass_at", "toolchains"),
        *("chat", "published"),
    ),
    flags={"toolchains": "--toolchain"},
    metavars={"data_dir": "FOLDER", "toolchains": "FOLDER", "tasks": "TASK"},
    kinds={"data_dir": Path, "toolchains": list[Path]},
)
"""Gives `evaluate` an option for each of these settings of a recipe's `evaluation:`."""
Save = Annotated[
    list[Path] | None,
    typer.Option(
        "--save",
        metavar="FILE",
        help="Save the tables as FILE.md, FILE.csv or FILE.json; may be repeated.",
    ),
]
OutOfEvaluation = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        parser=folder,
        help="The run's folder, runs/NAME of the recipe if not given; of models, the folder of "
        "their records, runs/evaluation if not given.",
    ),
]
SetOfEvaluation = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting of the recipe; of models, how they are loaded: --set dtype=bfloat16",
    ),
]
