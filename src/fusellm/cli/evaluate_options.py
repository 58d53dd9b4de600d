"""The options of `fusellm evaluate`."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fusellm.cli.options import folder
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
_METAVARS = {"data_dir": "FOLDER", "toolchains": "FOLDER", "tasks": "TASK"}
_SETTINGS = (  # of a recipe's `evaluation:` that have an option
    *("data_dir", "allow_download", "tasks", "limit", "batch_size", "too_long", "max_new_tokens"),
    *("samples", "temperature", "top_p", "pass_at", "toolchains", "published"),
)
_FLAGS = {"toolchains": "--toolchain"}
_KINDS: dict[str, Any] = {"data_dir": Path, "toolchains": list[Path]}
"""Options that are paths; in a recipe they are texts."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `given` stands for an option for each of `_SETTINGS`.

    It gets the settings that were given, as a recipe would have them.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += map(_option, _SETTINGS) if parameter.name == "given" else [parameter]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {name: _plain(values.pop(name)) for name in _SETTINGS}
        command(**values, given={name: one for name, one in given.items() if one is not None})

    # typer makes options of these.
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _option(name: str) -> inspect.Parameter:
    """The option of a setting, whose type, bounds and words are those of the recipe."""
    field = EvaluationSettings.model_fields[name]
    kind: Any = field.annotation
    bounds = field.metadata
    if NoneType in get_args(kind):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is Annotated:
        kind, inner = get_args(kind)
        bounds = inner.metadata
    if get_origin(kind) is Literal:
        choices: Any = StrEnum
        kind = choices(name, {one: one for one in get_args(kind)})
    kind = _KINDS.get(name, kind)
    given: dict[str, Any] = {"parser": folder} if kind is Path else {}
    for bound in bounds:
        # typer's ranges hold their ends: what is above 0 and whole is 1 or more, and of other
        # numbers the recipe's own check refuses 0.
        if hasattr(bound, "gt"):
            given["min"] = kind(bound.gt) + (kind is int)
        elif hasattr(bound, "ge"):
            given["min"] = kind(bound.ge)
        elif hasattr(bound, "le"):
            given["max"] = kind(bound.le)
    told = " ".join((field.description or "").split())
    if get_origin(kind) is list:
        told += " May be repeated."
    elif field.default and kind is not bool:
        told += f" Default: the recipe's, or {field.default}."
    metavar = _METAVARS.get(name, "N" if kind is int else None)
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    unset = False if kind is bool else None
    option = typer.Option(unset, flag, metavar=metavar, help=told, show_default=False, **given)
    annotation = kind if kind is bool else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _plain(value: Any) -> Any:
    """What an option says, as a recipe would; None where it says nothing."""
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, list):
        return [_plain(one) for one in value] or None
    return value or None if isinstance(value, bool) else value


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
