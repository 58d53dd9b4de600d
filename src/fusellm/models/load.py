"""Finding, checking and loading models; safetensors only."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fusellm.config import ModelSettings
from fusellm.errors import ModelError
from fusellm.models.heads import check_head
from fusellm.store.files import file_digest
from fusellm.store.manifest import digest

ZOO = ("prose", "python", "cpp")
_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Located:
    """A model that has been found, before its weights are loaded.

    Attributes:
        settings: what the recipe says of it.
        place: folder or hub name to load from.
        config: its configuration.
        fingerprint: digest of its weights and configuration; for a hub model of its commit.
        context_tokens: longest input, or None where the architecture has no limit.
        weight_bytes: size of its weights' files, where they are local.
    """

    settings: ModelSettings
    place: str
    config: PretrainedConfig
    fingerprint: str
    context_tokens: int | None
    weight_bytes: int | None


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


def locate(settings: ModelSettings) -> Located:
    """Find a model and check what can be checked without loading it.

    Raises:
        ModelError: nothing is there, its weights are pickles only, or it is no language model.
    """
    folder = _local_folder(settings.model)
    place = str(folder) if folder is not None else settings.model
    try:
        config = AutoConfig.from_pretrained(
            place, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(_why_not_found(settings, error)) from error
    text_config = config.get_text_config()
    context = next(
        (int(v) for key in _CONTEXT_KEYS if (v := getattr(text_config, key, None))), None
    )
    if folder is None:
        commit = getattr(config, "_commit_hash", None) or settings.revision or "main"
        fingerprint = digest({"hub": settings.model, "commit": commit})
        return Located(settings, place, config, fingerprint, context, None)
    weights = sorted(folder.glob("*.safetensors"))
    sums = {path.name: _cached_digest(path) for path in [*weights, folder / "config.json"]}
    weight_bytes = sum(path.stat().st_size for path in weights)
    return Located(settings, place, config, digest(sums), context, weight_bytes)


def load_tokenizer(located: Located) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        ModelError: it has none that can be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            located.place,
            revision=located.settings.revision,
            trust_remote_code=located.settings.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{located.settings.model} has no tokenizer to load: {reason}") from error
    return tokenizer


def load_model(
    located: Located, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model with its weights, in evaluation mode.

    Args:
        dtype: precision, where it is not the recipe's.

    Raises:
        ModelError: the weights cannot be loaded or some are missing, or the architecture's head
            is not known here.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            located.place,
            revision=located.settings.revision,
            trust_remote_code=located.settings.trust_remote_code,
            dtype=dtype or getattr(torch, located.settings.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{located.settings.model} could not be loaded: {reason}") from error
    model, found = loaded
    absent = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
    if absent:
        raise ModelError(
            f"{located.settings.model} lacks weights that its configuration asks for "
            f"({', '.join(absent[:3])}{', …' if len(absent) > 3 else ''}); they would be random"
        )
    model.to(device).eval()
    check_head(model)
    return cast(PreTrainedModel, model)


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _local_folder(name: str) -> Path | None:
    if name.startswith("zoo/"):
        folder = zoo_folder(name.removeprefix("zoo/"))
        if not (folder / "config.json").exists():
            raise ModelError(f"{name} is not in this installation ({folder}); `fusellm zoo train`")
        return folder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"there is no model folder {name}; check the path")
        return None
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds no model: it has no config.json")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} has its weights as pickles only ({', '.join(pickles[:3])}), which can "
                "run code when loaded; convert them with save_pretrained(), which writes "
                "safetensors, where you trust them"
            )
        raise ModelError(f"{folder} has no weights (no *.safetensors)")
    return folder


def _why_not_found(settings: ModelSettings, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if len(reason) > 300:
        reason = reason[:300] + "…"
    where = (
        settings.model if settings.revision is None else f"{settings.model} at {settings.revision}"
    )
    return f"model {where} could not be found, neither as a folder nor on the hub: {reason}"


def _cached_digest(path: Path) -> str:
    stat = path.stat()
    return _digest_at(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_at(path: Path, size: int, changed_ns: int) -> str:
    return file_digest(path)


def describe(located: Located) -> dict[str, Any]:
    """What `check` and a model card say of a model."""
    return {
        "model": located.settings.model,
        "revision": located.settings.revision,
        "architecture": (located.config.architectures or ["unknown"])[0],
        "context_tokens": located.context_tokens,
        "fingerprint": located.fingerprint,
    }
