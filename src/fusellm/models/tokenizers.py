"""Finding and loading a tokenizer that a user names, and whether it fits a model's head."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusellm.errors import ModelError
from fusellm.models.gguf import SUFFIX, read_header, require_gguf
from fusellm.models.gguf_tokenizer import tokenizer_of
from fusellm.models.places import looks_local, zoo_folder
from fusellm.models.tokenizer_faults import fault_of_files, why_not_loaded
from fusellm.store.files import from_json

# Settings by which transformers builds a template of its own as it loads a tokenizer.
_BUILD_TEMPLATES = ("add_bos_token", "add_eos_token")


def tokenizer_at(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a GGUF file, a hub name or zoo/NAME.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    if name.endswith(SUFFIX) and Path(name).expanduser().is_file():
        require_gguf(name)
        return tokenizer_of(read_header(Path(name).expanduser()))
    loaded = read_tokenizer(name, _place(name), None, trust_remote_code)
    loaded.name_or_path = name  # what an error calls it
    return loaded


def read_tokenizer(
    name: str, place: str, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a repository of the hub.

    Args:
        name: what it is called.
        place, revision: folder, or hub name with a commit.

    Raises:
        ModelError: there is none, or it cannot be loaded; the message says what would load it.
    """
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower
        raise ModelError(why_not_loaded(name, place, revision, error)) from error
    if set(loaded.get_vocab().values()) <= loaded.added_tokens_decoder.keys():
        raise ModelError(
            fault_of_files(name, place, revision)  # transformers 5.17 makes an empty one then too
            or f"{name} has no tokenizer: transformers makes one without any tokens of text for "
            "it. Fetch its tokenizer.json, or name another model's as `tokenizer:`"
        )
    return loaded


def _place(name: str) -> str:
    if name.startswith("zoo/"):
        return str(zoo_folder(name.removeprefix("zoo/")))
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelError(f"{name} is a file; give the folder that it is in")
    if not folder.is_dir() and (looks_local(name) or name.endswith(SUFFIX)):
        raise ModelError(f"there is no folder {name}; check the path")
    return str(folder) if folder.is_dir() else name


def put_before(model: str, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[str]) -> None:
    """Let a tokenizer put these tokens before every text, and nothing after it.

    It keeps to that when it is saved, so that a trained model is used as it was trained.

    Args:
        model: what the recipe calls it.

    Raises:
        ModelError: there is no such token, or the tokenizer is written in Python.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"prefix of {model}: its tokenizer is written in Python, where what is put before a "
            "text is part of its code; leave prefix out, or name a fast tokenizer (`tokenizer:`)"
        )
    known = tokenizer.get_vocab()
    unknown = [token for token in prefix if token not in known]
    if unknown:
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        raise ModelError(
            f"prefix of {model}: its tokenizer has no token {unknown[0]!r}; special tokens that it "
            f"has: {', '.join(special[:8]) or 'none'}"
        )
    whole = {"id": "prefix", "ids": [known[token] for token in prefix], "tokens": list(prefix)}
    before = "prefix " if prefix else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A", pair=f"{before}$A $B:1", special_tokens=[whole] if prefix else []
    )
    for name in _BUILD_TEMPLATES:
        tokenizer.init_kwargs.pop(name, None)


def rows_beside(name: str) -> int | None:
    """Rows of the head of the model that is in the same folder or GGUF file; None without one."""
    path = Path(name).expanduser()
    if path.is_file():
        return read_header(path).rows
    try:
        config = from_json((Path(_place(name)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = config.get("text_config") or config
    rows = text.get("vocab_size")
    return rows if isinstance(rows, int) else None


def require_rows(model: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Check that a head has a row for every token of a text, and for the one that ends it.

    Any other special token may lie beyond, for no text has it: Gemma 3's models without vision have
    no row for the token of an image, and many copies of Llama 2 none for a `<pad>`.

    Args:
        model: what the recipe calls it.
        rows: of the head.

    Raises:
        ModelError: a token has none; the message has the cure.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
    beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
    if tokenizer.eos_token in beyond:
        raise ModelError(
            f"{model} has {rows} rows in its head, and none for the token that ends a text, "
            f"{tokenizer.eos_token} ({beyond[tokenizer.eos_token]}); set eos_token in its "
            "tokenizer_config.json to the one that it was trained with, or resize its embeddings"
        )
    ordinary = [token for token, id_ in beyond.items() if id_ not in special]
    if ordinary:
        raise ModelError(
            f"{model} has {rows} rows in its head and {max(beyond.values()) + 1} tokens in its "
            f"tokenizer, {ordinary[0]!r} among those beyond; resize its embeddings, or give it its "
            "own tokenizer (`tokenizer:`)"
        )
