"""Code that comes with a model: in which files it is, and who lets it run.

Two have to agree. The recipe says for which models (`trust_remote_code: true`); whoever types the
command says that they have read it (`--trust-remote-code`). A recipe may be somebody else's, so
that nothing in a file lets code run, and nothing is remembered from one command to the next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from fusellm.config import ModelSettings
from fusellm.errors import ModelError
from fusellm.models.adapters import adapter_base, holds_adapters
from fusellm.models.places import HUB_FAULTS, looks_local
from fusellm.progress import Progress
from fusellm.store.files import from_json

_SAYING = ("config.json", "tokenizer_config.json")


def require_trusted(settings: ModelSettings, trusted: bool, progress: Progress) -> None:
    """Check that a model's code is trusted, where any is to run, and say which.

    Args:
        trusted: whether who types the command has given --trust-remote-code.

    Raises:
        ModelError: the recipe wants the code, and it is not trusted.
    """
    files = code_of(settings) if settings.trust_remote_code else []
    listed = ", ".join(files)
    if files and not trusted:
        raise ModelError(
            f"the recipe wants code to run that comes with {_named(settings)}: {listed}. Read it, "
            "then give --trust-remote-code; or set trust_remote_code: false"
        )
    if files:
        progress.say(f"running code that comes with {_named(settings)}: {listed}")


def code_of(settings: ModelSettings) -> list[str]:
    """Files with the code that a model and its tokenizer bring along; none of it is run.

    What a hub model's files import of their own repository is not named.
    """
    places = [(settings.model, settings.revision), (settings.tokenizer, None)]
    folder = Path(settings.model).expanduser()
    if folder.is_dir() and holds_adapters(folder):
        places.append(adapter_base(folder))
    return sorted({f for name, revision in places if name for f in _code_at(name, revision)})


def not_trusted(error: Exception, name: str) -> str | None:
    """The message, where an error of transformers says that code would have to run."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{name} comes with code of its own, which runs only where its entry in the recipe says "
        "trust_remote_code: true and you, having read it, give --trust-remote-code. Commands that "
        "only look (inspect, report, store) never run it"
    )


def _named(settings: ModelSettings) -> str:
    at = "" if settings.revision is None else f" at {settings.revision}"
    return f"{settings.model}{at}"


def _code_at(name: str, revision: str | None) -> Iterator[str]:
    folder = Path(name).expanduser()
    references = [r for file in _SAYING for r in _references(_read(name, revision, file))]
    for reference in references:
        repository, _, module = reference.rpartition("--")
        yield f"{repository or name}/{module.split('.')[0]}.py"
    if references and folder.is_dir():
        yield from (f"{name}/{path.name}" for path in folder.glob("*.py"))


def _references(config: dict[str, Any]) -> Iterator[str]:
    """The classes that a configuration names, as `module.Class` or `repository--module.Class`."""
    named = config.get("auto_map")
    for value in named.values() if isinstance(named, dict) else [named]:
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str):
                yield one


def _read(name: str, revision: str | None, file: str) -> dict[str, Any]:
    """A configuration; empty where there is none, which who loads the model will say."""
    path = Path(name).expanduser() / file
    try:
        if not path.parent.is_dir():
            if looks_local(name) or name.startswith("zoo/"):
                return {}
            path = Path(hf_hub_download(name, file, revision=revision))
        config = from_json(path.read_text(encoding="utf-8"))
    except HUB_FAULTS:
        return {}
    return config if isinstance(config, dict) else {}
