"""Why a tokenizer could not be loaded, told from its files: which they are and what reads them."""

import base64
import binascii
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from fusellm.errors import ModelError
from fusellm.models.places import not_found
from fusellm.models.remote_code import not_trusted
from fusellm.models.weights import require_content
from fusellm.store.files import from_json

_LAYOUT = "tokenizer.json"
# Files of tokenizers that have no tokenizer.json.
_TABLES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_REASON_CHARACTERS = 200


def why_not_loaded(name: str, place: str, revision: str | None, error: Exception) -> str:
    """What is wrong with a tokenizer, with the cure.

    Args:
        name: what it is called.
        place, revision: folder, or hub name with a commit; looked up in the local cache.
        error: what transformers raised.
    """
    untrusted = not_trusted(error, f"the tokenizer of {name}")
    if untrusted is not None:
        return untrusted
    fault = fault_of_files(name, place, revision)
    if fault is not None:
        return fault
    reason = " ".join(str(error).split())[:_REASON_CHARACTERS]
    if not Path(place).is_dir():
        return not_found(f"tokenizer {name}", error)
    held = ", ".join(sorted(path.name for path in Path(place).iterdir())[:6]) or "nothing"
    return (
        f"{name} holds no tokenizer that can be loaded (it holds: {held}); give a folder with a "
        f"{_LAYOUT}, for a model as `tokenizer:`: {reason}"
    )


def fault_of_files(name: str, place: str, revision: str | None) -> str | None:
    """What is wrong with a tokenizer's files, or missing to read them; None for nothing.

    Args:
        name, place, revision: as `why_not_loaded` takes them.
    """
    layout = _file(place, revision, _LAYOUT)
    if layout is not None:
        return _fault_of_layout(name, layout)
    tables = (_file(place, revision, table) for table in _TABLES)
    table = next((path for path in tables if path is not None), None)
    return None if table is None else _fault_of_table(name, table)


def _file(place: str, revision: str | None, name: str) -> Path | None:
    if Path(place).is_dir():
        path = Path(place, name)
        return path if path.is_file() else None
    cached = try_to_load_from_cache(place, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _fault_of_layout(name: str, path: Path) -> str | None:
    """What is wrong with a tokenizer.json; None where the library reads it."""
    try:
        require_content(name, path)
        layout = from_json(path.read_text(encoding="utf-8"))
    except ModelError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"the {_LAYOUT} of {name} is no JSON ({error}); fetch it again"
    reason = _refusal(layout)
    if reason is None:
        return None
    part = next((part for part in _PARTS if _refusal(_alone(layout, part)) is not None), "model")
    kind = layout[part].get("type") if isinstance(layout.get(part), dict) else None
    return (
        f"the installed tokenizers {version('tokenizers')} cannot read the {_LAYOUT} of {name}, "
        f"its {part}{f' ({kind})' if kind else ''}: {reason[:_REASON_CHARACTERS]}. It is of a "
        "newer version, or damaged: pip install --upgrade tokenizers transformers, or fetch it "
        "again"
    )


def _alone(layout: Any, part: str) -> dict[str, Any]:
    """A tokenizer with nothing but one part of another's."""
    return {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}} | {
        part: layout.get(part) if isinstance(layout, dict) else None
    }


def _refusal(layout: Any) -> str | None:
    """What the library says of a tokenizer.json; None if it reads it."""
    try:
        Tokenizer.from_str(json.dumps(layout))
    except Exception as error:  # the library, in Rust, raises nothing narrower
        return " ".join(str(error).split())
    return None


def _fault_of_table(name: str, path: Path) -> str | None:
    """Which package a tokenizer without a tokenizer.json needs; None where it is installed."""
    try:
        require_content(name, path)
    except ModelError as error:
        return str(error)
    alone = f"{name} has its tokenizer as {path.name} alone, without a {_LAYOUT}"
    if _is_tiktoken(path):
        if _installed("tiktoken"):
            return None
        return f"{alone}: a table of tiktoken, which needs that package: pip install tiktoken"
    if _installed("sentencepiece") and _installed("google.protobuf"):
        return None
    return (
        f"{alone}: a SentencePiece model, which needs the packages sentencepiece and protobuf: "
        "pip install 'fusellm[sentencepiece]'"
    )


def _is_tiktoken(path: Path) -> bool:
    """Whether a file has a token in base64 and its rank in each line, as tiktoken's have."""
    with path.open("rb") as file:
        token, _, rank = file.readline(1024).partition(b" ")
    try:
        base64.b64decode(token, validate=True)
    except binascii.Error:
        return False
    return rank.strip().isdigit()


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of is not there
        return False
