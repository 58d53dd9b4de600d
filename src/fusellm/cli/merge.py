"""`fusellm merge`: the weights of models of one architecture and one tokenizer as one model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.launch import require_one_process
from fusellm.cli.options import Json, folder
from fusellm.merging.settings import METHODS, settings_of


class MergeMethod(StrEnum):  # typer takes Literal from 0.19 on
    """What `--method` takes."""

    LINEAR = "linear"
    SLERP = "slerp"
    TASK_ARITHMETIC = "task_arithmetic"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    SCE = "sce"


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
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weight",
        metavar="W",
        help="Give it once for each model, in their order; if not given, each has 1. Not for "
        "slerp and sce.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        metavar="SHARE",
        help="How much of what a model has learnt is kept, in (0, 1]; if not given, 0.2 for "
        "ties, 0.5 for dare_linear and dare_ties, all for sce.",
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        metavar="λ",
        help="What is added to the base is multiplied by it; if not given, 1. For "
        "task_arithmetic, ties, dare_linear and dare_ties.",
    ),
]
Along = Annotated[
    float | None,
    typer.Option(
        "--t", metavar="T", help="slerp: 0 is the first model, 1 the second; if not given, 0.5."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Of what dare_… draws; if not given, 0."),
]


def merge(
    models: Models,
    method: HowMerged,
    out: MergedFolder,
    base: Base = None,
    weight: Weights = None,
    density: Density = None,
    scale: Scale = None,
    t: Along = None,
    seed: Seed = None,
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
    settings_of(  # what is wrong with these is told before torch is imported
        method.value, len(models), weights=weight, density=density, scale=scale, t=t, seed=seed
    )
    from fusellm.merging.merge import merge_models

    merged = merge_models(
        models,
        out,
        method=method.value,
        base=base,
        weights=weight,
        density=density,
        scale=scale,
        t=t,
        seed=seed,
        progress=Terminal(STDERR),
    )
    if as_json:
        said = {"folder": str(merged.folder), "method": method.value, "base": merged.base}
        print(json_text(said | {"tensors": merged.tensors, "parameters": merged.parameters}))
        return
    STDOUT.say(f"The merged model: {out}")
