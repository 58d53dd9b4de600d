"""Where a model is: a folder, a GGUF file, or a repository of the hub."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fusellm.config import ModelSettings
from fusellm.errors import ModelError
from fusellm.models.adapters import holds_adapters
from fusellm.models.gguf import SUFFIX, require_gguf

ZOO = ("prose", "python", "cpp")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def not_found(what: str, error: Exception) -> str:
    """What is said of a model or tokenizer that is neither a folder nor on the hub.

    Args:
        what: it is, and its name.
        error: what transformers or the hub's client raised.
    """
    told = " ".join(str(error).split())
    if "couldn't connect" in told or isinstance(error, LocalEntryNotFoundError):
        why = "it cannot be reached"
        if hub_constants.HF_HUB_OFFLINE:
            why = "it is not asked, as HF_HUB_OFFLINE is set"
        return (
            f"there is no folder of the {what}, and of the hub only what is in its local cache is "
            f"at hand: {why}. Check the name and the connection, or download it elsewhere and name "
            "its folder"
        )
    told = told.split(" If this is a private repository")[0][:300]
    return (
        f"there is no folder of the {what}, and the hub does not give it either: {told}. Check the "
        "name; for one that is private or gated, `hf auth login` first"
    )


HUB_FAULTS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError)
"""What is raised where a file of the hub cannot be had."""


def zoo_folder(name: str) -> Path:
    """Folder of a model of the zoo, inside the installed package.

    Raises:
        ModelError: there is no such model.
    """
    if name not in ZOO:
        raise ModelError(
            f"there is no zoo/{name}; the zoo has {', '.join('zoo/' + n for n in ZOO)}"
        )
    return Path(str(files("fusellm.zoo"))) / "weights" / name


def looks_local(name: str) -> bool:
    """Whether a name that is no folder here can be no repository of the hub either.

    >>> looks_local("./model"), looks_local("a/b/c"), looks_local("owner/name")
    (True, True, False)
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def gguf_file(settings: ModelSettings) -> tuple[Path, str | None] | None:
    """The GGUF file of a model, with the commit if it is of the hub; None for other models.

    A file of the hub is downloaded, unless it is in the local cache.

    Raises:
        ModelError: there is none, or the package that reads it is missing.
    """
    model, name = settings.model, settings.gguf_file
    path = Path(model).expanduser()
    if model.endswith(SUFFIX):
        require_gguf(model)
        if name is not None:
            raise ModelError(f"{model} names a file already; leave gguf_file: {name} out")
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {model}; check the path")
        return path.absolute(), None
    if name is None:
        return None
    require_gguf(model)
    if not name.endswith(SUFFIX):
        raise ModelError(f"gguf_file: {name} is no name of a GGUF file, which ends in {SUFFIX}")
    if path.is_dir() or looks_local(model):
        if not (path / name).is_file():
            there = ", ".join(sorted(p.name for p in path.glob(f"*{SUFFIX}"))[:6]) or "none"
            raise ModelError(f"{model} has no {name}; its GGUF files: {there}")
        return (path / name).absolute(), None
    return _of_hub(settings, name)


def _of_hub(settings: ModelSettings, name: str) -> tuple[Path, str | None]:
    try:
        path = Path(hf_hub_download(settings.model, name, revision=settings.revision))
    except HUB_FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name} of {settings.model} could not be found, neither in a folder of that name nor "
            f"on the hub: {reason}"
        ) from error
    above = [path, *path.parents]
    commit = next((p.name for p in above if p.parent.name == "snapshots"), None)
    return path, commit


def local_folder(name: str) -> Path | None:
    """The folder of a model; None for a name on the hub.

    Raises:
        ModelError: it is not there, or holds no model that is read here.
    """
    if name.startswith("zoo/"):
        folder = zoo_folder(name.removeprefix("zoo/"))
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{name} is not in this installation ({folder}); `fusellm zoo train` makes it"
            )
        return folder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise ModelError(f"{name} is a file; give the folder that it is in, or a {SUFFIX} file")
        if "://" in name:
            raise ModelError(f"{name} is an address; give the name on the hub alone: owner/name")
        if looks_local(name):
            raise ModelError(f"there is no model folder {name}; check the path")
        return None
    if holds_adapters(folder):
        return folder
    has_weights = any(folder.glob("*.safetensors"))
    quantized = sorted(folder.glob(f"*{SUFFIX}"))
    if quantized and not (has_weights and (folder / "config.json").exists()):
        names = ", ".join(path.name for path in quantized[:6])
        raise ModelError(
            f"{folder} has its model as GGUF ({names}); name the file: model: {quantized[0]}"
        )
    if not (folder / "config.json").exists():
        raise ModelError(
            f"{folder} holds no model: it has no config.json; give the folder that has one beside "
            "its weights, a name on the hub, or a GGUF file"
        )
    if not has_weights:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} has its weights as pickles only ({', '.join(pickles[:3])}), which can "
                "run code when loaded; convert them with save_pretrained(), which writes "
                "safetensors, where you trust them"
            )
        raise ModelError(
            f"{folder} has no weights (no *.safetensors); fetch them, or give the folder that has "
            "them"
        )
    return folder
