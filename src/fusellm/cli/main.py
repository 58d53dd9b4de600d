"""The command line: `fusellm`, `python -m fusellm`. The only place that prints.

Heavy imports are made inside the commands, so that `--help` answers at once.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as RichTable

from fusellm.cli import engine as engines
from fusellm.cli.console import STDERR, STDOUT, Terminal, json_text
from fusellm.cli.ending import EXIT_CODES, debug_wanted
from fusellm.cli.ending import run as run_to_its_end
from fusellm.cli.evaluate import evaluate
from fusellm.cli.execute import execute, open_pipeline, open_recipe, run_of, show_results
from fusellm.cli.folder import clean, status
from fusellm.cli.launch import Nproc, parting
from fusellm.cli.options import (
    NO_CHANGES,
    Json,
    Out,
    PushToHub,
    RecipeOrRun,
    Redo,
    RunFolder,
    Set,
    TrustRemoteCode,
)
from fusellm.cli.store import store_app
from fusellm.cli.template import init
from fusellm.cli.tokenizers import tokenizers
from fusellm.cli.zoo import zoo_app
from fusellm.errors import StoreError
from fusellm.recipe_file import schema

app = typer.Typer(
    name="fusellm",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fuse the knowledge of several language models into one.\n\n"
        "`fusellm demo` shows it all in minutes, with no download. For models of your own: "
        "`fusellm init`, edit the recipe, `fusellm check`, `fusellm run`.\n\n"
        "Any command takes `--debug` (or the variable FUSELLM_DEBUG) to show where an error came "
        "from."
    ),
    epilog=EXIT_CODES,
)
app.add_typer(zoo_app, name="zoo")
app.add_typer(store_app, name="store")
app.command()(tokenizers)


def _say_version(wanted: bool) -> None:
    if wanted:
        STDOUT.say(f"fusellm {version('fusellm')}")
        raise typer.Exit


@app.callback()
def fusellm(
    wanted: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Say which version this is."
        ),
    ] = False,
) -> None:
    pass


Full = Annotated[
    bool, typer.Option("--full", help="More text, two epochs: the run whose figures are published.")
]


@app.command()
def demo(
    full: Full = False,
    out: Out = None,
    changes: Set = NO_CHANGES,
    redo: Redo = False,
    as_json: Json = False,
) -> None:
    """Fuse the three small models that come with fusellm; no download, a few minutes.

    Runs the recipe recipes/demo.yaml on text of the installed Python packages, and ends in a table
    and a report page. --full runs recipes/demo-full.yaml: more text, a quarter of an hour.
    """
    execute(_stages(), _demo_recipe(full), out, changes, redo, as_json)


@app.command()
def run(
    recipe: RecipeOrRun,
    out: Out = None,
    changes: Set = NO_CHANGES,
    redo: Redo = False,
    as_json: Json = False,
    push_to_hub: PushToHub = None,
    nproc: Nproc = 1,
    trust_remote_code: TrustRemoteCode = False,
    engine: engines.Engine = engines.EngineName.LOCAL,
    ray_address: engines.RayAddress = None,
    workers: engines.Workers = None,
    worker_cpus: engines.WorkerCpus = None,
    worker_gpus: engines.WorkerGpus = None,
) -> None:
    """Run all stages of a recipe, or go on where it was interrupted.

    corpus → externalize → fuse → train → evaluate → report. Finished work is kept: after an
    interruption, give the same command again.
    """
    settings = engines.settings_of(engine, ray_address, workers, worker_cpus, worker_gpus)
    execute(
        _stages(),
        recipe,
        out,
        changes,
        redo,
        as_json,
        settings,
        push_to_hub,
        nproc,
        trust_remote_code,
    )


def _stage_command(stage: str, text: str) -> None:
    def command(
        recipe: RecipeOrRun,
        out: Out = None,
        changes: Set = NO_CHANGES,
        redo: Redo = False,
        trust_remote_code: TrustRemoteCode = False,
        as_json: Json = False,
    ) -> None:
        execute((stage,), recipe, out, changes, redo, as_json, trusted=trust_remote_code)

    app.command(stage, help=text)(command)


_stage_command("corpus", "Cut the corpus into blocks that every model reads.")


@app.command()
def externalize(
    recipe: RecipeOrRun,
    out: Out = None,
    changes: Set = NO_CHANGES,
    redo: Redo = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    engine: engines.Engine = engines.EngineName.LOCAL,
    ray_address: engines.RayAddress = None,
    workers: engines.Workers = None,
    worker_cpus: engines.WorkerCpus = None,
    worker_gpus: engines.WorkerGpus = None,
) -> None:
    """Read each source's next-token distributions over the corpus."""
    settings = engines.settings_of(engine, ray_address, workers, worker_cpus, worker_gpus)
    execute(
        ("externalize",),
        recipe,
        out,
        changes,
        redo,
        as_json,
        settings,
        trusted=trust_remote_code,
    )


_stage_command("fuse", "Align, translate and fuse the distributions; no model, no GPU.")


@app.command("train")
def train_command(
    recipe: RecipeOrRun,
    out: Out = None,
    changes: Set = NO_CHANGES,
    redo: Redo = False,
    as_json: Json = False,
    push_to_hub: PushToHub = None,
    nproc: Nproc = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue training the target on the fused distributions, and the CLM baseline."""
    execute(
        ("train",),
        recipe,
        out,
        changes,
        redo,
        as_json,
        push_to=push_to_hub,
        nproc=nproc,
        trusted=trust_remote_code,
    )


app.command()(evaluate)


@app.command()
def report(recipe: RecipeOrRun, out: Out = None, as_json: Json = False) -> None:
    """Write results.json, results.csv and the report page of a run, from its folder alone."""
    from fusellm.stages.report.write import write_report

    run = run_of(recipe, out, open_recipe(recipe, NO_CHANGES))
    write_report(run)
    show_results(run, as_json)


@app.command()
def check(
    recipe: RecipeOrRun,
    out: Out = None,
    changes: Set = NO_CHANGES,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find every model, tokenizer and file of a recipe, before any weight is loaded."""
    found = open_pipeline(recipe, out, changes, trusted=trust_remote_code).check()
    if as_json:
        print(json_text(found))
        return
    table = RichTable(title=f"{recipe}: all found")
    for column in ("name", "model", "architecture", "tokens", "context", "every block fits"):
        table.add_column(column)
    for name, model in found["models"].items():
        context = str(model["context_tokens"] or "any")
        fits = "yes" if model["every_block_fits"] else "known after `fusellm corpus`"
        place = "/".join(part for part in (model["model"], model.get("gguf_file")) if part)
        table.add_row(name, place, model["architecture"], str(model["tokens"]), context, fits)
    STDOUT.print(table)
    for name, model in found["models"].items():
        STDOUT.say(_tried(name, model))
    projected, free = found["projected_store_bytes"], found["free_bytes"]
    size = "unknown (the corpus has no budget)" if projected is None else _gigabytes(projected)
    STDOUT.print(f"Distributions on disk: about {size}; free: {_gigabytes(free)}")
    if projected is not None and projected > free:
        raise StoreError(
            f"the run needs about {_gigabytes(projected)} and {found['run']} has "
            f"{_gigabytes(free)} free; give another --out, or lower corpus.train_bytes or "
            "externalize.draws"
        )


@app.command("inspect")
def inspect_command(
    run: RunFolder,
    block: Annotated[int, typer.Option("--block", metavar="N", help="Which block, from 0.")],
    position: Annotated[
        int | None,
        typer.Option(
            "--position",
            metavar="P",
            help="Look closely at what comes after the target's token P, from 0; an instructive "
            "one if not given.",
        ),
    ] = None,
    part: Annotated[str, typer.Option("--part", help="Sources read train only.")] = "train",
    as_json: Json = False,
) -> None:
    """Show one block of a fused run: every model's tokens, and what became of a distribution.

    The target's tokens stand over each source's, so that equal boundaries are in one column. Marks
    say which source won at each of the target's positions and how it cuts what comes next. Below,
    one position closely: what each source says, what that becomes in the target's tokens, and the
    fused distribution.

    Example: `fusellm inspect runs/demo --block 40`, then with `--position 12` for the position
    that is numbered 12.
    """
    from fusellm.cli.inspect import show
    from fusellm.inspection import PART, inspect_block
    from fusellm.models.readers import readers_of

    if not run.is_dir():
        raise StoreError(f"{run} is not a run: it is no folder; give the folder of a run")
    if part != PART:
        raise StoreError(
            f"--part {part} has no distributions: sources read the part {PART} only; leave --part "
            "away"
        )
    recipe = open_recipe(run, NO_CHANGES)
    found = inspect_block(recipe, run, readers_of(recipe), block, position, Terminal(STDERR))
    show(str(run), recipe, found, as_json, STDOUT)


app.command()(init)
app.command()(status)
app.command()(clean)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON schema of a recipe, for editors."""
    print(json_text(schema(), indent=1))


def _stages() -> tuple[str, ...]:
    from fusellm.store.run_folder import STAGES

    return STAGES


def _demo_recipe(full: bool) -> Path:
    return Path(__file__).parent.parent / "recipes" / ("demo-full.yaml" if full else "demo.yaml")


def _tried(name: str, model: dict[str, Any]) -> str:
    """What a model's tokenizer made of some blocks of the corpus."""
    blocks, before = model["blocks_tried"], " ".join(model["put_before"]) or "nothing"
    read = f"reads {blocks - model['blocks_changed']:,} of {blocks:,} blocks that were tried"
    return f"{name}: {read if blocks else 'no block was tried'}; puts {before} before each"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


@app.command("help", hidden=True)
def help_command(
    context: typer.Context, command: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """Show help, of a command if one is named."""
    app(args=[*(command or []), "--help"], prog_name=context.find_root().info_name)


@parting()
def main() -> None:
    """Run the command line; faults that a user can mend are one line on stderr."""
    arguments = sys.argv[1:]
    debug = debug_wanted(arguments)
    set_up_libraries()
    run_to_its_end(lambda: app(args=arguments), debug)


def set_up_libraries() -> None:
    """Set what libraries read from the environment when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Arrow's own allocator keeps what its threads have freed: 15 to 30 MB more after 50 shards.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages, where there are any
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
