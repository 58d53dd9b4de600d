"""A recipe's file as people and others write it: nothing is lost or grows, no secret stays."""

import random
from pathlib import Path

import pytest

from fusellm.config import Recipe
from fusellm.config.page import recipe_page
from fusellm.config.yaml_text import read_yaml
from fusellm.errors import RecipeError
from fusellm.recipe_file import check_recipe, load_recipe, schema

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LEAST = """name: least
target: zoo/prose
sources: [zoo/python]
corpus: {documents: [{builtin: prose}]}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


def load(folder: Path, text: str, *changes: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, changes)


def fault_of(folder: Path, text: str, *changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            LEAST + "training: {max_steps: 2}\nseed: 1\ntraining: {learning_rate: 1e-4}\n",
            "key 'training' is written twice, in line 5 and in line 7; keep one of them",
        ),
        (
            LEAST + "training:\n  max_steps: 2\n  lora:\n    r: 4\n    r: 8\n",
            "key 'r' is written twice, in line 8 and in line 9; keep one of them",
        ),
        (
            LEAST + "training: {max_steps: 2, 'max_steps': 3}\n",
            "key 'max_steps' is written twice, in line 5 and in line 5",
        ),
    ],
)
def test_a_key_is_written_once(tmp_path: Path, text: str, part: str) -> None:
    assert part in fault_of(tmp_path, text)
    with pytest.raises(RecipeError, match=r"--set 'training=.*': key 'seed' is"):
        load(tmp_path, LEAST, "training={seed: 1, seed: 2}")


def test_what_is_merged_into_a_block_may_be_written_anew(tmp_path: Path) -> None:
    text = (
        "name: merged\ntarget: &it {model: zoo/prose, dtype: bfloat16}\n"
        "sources:\n  - {<<: *it, name: a}\n  - {<<: *it, name: b, dtype: float32}\n"
        "corpus: {documents: [{builtin: prose}]}\n"
    )
    recipe = load(tmp_path, text)
    assert [source.dtype for source in recipe.sources] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "more than 10,000 values"),
        ("name: " + "[" * 3000, "nested more than 20 deep"),
        ("name: " + "{a: " * 3000, "nested more than 20 deep"),
        ("- " * 3000, "nested more than 20 deep"),
        ("name: &a [*a]", "an alias inside of what it stands for"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("name: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("name: \x01", "not YAML"),
        ("name: 0x_", "not YAML"),
    ],
)
def test_a_file_that_is_made_to_harm_is_one_line(tmp_path: Path, text: str, part: str) -> None:
    assert part in fault_of(tmp_path, text)


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"is not UTF-8 \(byte 9\)"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_model_may_be_written_as_text_alone(tmp_path: Path) -> None:
    recipe = load(tmp_path, LEAST, "target.dtype=bfloat16", "sources.0.dtype=float16")
    assert (recipe.target.model, recipe.target.dtype) == ("zoo/prose", "bfloat16")
    (source,) = recipe.sources
    assert (source.name, source.model, source.dtype) == ("python", "zoo/python", "float16")
    assert load(tmp_path, LEAST, "target=zoo/cpp").target.model == "zoo/cpp"
    twice = LEAST.replace("[zoo/python]", "[a/same, b/same]")
    assert "two are named 'same'" in fault_of(tmp_path, twice)
    assert {"type": "string"} in schema()["properties"]["target"]["anyOf"]


@pytest.mark.parametrize(
    ("name", "part"), [("2024", "a number: put it in quotes"), ("no", "put it in quotes")]
)
def test_a_text_that_yaml_reads_otherwise(tmp_path: Path, name: str, part: str) -> None:
    assert part in fault_of(tmp_path, LEAST.replace("least", name))
    assert load(tmp_path, LEAST.replace("least", f"'{name}'")).name == name
    assert load(tmp_path, LEAST.replace("least", "2026-01-31")).name == "2026-01-31"


@pytest.mark.parametrize(
    "change",
    [
        "training.hub_token=hf_short",
        "training.clm={push_to_hub_token: anything}",
        "training.run_name=hf_abcdefghijklmnopqrstuvwxyz",
        "evaluation.data_dir=https://me:hunter2@example.org/data",
        "externalize.api_key=x",
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, change: str) -> None:
    fault = fault_of(tmp_path, LEAST, change)
    assert "holds an access token" in fault
    assert "hf auth login" in fault
    assert not any(secret in fault for secret in ("hf_short", "anything", "hf_abc", "hunter2"))


def test_a_wrong_value_is_shown_in_part(tmp_path: Path) -> None:
    assert len(fault_of(tmp_path, LEAST, f"seed=[{', '.join(['1'] * 900)}]")) < 250


def test_mutations_of_recipes_are_one_line_or_right() -> None:
    """500 changes of single characters, lines and values."""
    rng = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))]
    faults = [_fault(_mutated(rng.choice(texts), rng)) for _ in range(500)]
    told = [fault for fault in faults if fault is not None]
    assert 100 < len(told) < 500
    assert [fault for fault in told if "\n" in fault or len(fault) > 2000] == []


def _fault(text: str) -> str | None:
    try:
        raw = read_yaml(text)
        if isinstance(raw, dict):
            check_recipe(raw, "mutated")
    except RecipeError as error:
        return str(error)
    return None


def _mutated(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        n = rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            lines.insert(n, rng.choice(lines))
        elif kind == 1:
            del lines[n]
        elif kind == 2:
            at = rng.randrange(len(lines[n]))
            sign = rng.choice("[]{}:,&*!|>'\"%@`#-? \t\n\x00\x1b\u202e9e.~")
            lines[n] = lines[n][:at] + sign + lines[n][at + 1 :]
        elif kind == 3:
            key, colon, _ = lines[n].partition(":")
            value = rng.choice(
                ["[]", "{}", "null", "-1", "1e999", ".nan", "no", "x" * 300, "[[1]]"]
            )
            lines[n] = f"{key}{colon} {value}\n"
        else:
            lines[n] = "  " * rng.randint(0, 3) + lines[n].lstrip()
    return "".join(lines)


def test_the_page_of_all_keys_is_what_the_code_says() -> None:
    page = Path(__file__).parents[1] / "docs" / "recipe.md"
    again = "fusellm schema --markdown > docs/recipe.md"
    assert page.read_text(encoding="utf-8") == recipe_page() + "\n", again


def test_every_key_of_every_block_is_on_the_page() -> None:
    page, blocks = recipe_page(), [schema(), *schema()["$defs"].values()]
    keys = {key for block in blocks for key in block.get("properties", {})}
    assert {key for key in keys if f"| `{key}` |" not in page} == set()
    assert "see below" in page
    assert "&lt;sop>" in page
