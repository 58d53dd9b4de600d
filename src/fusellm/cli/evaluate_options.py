"""The options of `fusellm evaluate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.options import folder

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
        help="What to measure; may be repeated. A suite of --list, or a task of lm_eval. If not "
        "given, lm and what the recipe says.",
    ),
]
ListSuites = Annotated[
    bool,
    typer.Option(
        "--list", help="Show the suites, where their data comes from, and whether it is at hand."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="FOLDER", parser=folder, help="Where the suites' data is."),
]
AllowDownload = Annotated[
    bool,
    typer.Option("--allow-download", help="Fetch what --data-dir lacks from the hub."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="TASK", help="Only this task of a suite; may be repeated."),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first N documents of each task."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", min=1, help="Documents at a time; 8 if not given."),
]


class TooLong(StrEnum):
    """What becomes of a prompt that does not fit."""

    ERROR = "error"
    TRUNCATE = "truncate"


TooLongOption = Annotated[
    TooLong | None,
    typer.Option(
        "--too-long",
        help="A prompt that does not fit a model's context: stop (the default), or cut it from the "
        "left, its examples first, and count it.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="Most tokens that a model writes, where a task allows more.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, help="Programs for each problem."),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="Of programs; 0, the default, is greedy."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, help="Of programs, if they are sampled."),
]
PassAt = Annotated[
    int | None, typer.Option("--pass-at", metavar="K", min=1, help="k of pass@k; 1 if not given.")
]
Toolchains = Annotated[
    list[Path] | None,
    typer.Option(
        "--toolchain",
        metavar="FOLDER",
        help="A folder outside of /usr with a compiler in its bin, which generated programs may "
        "read; may be repeated.",
    ),
]
Published = Annotated[
    bool, typer.Option("--published", help="Show the paper's figures beside, for reference.")
]
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
TrustOfEvaluation = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with models (of a recipe: with those where it says "
        "trust_remote_code: true); its files are named first. Only if you have read it: it can do "
        "whatever you can.",
    ),
]
RedoOfEvaluation = Annotated[
    bool,
    typer.Option("--redo", help="Move results made from something else aside and measure anew."),
]
