"""The recipe: one YAML file says everything about a run.

Unknown keys are refused with the nearest known one, and every error gives its path in the file.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fusellm.config import (
    EvaluationSettings,
    ModelSettings,
    Recipe,
    model_block,
    source_block,
)
from fusellm.config.yaml_text import read_yaml
from fusellm.errors import ArgumentError, RecipeError, StoreError

Block = TypeVar("Block", bound=BaseModel)

RECIPE = "recipe.yaml"
"""The recipe's name in the folder of a run."""

_SHOWN_CHARACTERS = 80
_YAML_KINDS: dict[Any, str] = {list: "list", str: "text"}
_SECRET_KEY = re.compile(r"(?i)(token|api_?key|password|secret)$")
_SECRET_VALUE = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}|://[^/@\s]+:[^/@\s]+@")


def load_recipe(path: str | PathLike[str], changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: `a.b=value` settings that go over the file's, values in YAML.

    Raises:
        RecipeError: the file is missing, not YAML, or not a recipe; every fault is named with its
            path in the file.
    """
    path = Path(path)
    raw = _mapping_of(path)
    for change in changes:
        _apply(_spelled_out(raw), change)
    return check_recipe(raw, str(path))


def checked_file(path: Path, kind: type[Block], what: str) -> Block:
    """A file that holds one block of settings and is no recipe.

    Args:
        what: it is called, "study".

    Raises:
        RecipeError: as `load_recipe` does.
    """
    raw = _mapping_of(path, what)
    _require_no_secret(raw, str(path))
    try:
        return kind.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        known = [_keys_of(kind, fault["loc"][:-1]) for fault in error.errors()]
        told = zip(error.errors(), known, strict=True)
        faults = "; ".join(_explain(fault, False, keys) for fault, keys in told)
        raise RecipeError(f"{path}: {faults}") from None


def _keys_of(kind: type[BaseModel], steps: Sequence[Any]) -> list[str]:
    """The keys of a block, or of a block in a mapping of blocks inside it."""
    if not steps:
        return list(kind.model_fields)
    field = kind.model_fields.get(str(steps[0]))
    kinds = get_args(field.annotation) if field is not None else ()
    inner = [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]
    return _keys_of(inner[0], steps[2:]) if inner else []


def _mapping_of(path: Path, what: str | None = None) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        RecipeError: it cannot be read, or has something else.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if what is not None:
            raise RecipeError(f"there is no {what} {path}; check the path") from None
        if path.suffix not in (".yaml", ".yml"):
            raise RecipeError(
                f"there is no {path}, neither as a recipe nor as a run; check the path. `fusellm "
                "init my-run.yaml` writes a recipe to start from"
            ) from None
        raise RecipeError(
            f"there is no recipe {path}; `fusellm init {path}` writes a commented one"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    except RecipeError as error:
        raise RecipeError(f"{path}, {error}") from None
    if not isinstance(raw, dict):
        given = "is empty" if raw is None else f"is a {_YAML_KINDS.get(type(raw), 'single value')}"
        raise RecipeError(
            f"{path} must have keys with values, like name: my-run, and {given}; `fusellm init` "
            "writes an example"
        )
    return raw


def open_recipe(place: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a file or of a run's folder, with its local paths made absolute.

    Raises:
        RecipeError: as `load_recipe` does.
        StoreError: the folder is no run.
    """
    path = place / RECIPE if place.is_dir() else place
    if place.is_dir() and not path.exists():
        raise StoreError(f"{place} is not a run: it has no {RECIPE}; give a recipe instead")
    return resolve_paths(load_recipe(path, changes), path.parent)


def folder_of_run(place: Path, recipe: Recipe) -> Path:
    """The folder of the run of a recipe that was opened at a place, if no other is named."""
    return place if place.is_dir() else Path("runs") / recipe.name


def check_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Check a recipe that is already a mapping.

    Raises:
        RecipeError: with every fault and its path; or it holds a secret.
    """
    _require_no_secret(raw, where)
    given = {key: value for key, value in raw.items() if value is not None}  # `fusion:` and no more
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise RecipeError(f"{where}: {faults}") from None


def checked_settings(kind: type[Block], given: Mapping[str, Any]) -> Block:
    """A block of settings from what a program gives.

    Raises:
        ArgumentError: a name or a value is wrong; every fault is named.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ArgumentError("; ".join(_explain(fault) for fault in error.errors())) from None


def changed_evaluation(
    settings: EvaluationSettings, changes: Mapping[str, Any]
) -> EvaluationSettings:
    """A recipe's `evaluation:` with some keys changed.

    Raises:
        RecipeError: the changed block has no meaning.
    """
    try:
        return EvaluationSettings.model_validate(settings.model_dump() | dict(changes))
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(fault) for fault in error.errors())) from None


def model_settings(name: str, changes: Sequence[str] = ()) -> ModelSettings:
    """How a model that no recipe names is loaded.

    Args:
        changes: `key=value` settings of a model, as in a recipe's `target:`.

    Raises:
        RecipeError: a key is unknown, or a value is wrong.
    """
    raw: dict[str, Any] = {"target": {"model": name}}
    for change in changes:
        _apply(raw["target"], change)
    try:
        return ModelSettings.model_validate(raw["target"])
    except ValidationError as error:
        faults = ({**fault, "loc": ("target", *fault["loc"])} for fault in error.errors())
        told = "; ".join(_explain(fault, False).replace("target.", "", 1) for fault in faults)
        raise RecipeError(f"--set: {told}") from None


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def _require_no_secret(value: Any, where: str, path: str = "") -> None:
    """Refuse access tokens: a recipe is copied into the run, its report and a model's card."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner:
        place = f"{path}.{key}" if path else str(key)
        named = isinstance(one, str) and _SECRET_KEY.search(str(key))
        if named or (isinstance(one, str) and _SECRET_VALUE.search(one)):
            raise RecipeError(
                f"{where}: {place} holds an access token, which would be copied into the run, its "
                "report and the model's card; take it out, and set HF_TOKEN (or what its service "
                "reads) in the environment, or log in with `hf auth login`"
            )
        _require_no_secret(one, where, place)


def _spelled_out(raw: dict[str, Any]) -> dict[str, Any]:
    """The same recipe, with models that are written as text alone as blocks."""
    raw["target"] = model_block(raw.get("target"))
    if isinstance(raw.get("sources"), list):
        raw["sources"] = [source_block(source) for source in raw["sources"]]
    return raw


def _apply(raw: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {change!r} must be KEY=VALUE, like objective.lambda=0.7")
    *parents, last = path.strip().split(".")
    node: Any = raw
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
            continue
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}
        if isinstance(node, list):
            raise _outside(change, node)
        node = node.get(parent)
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {change!r}: {parent!r} is not a block of the recipe")
    try:
        value = read_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"--set {change!r}: {error}") from None
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise _outside(change, node)
        node[int(last)] = value
    else:
        node[last] = value


def _outside(change: str, entries: list[Any]) -> RecipeError:
    return RecipeError(
        f"--set {change!r}: the list has the entries 0 to {len(entries) - 1}; name one by its "
        "number, or set the whole list"
    )


def _explain(fault: Any, in_recipe: bool = True, keys: Sequence[str] | None = None) -> str:
    """A fault in one line.

    Args:
        keys: that there are at its place, of what is no recipe.
    """
    steps, kind = list(fault["loc"]), None
    if steps[:2] == ["corpus", "documents"] and len(steps) > 3:
        kind = steps.pop(3)  # pydantic's tag of the union, which is not in the file
    place = ".".join(str(step) for step in steps)
    if fault["type"] == "extra_forbidden":
        key = str(steps[-1])
        known = list(keys) if keys is not None else _known_keys(steps[:-1], kind)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if keys is None and steps[:-1] == ["fusion"] and key in _known_keys(["objective"], None):
            near = [f"objective.{key}, which train reads"]  # it was here once
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known) or 'none'}"
        outer = _further_out(steps) if in_recipe else None
        hint = hint if outer is None else f"; it belongs further out, as {outer}"
        return f"unknown key {place}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "value_error":
        return message if not place or message.startswith(f"{place}.") else f"{place}: {message}"
    if fault["type"] == "string_pattern_mismatch":
        message = "only letters, digits and . _ - may be in it, the first a letter or digit"
    if fault["type"] == "too_short":
        message = "at least one is needed"
    given = "nothing" if fault["input"] is None else repr(fault["input"])
    given = given if len(given) <= _SHOWN_CHARACTERS else given[:_SHOWN_CHARACTERS] + "…"
    cure = ""
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        kind = "yes or no" if isinstance(fault["input"], bool) else "a number"
        cure = f"; YAML reads it as {kind}: put it in quotes"
    if fault["type"] == "int_parsing":
        message, cure = "a whole number is needed", "; write it in digits, like 10_000_000"
    return f"{place}: {message}, got {given}{cure}"


def _further_out(steps: Sequence[Any]) -> str | None:
    """The place of a key of this name in a block around the one that it stands in."""
    *inside, key = steps
    for depth in range(len(inside) - 1, -1, -1):
        around = inside[:depth]
        if not isinstance(inside[depth], int) and key in _known_keys(around, None):
            return ".".join(str(step) for step in (*around, key))
    return None


def _known_keys(steps: Sequence[Any], kind: str | None) -> list[str]:
    """Keys of the block at `steps`; of a union's blocks, those of the one that has key `kind`."""
    blocks: list[type[BaseModel]] = [Recipe]
    for step in steps:
        if isinstance(step, int):
            continue
        blocks = [
            inner
            for block in blocks
            for name, field in block.model_fields.items()
            if (field.alias or name) == step
            for inner in _blocks_in(field.annotation)
        ]
    of_kind = [block for block in blocks if kind in block.model_fields]  # none within an entry
    return [
        field.alias or name
        for block in of_kind or blocks
        for name, field in block.model_fields.items()
    ]


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks_in(part)]


_PATHS_OF_MODELS = ("model", "tokenizer", "chat_template")


def resolve_paths(recipe: Recipe, recipe_folder: Path) -> Recipe:
    """The recipe with its local paths made absolute, so that a run's copy of it finds them too."""

    def place(name: str) -> str:
        if "{{" in name or "{%" in name:  # a chat template itself
            return name
        local = recipe_folder / Path(name).expanduser()
        is_local = bool(name) and local.exists() and not name.startswith("zoo/")
        return str(local.resolve()) if is_local else name

    def model(block: dict[str, Any]) -> dict[str, Any]:
        given = {key: block[key] for key in _PATHS_OF_MODELS if block[key] is not None}
        return block | {key: place(name) for key, name in given.items()}

    def documents(entry: dict[str, Any]) -> dict[str, Any]:
        if "files" not in entry:
            return entry
        patterns = [entry["files"]] if isinstance(entry["files"], str) else entry["files"]
        base = recipe_folder.resolve()
        return entry | {"files": [str(base / Path(pattern).expanduser()) for pattern in patterns]}

    def absolute(given: Any) -> Any:
        if isinstance(given, list):
            return [absolute(one) for one in given]
        return given and str(recipe_folder.resolve() / Path(given).expanduser())

    raw = recipe.model_dump(by_alias=True)
    raw["target"] = model(raw["target"])
    raw["sources"] = [model(source) for source in raw["sources"]]
    for key in ("data_dir", "toolchains"):
        raw["evaluation"][key] = absolute(raw["evaluation"][key])
    raw["corpus"]["documents"] = [documents(entry) for entry in raw["corpus"]["documents"]]
    return Recipe.model_validate(raw)
