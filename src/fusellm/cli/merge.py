"""`fusellm merge`: the weights of models of one architecture and one tokenizer as one model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.launch import require_one_process
from fusellm.cli.options import Json, folder
from fusellm.cli.setting_options import SettingOptions
from fusellm.config.merging import MergeMethod, MergeNumbers
from fusellm.merging.settings import METHODS, settings_of

_METHODS = "; ".join(f"{name}: {method.what}" for name, method in METHODS.items())
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL|RUN…",
        help="Two or more: folders, names on the hub, zoo/NAME; a run stands for its fused "
        "model, and RUN/train/clm is a folder like any.",
        show_default=False,
    ),
]
HowMerged = Annotated[
    MergeMethod, typer.Option("--method", help=f"{_METHODS}.", show_default=False)
]
MergedFolder = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        parser=folder,
        help="Where the merged model goes; not there yet, or empty.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="What all of them were trained from; for all methods but linear and slerp. Of "
        "runs that have one target it is that target, if not given.",
    ),
]
numbers = SettingOptions(
    MergeNumbers,
    ("weights", "density", "lambda_", "t", "seed"),
    flags={"weights": "--weight", "lambda_": "--lambda"},
    metavars={"weights": "W", "density": "SHARE", "lambda_": "λ", "t": "T"},
)


@numbers
def merge(
    *,
    models: Models,
    method: HowMerged,
    out: MergedFolder,
    base: Base = None,
    given: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Merge the weights of models of one architecture and one tokenizer into one model.

    Nothing is trained, and no GPU is needed: of each model one tensor at a time is in memory. The
    result is an ordinary model of transformers, with the first model's tokenizer and the base's
    precision, and is there whole or not at all.

    Two runs with one target, as FuseChat's second step: `fusellm merge runs/a runs/b --method sce
    --out runs/merged`.

    The plain mean, weighted: `fusellm merge A B --method linear --weight 0.7 --weight 0.3 --out
    DIR`.

    Over a base that you name: `fusellm merge A B C --base BASE --method ties --density 0.5 --out
    DIR`.

    Then `fusellm evaluate DIR A B --suite smoke` measures them side by side.
    """
    require_one_process("merge")
    asked = MergeNumbers.model_validate(given).numbers
    settings_of(method, len(models), **asked)  # what is wrong is told before torch is imported
    from fusellm.merging.merge import merge_models

    shown = Terminal(STDERR)
    merged = merge_models(models, out, method=method, base=base, progress=shown, **asked)
    if as_json:
        said = {"folder": str(merged.folder), "method": method, "base": merged.base}
        print(json_text(said | {"tensors": merged.tensors, "parameters": merged.parameters}))
        return
    STDOUT.say(f"The merged model: {out}")
