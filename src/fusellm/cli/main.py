"""The command line: `fusellm`, `python -m fusellm`. The only place that prints.

Heavy imports are made inside the commands, so that `--help` answers at once.
"""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from fusellm.cli.console import STDOUT, Terminal, json_text
from fusellm.cli.doctor import doctor
from fusellm.cli.ending import EXIT_CODES, debug_wanted, quiet_wanted
from fusellm.cli.ending import run as run_to_its_end
from fusellm.cli.evaluate import evaluate
from fusellm.cli.init import init
from fusellm.cli.inspect import inspect
from fusellm.cli.launch import parting
from fusellm.cli.merge import merge
from fusellm.cli.plan import plan
from fusellm.cli.run import check, corpus, demo, externalize, fuse, generate, report, run, train
from fusellm.cli.status import clean, status
from fusellm.cli.store import store_app
from fusellm.cli.study import study
from fusellm.cli.tokenizers import tokenizers
from fusellm.cli.view import view
from fusellm.cli.zoo import zoo_app
from fusellm.config.page import recipe_page
from fusellm.recipe_file import schema as schema_of_recipes

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
        "from, and `--quiet` (or FUSELLM_QUIET) to leave out bars and messages. NO_COLOR leaves "
        "out colours."
    ),
    epilog=EXIT_CODES,
)
app.add_typer(zoo_app, name="zoo")
app.add_typer(store_app, name="store")


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


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All keys as a page to read, docs/recipe.md.")
    ] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors; or all its keys, for people."""
    print(recipe_page() if markdown else json_text(schema_of_recipes(), indent=1))


_RUNS = (demo, run, generate, corpus, externalize, fuse, train, evaluate, report)
_OTHERS = (check, inspect, view, init, status, clean, doctor, schema)
for _command in (tokenizers, plan, *_RUNS, study, merge, *_OTHERS):
    app.command()(_command)  # in the order of `fusellm --help`


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
    Terminal.is_quiet = quiet_wanted(arguments)
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
