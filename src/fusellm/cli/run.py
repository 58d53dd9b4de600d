"""`fusellm run` and the commands of single stages: running them, and showing what comes of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column

from fusellm.cli import launch, options
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.draw import table
from fusellm.cli.evaluate_screen import show, show_rounds
from fusellm.cli.options import NO_CHANGES
from fusellm.cli.status import status
from fusellm.errors import RecipeError
from fusellm.recipe_file import changed_evaluation, folder_of_run, open_recipe

if TYPE_CHECKING:
    from fusellm.config import EvaluationSettings, Recipe
    from fusellm.pipeline import Pipeline
    from fusellm.reading.engine import EngineSettings

_RECIPES = Path(__file__).parents[1] / "recipes"


def demo(
    full: Annotated[
        bool,
        typer.Option("--full", help="More text, two epochs: the run whose figures are published."),
    ] = False,
    out: options.Out = None,
    changes: options.Set = NO_CHANGES,
    redo: options.Redo = False,
    as_json: options.Json = False,
) -> None:
    """Fuse the three small models that come with fusellm; no download, a few minutes.

    Runs the recipe recipes/demo.yaml on text of the installed Python packages, and ends in a table
    and a report page. --full runs recipes/demo-full.yaml: more text, a quarter of an hour.
    """
    recipe = _RECIPES / ("demo-full.yaml" if full else "demo.yaml")
    _execute(None, recipe, out, changes, redo, as_json)


def report(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE_OR_RUN",
            help="A recipe (.yaml) or the folder of a run; or the folders of several runs.",
            show_default=False,
        ),
    ],
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Write results.json, results.csv and the report page of a run, from its folder alone.

    Of several runs it is one page, with what they gained side by side, their curves, and where
    their recipes differ; --out then names the folder of the page.
    """
    if len(recipes) > 1:
        _report_beside(recipes, out, as_json)
        return
    (recipe,) = recipes
    folder = out or folder_of_run(recipe, open_recipe(recipe))
    from fusellm.stages.report.write import write_report
    from fusellm.store.run_folder import require_no_rounds

    require_no_rounds(folder)
    write_report(folder)
    _show_results([folder], as_json)


def _report_beside(runs: Sequence[Path], out: Path | None, as_json: bool) -> None:
    if out is None:
        raise RecipeError("several runs have a page of their own: name its folder with --out")
    from fusellm.stages.report.beside import write_beside

    write_beside(runs, out)
    page = out / "index.html"
    if as_json:
        print(json_text(json.loads((out / "results.json").read_text(encoding="utf-8"))))
    else:
        STDOUT.say(f"Report: {page}")


def check(
    recipe: options.RecipeOrRun,
    out: options.Out = None,
    changes: options.Set = NO_CHANGES,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Find every model, tokenizer and file of a recipe, before any weight is loaded."""
    given = open_recipe(recipe, changes)
    from fusellm.preflight import gigabytes, require_disk
    from fusellm.rounds import rounds_of

    first, run = rounds_of(given, out or folder_of_run(recipe, given))[0]
    checked = _pipeline(first, run, trusted=trust_remote_code).check()

    if as_json:
        print(json_text(checked))
        return
    # Models of one folder differ in the end of their path.
    folded = [Column(one, overflow="fold") for one in ("name", "model", "architecture")]
    models = table(*folded, "tokens", "context", "every block fits", title=f"{recipe}: all found")
    for name, model in checked["models"].items():
        context = str(model["context_tokens"] or "any")
        fits = "yes" if model["every_block_fits"] else "known after `fusellm corpus`"
        if model["conversations"] and model["context_tokens"]:
            fits = "longer ones end with it"
        path = "/".join(part for part in (model["model"], model.get("gguf_file")) if part)
        models.add_row(name, path, model["architecture"], str(model["tokens"]), context, fits)
    STDOUT.print(models)
    for name, model in checked["models"].items():
        STDOUT.say(_tried(name, model))
    size = checked["projected_store_bytes"]
    unset = "not known, as corpus.train_bytes is not set"
    shown = unset if size is None else f"about {gigabytes(size)}"
    STDOUT.print(f"Distributions on disk: {shown}; free: {gigabytes(checked['free_bytes'])}")
    require_disk(checked)


def _tried(name: str, model: dict[str, Any]) -> str:
    """What a model's tokenizer made of some blocks of the corpus."""
    blocks, before = model["blocks_tried"], " ".join(model["put_before"]) or "nothing"
    read = f"reads {blocks - model['blocks_changed']:,} of {blocks:,} blocks that were tried"
    read += f", the longest of {model['longest_tried']:,} tokens"
    read += f", {model['blocks_cut']:,} no further than its context" if model["blocks_cut"] else ""
    return f"{name}: {read if blocks else 'no block was tried'}; puts {before} before each"


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
    recipe = open_recipe(place, changes)
    evaluation = changed_evaluation(recipe.evaluation, given) if given else None
    run = out or folder_of_run(place, recipe)
    return _pipeline(recipe, run, engine, nproc, evaluation, trusted)


def _pipeline(
    recipe: "Recipe",
    run: Path,
    engine: "EngineSettings | None" = None,
    nproc: int = 1,
    evaluation: "EvaluationSettings | None" = None,
    trusted: bool = False,
) -> "Pipeline":
    from fusellm.models.remote_code import require_trusted
    from fusellm.pipeline import Pipeline
    from fusellm.progress import Silent
    from fusellm.reading.engine import LOCAL

    progress = Terminal(STDERR) if launch.speaks() else Silent()
    for model in (recipe.target, *recipe.sources):
        require_trusted(model, trusted, progress)
    count = nproc if nproc > 1 else None
    return Pipeline(recipe, run, progress, engine or LOCAL, count, evaluation, trusted)


def _execute(
    stages: tuple[str, ...] | None,
    recipe: options.RecipeOrRun,
    out: options.Out = None,
    changes: options.Set = NO_CHANGES,
    redo: options.Redo = False,
    as_json: options.Json = False,
    push_to_hub: options.PushToHub = None,
    nproc: options.Nproc = 1,
    trust_remote_code: options.TrustRemoteCode = False,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    workers: options.Workers = None,
    worker_cpus: options.WorkerCpus = None,
    worker_gpus: options.WorkerGpus = None,
) -> None:
    """Run stages, all if None, or go on with them, and show what comes of them."""
    given = open_recipe(recipe, changes)  # what is wrong is told before torch is imported
    from fusellm.reading.engine import EngineSettings
    from fusellm.store.run_folder import STAGES
    from fusellm.training import processes
    from fusellm.training.launch import require_devices

    stages = stages or STAGES
    settings = EngineSettings(engine, ray_address, workers, worker_cpus, worker_gpus)
    if stages != ("train",):
        launch.require_one_process(stages[0] if len(stages) == 1 else "run")
    require_devices(nproc)
    if push_to_hub is not None:
        from fusellm.models.hub import require_access

        require_access(push_to_hub)
    processes.join()
    run = out or folder_of_run(recipe, given)
    rounds = [(given, run)]
    if given.rounds > 1 and stages == STAGES:
        from fusellm.rounds import rounds_of, write_recipe_of_rounds

        rounds = rounds_of(given, run)
        processes.first(partial(write_recipe_of_rounds, given, run))
    for number, (one, folder) in enumerate(rounds, start=1):
        if len(rounds) > 1:
            Terminal(STDERR).say(f"round {number} of {len(rounds)}, {folder}")
        pipeline = _pipeline(one, folder, settings, nproc, trusted=trust_remote_code)
        processes.require_joined()
        _work(pipeline, stages, redo, nproc, trust_remote_code)
    if not launch.speaks():
        return
    if "report" in stages:
        _show_results([folder for _, folder in rounds], as_json)
    elif as_json:
        status(pipeline.run, as_json=True)
    if push_to_hub is not None:
        _push(pipeline, push_to_hub)


def _work(
    pipeline: "Pipeline", stages: tuple[str, ...], redo: bool, nproc: int, trusted: bool
) -> None:
    """Run stages, the training by `nproc` processes."""
    if nproc > 1:
        from fusellm.training.launch import train_on

        if "evaluate" in stages:
            pipeline.prepare_suites()
        pipeline.execute(stages[: stages.index("train")], redo)
        if pipeline.unfinished("train"):
            train_on(nproc, pipeline.run, trusted)
    pipeline.execute(stages, redo)


def _options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command those options of `_execute` that belong to it, in the order of its help."""
    of_all = signature(_execute).parameters
    own = [of_all[name] for name in ("recipe", "out", "changes", "redo", *names)]

    def give(command: Callable[..., None]) -> Callable[..., None]:
        made: Any = command  # typer reads a command's options from these two
        made.__signature__ = Signature(own)
        made.__annotations__ = {option.name: option.annotation for option in own}
        return command

    return give


_ENGINE = ("engine", "ray_address", "workers", "worker_cpus", "worker_gpus")


@_options("as_json", "push_to_hub", "nproc", "trust_remote_code", *_ENGINE)
def run(**given: Any) -> None:
    """Run all stages of a recipe, or go on where it was interrupted.

    corpus → externalize → fuse → train → evaluate → report; generate before all, where answers are
    to be generated. Finished work is kept: after an interruption, give the same command again.
    """
    _execute(None, **given)


@_options("trust_remote_code", "as_json")
def generate(**given: Any) -> None:
    """Have models answer the prompts of a recipe; what is written is kept, and read by `corpus`."""
    _execute(("generate",), **given)


@_options("trust_remote_code", "as_json")
def corpus(**given: Any) -> None:
    """Cut the corpus into blocks that every model reads."""
    _execute(("corpus",), **given)


@_options("trust_remote_code", "as_json", *_ENGINE)
def externalize(**given: Any) -> None:
    """Read each source's next-token distributions over the corpus."""
    _execute(("externalize",), **given)


@_options("trust_remote_code", "as_json")
def fuse(**given: Any) -> None:
    """Align, translate and fuse the distributions; no model, no GPU."""
    _execute(("fuse",), **given)


@_options("as_json", "push_to_hub", "nproc", "trust_remote_code")
def train(**given: Any) -> None:
    """Continue training the target on the fused distributions, and the CLM baseline."""
    _execute(("train",), **given)


def _push(pipeline: "Pipeline", repo: str) -> None:
    from fusellm.models.hub import push_model
    from fusellm.store.run_folder import FUSED, trained_folder

    folder = trained_folder(pipeline.run, FUSED)
    with Terminal(STDERR).start(f"uploading {folder}", 0, "files"):
        address = push_model(folder, repo, f"{pipeline.recipe.name}: fused by fusellm")
    STDERR.say(f"The fused model is at {address}")


def _show_results(runs: Sequence[Path], as_json: bool) -> None:
    """Print the results of a run, or of its rounds, and where report and model are."""
    from fusellm.stages.evaluate import read_results

    rounds = [read_results(run) for run in runs]
    run, results = runs[-1], rounds[-1]
    if as_json:
        told = [one.as_json() for one in rounds]
        print(json_text(told[0] if len(told) == 1 else {"rounds": told}))
        return
    show(results, STDOUT)
    if len(rounds) > 1:
        show_rounds(rounds, STDOUT)
    STDOUT.say(f"Report: {run / 'report' / 'index.html'}")
    STDOUT.say(f"The fused model: {run / 'train' / 'fused'}")
