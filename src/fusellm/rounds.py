"""Rounds: models answer, the answers are read, fused and trained on, and what was trained answers.

    target ──▶ round-1 ──▶ round-1/train/fused ──▶ round-2 ──▶ round-2/train/fused ──▶ …

Each round is a run of its own, so that all that works on a run works on it.
"""

from pathlib import Path

from fusellm.config import Recipe
from fusellm.errors import StoreError
from fusellm.recipe_file import open_recipe
from fusellm.store.files import alone_in, make_folder, write_text
from fusellm.store.run_folder import FUSED, RECIPE, recipe_text, trained_folder


def rounds_of(recipe: Recipe, run: Path) -> list[tuple[Recipe, Path]]:
    """The runs that a recipe is: of each its recipe and its folder.

    A recipe of one round is itself. In a later round the target is the model that the round before
    has trained, and so is a source that is the target. Answers are sampled with other seeds.

    Args:
        recipe: with absolute paths.
        run: the folder of all rounds.
    """
    if recipe.rounds == 1:
        return [(recipe, run)]
    return [
        (_recipe_of(recipe, run, number), folder_of_round(run, number))
        for number in range(1, recipe.rounds + 1)
    ]


def folder_of_round(run: Path, number: int) -> Path:
    """The run of a round, by its number from 1."""
    return run / f"round-{number}"


def _recipe_of(recipe: Recipe, run: Path, number: int) -> Recipe:
    raw = recipe.model_dump(by_alias=True) | {
        "rounds": 1,
        "name": f"{recipe.name}-round-{number}",
    }
    for entry in recipe.corpus.generated:
        generated = raw["corpus"]["documents"][entry]["generated"]
        generated["seed"] = (generated["seed"] + number - 1) % 2**32
    if number > 1:
        trained = trained_folder(folder_of_round(run, number - 1), FUSED).absolute()
        own = recipe.target
        now = {"model": str(trained), "revision": None, "gguf_file": None, "tokenizer": None}
        raw["target"] |= now
        for source in raw["sources"]:
            same = (source["model"], source["revision"], source["gguf_file"])
            if same == (own.model, own.revision, own.gguf_file):
                source |= now
    return Recipe.model_validate(raw)


def write_recipe_of_rounds(recipe: Recipe, run: Path) -> None:
    """Keep the recipe of all rounds beside them, so that the folder can be gone on with.

    Raises:
        StoreError: the folder is a run of one round, or of fewer rounds than there are.
    """
    if recipe.rounds == 1:
        return
    if (run / RECIPE).exists() and open_recipe(run).rounds == 1:
        raise StoreError(
            f"{run} is a run of one round, and the recipe has {recipe.rounds}; give another folder "
            "with --out"
        )
    make_folder(run)
    with alone_in(run):
        write_text(run / RECIPE, recipe_text(recipe, run))
