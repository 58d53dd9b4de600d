"""All keys of a recipe on one page, made from the classes that check them."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fusellm.config import (
    CorpusSettings,
    EvaluationSettings,
    ExternalizeSettings,
    GeneratedSettings,
    LoraSettings,
    ModelSettings,
    Recipe,
    SourceSettings,
    TrainingSettings,
)
from fusellm.config.base import SettingsBlock
from fusellm.config.corpus import BuiltinDocuments, FileDocuments, HubDocuments
from fusellm.config.fusion import FusionSettings
from fusellm.config.objective import ObjectiveSettings

_INTRODUCTION = """\
# Recipe: all keys

Made by `fusellm schema --markdown` from the classes that check a recipe. `fusellm schema` alone is
their JSON schema, for editors; `fusellm init my.yaml` writes a commented recipe to start from. A
key that is not here is refused, with the nearest that is; under `training:` every name of
transformers' `TrainingArguments` is known as well. On a command line a key is given as
`--set objective.lambda=0.7`, of a list by its number: `--set sources.0.dtype=bfloat16`.
"""
_BLOCKS: Mapping[str, tuple[type[SettingsBlock], type[SettingsBlock] | None]] = {
    "": (Recipe, None),
    "target": (ModelSettings, None),
    "sources": (SourceSettings, ModelSettings),
    "corpus": (CorpusSettings, None),
    "corpus.documents, with `builtin:`": (BuiltinDocuments, None),
    "corpus.documents, with `hub:`": (HubDocuments, None),
    "corpus.documents, with `files:`": (FileDocuments, None),
    "corpus.documents, their `generated:`": (GeneratedSettings, None),
    "externalize": (ExternalizeSettings, None),
    "fusion": (FusionSettings, None),
    "objective": (ObjectiveSettings, None),
    "training": (TrainingSettings, None),
    "training.lora": (LoraSettings, None),
    "evaluation": (EvaluationSettings, None),
}
"""By place: the class, and the one whose keys it has besides and that are above already."""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def recipe_page() -> str:
    """All keys, as Markdown: what each is, its values and its default."""
    parts = [_INTRODUCTION]
    for place, (block, base) in _BLOCKS.items():
        heading = f"`{place}:`" if place and "," not in place else place or "The recipe itself"
        described = " ".join((block.__doc__ or "").split())
        if base is not None:
            described += " Each entry has the keys of `target:`, and besides"
        rows = _rows(block, set(base.model_fields) if base else set())
        table = "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows])
        parts.append(f"## {heading}\n\n{described}\n\n{table}\n")
    return "\n".join(parts)


def _rows(block: type[SettingsBlock], above: set[str]) -> Iterator[str]:
    schema = block.model_json_schema(by_alias=True)
    required = schema.get("required", ())
    names = {field.alias or name: name for name, field in block.model_fields.items()}
    for key, given in schema["properties"].items():
        if names[key] in above:
            continue
        default = "" if key in required else _default(given)
        told = given.get("description") or _of_block(given, schema)
        told = " ".join(told.split()).replace("<", "&lt;")
        told = re.sub(r"\(docs/(\w+\.md)\)", r"([\1](\1))", told)
        cells = (f"`{key}`", _values(given), default, told)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _of_block(given: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a block is, of a key that says nothing itself."""
    name = given.get("$ref", "").rpartition("/")[2]
    return str(schema.get("$defs", {}).get(name, {}).get("description", ""))


def _default(given: Mapping[str, Any]) -> str:
    made: Any = {"array": [], "object": {}}.get(given.get("type", ""))
    value = given.get("default", made)
    return "see below" if isinstance(value, dict) and value else f"`{json.dumps(value)}`"


def _values(given: Mapping[str, Any]) -> str:
    """What a key takes, in words.

    >>> _values({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]})
    'integer > 0, or null'
    """
    if "$ref" in given:
        return "a block"
    if "enum" in given or "const" in given:
        values = given.get("enum", [given.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    if "anyOf" in given:
        return ", or ".join(dict.fromkeys(_values(one) for one in given["anyOf"]))
    kind = given.get("type", "block")
    if kind == "array":
        return (
            f"list of {_values(given['items'])}" if "$ref" not in str(given) else "list of blocks"
        )
    named = {"string": "text", "boolean": "`true`, `false`", "object": "keys and values"}
    bounds = [f"{sign} {given[name]}" for name, sign in _BOUNDS.items() if name in given]
    return " ".join([named.get(kind, kind), ", ".join(bounds)]).strip()
