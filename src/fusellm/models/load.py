"""Finding, checking and loading models; safetensors only."""

import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fusellm.config import ModelSettings
from fusellm.errors import ModelError
from fusellm.models.adapters import (
    ADAPTER_FILES,
    adapter_base,
    adapters_beside,
    holds_adapters,
    merge_from,
    model_alone,
    require_peft,
)
from fusellm.models.attention import choose_attention
from fusellm.models.configurations import (
    context_tokens,
    method_of,
    read_configuration,
    require_quantizer,
    stored_quantization,
)
from fusellm.models.gguf import model_header
from fusellm.models.gguf_model import as_ordinary, config_of, loading_arguments, without_bar
from fusellm.models.gguf_tokenizer import require_same_tokens, tokenizer_of
from fusellm.models.heads import require_known_head
from fusellm.models.places import gguf_file, local_folder
from fusellm.models.remote_code import not_trusted
from fusellm.models.tokenizers import put_before, read_tokenizer, require_rows, tokenizer_at
from fusellm.models.weights import cached_digest, loaded_files, require_content, weight_files
from fusellm.store.identity import digest
from fusellm.text_table import few

# transformers puts adapters that it finds on a model, where PEFT is installed; here those that are
# meant are merged. This is a folder in which it finds none.
_NO_ADAPTERS = "no-adapters"
_LOADING_ERRORS = (ImportError, OSError, RuntimeError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Located:
    """A model that has been found, before its weights are loaded.

    Attributes:
        settings: what the recipe says of it.
        place: folder or hub name to load from.
        commit: of a hub model; all that is read of it is read at this commit. None for a folder.
        config: its configuration.
        fingerprint: digest of its weights and configuration; for a hub model of its commit.
        context_tokens: longest input, or None where the architecture has no limit.
        adapters: folder of the adapters that are merged into it, where `settings` names one.
        gguf: the GGUF file that it is loaded from, if it is; `place` is then its folder.
        runs_code: whether code that comes with it may run.
    """

    settings: ModelSettings
    place: str
    commit: str | None
    config: PretrainedConfig
    fingerprint: str
    context_tokens: int | None
    adapters: Path | None = None
    gguf: Path | None = None
    runs_code: bool = False


def locate(settings: ModelSettings, trusted: bool = False) -> Located:
    """Find a model and check what can be checked without loading it.

    Args:
        trusted: whether code may run where the settings want it; by who types a command.

    Raises:
        ModelError: nothing is there, its weights are pickles only, it is no language model, it
            comes with code that is not trusted, or it is to be quantized a second time.
    """
    runs_code = trusted and settings.trust_remote_code
    gguf = gguf_file(settings)
    if gguf is not None:
        return replace(_locate_gguf(settings, *gguf), runs_code=runs_code)
    folder = local_folder(settings.model)
    if folder is not None and holds_adapters(folder):
        return _locate_adapters(settings, folder, trusted)
    place = str(folder) if folder is not None else settings.model
    config = read_configuration(settings, place, runs_code)
    stored = stored_quantization(config)
    if settings.quantization is not None and stored is not None:
        raise ModelError(
            f"{settings.model} is stored quantized ({method_of(stored)}), so it cannot be loaded "
            f"with quantization: {settings.quantization}; leave that out"
        )
    if folder is None:
        context = context_tokens(config)
        commit = _hub_commit(settings)
        fingerprint = digest({"hub": settings.model, "commit": commit})
        return Located(settings, place, commit, config, fingerprint, context, runs_code=runs_code)
    model = _locate_folder(settings, folder, config, runs_code)
    return _with_adapters(model, settings, folder) if adapters_beside(folder) else model


def _locate_folder(
    settings: ModelSettings, folder: Path, config: PretrainedConfig, runs_code: bool
) -> Located:
    """The model of a folder, known by all files that are loaded."""
    named = getattr(config, "transformers_weights", None)
    loaded = loaded_files(settings.model, str(folder), None, named)
    for path in loaded.values():
        require_content(settings.model, path)
    code = folder.glob("*.py") if runs_code else ()
    beside = [*folder.glob("*.safetensors"), folder / "config.json", *code]
    files = {path.name: path for path in beside} | loaded
    return Located(
        settings,
        str(folder),
        None,
        config,
        digest({name: cached_digest(path) for name, path in files.items()}),
        context_tokens(config),
        runs_code=runs_code,
    )


def _locate_gguf(settings: ModelSettings, path: Path, commit: str | None) -> Located:
    """The model of a GGUF file, which is there; `commit` is that of a repository of the hub."""
    if settings.quantization is not None:
        raise ModelError(
            f"{settings.model} is dequantized as it is loaded, so it cannot be loaded with "
            f"quantization: {settings.quantization}; leave that out"
        )
    config = config_of(model_header(path))
    fingerprint = digest({"gguf": cached_digest(path)})
    context = context_tokens(config)
    return Located(settings, str(path.parent), commit, config, fingerprint, context, gguf=path)


def _locate_adapters(settings: ModelSettings, folder: Path, trusted: bool) -> Located:
    """The model that a folder of adapters is on, with the folder."""
    base, revision = adapter_base(folder)
    of_base = {"model": base, "revision": revision, "tokenizer": None}
    model = locate(settings.model_copy(update=of_base), trusted)
    return _with_adapters(model, settings, folder)


def _with_adapters(base: Located, settings: ModelSettings, folder: Path) -> Located:
    """A model with the adapters of a folder."""
    if base.adapters is not None:
        raise ModelError(
            f"the model that the adapters of {folder} are on has adapters itself "
            f"({base.adapters}); merge those into it first, as `fusellm` does where it trains them"
        )
    if settings.quantization is not None or settings.device_map is not None:
        raise ModelError(
            f"{folder} holds adapters, which are merged into their model as it is loaded; leave "
            "quantization and device_map out"
        )
    sums = {name: cached_digest(folder / name) for name in ADAPTER_FILES}
    fingerprint = digest([base.fingerprint, sums])
    return replace(base, settings=settings, fingerprint=fingerprint, adapters=folder)


def weights_digest(located: Located) -> str:
    """SHA-256 over the names and digests of the files that a model's weights are loaded from.

    A folder and a hub model with the same files have the same digest. A hub model's files are
    looked up in the local cache, so it must have been loaded before.

    Raises:
        ModelError: the files are not there.
    """
    if located.gguf is not None:
        files = {located.gguf.name: located.gguf}
    else:
        named = getattr(located.config, "transformers_weights", None)
        files = weight_files(located.settings.model, located.place, located.commit, named)
    if located.adapters is not None:
        files |= {name: located.adapters / name for name in ADAPTER_FILES}
    return digest({name: cached_digest(path) for name, path in files.items()})


def load_tokenizer(located: Located) -> PreTrainedTokenizerBase:
    """A model's tokenizer: the one that its settings name, or its own.

    Raises:
        ModelError: it has none that can be loaded, or one that does not fit it.
    """
    settings = located.settings
    if settings.tokenizer is not None:
        tokenizer = tokenizer_at(settings.tokenizer, located.runs_code)
        if located.gguf is not None:
            require_same_tokens(model_header(located.gguf), tokenizer, settings.tokenizer)
    elif located.gguf is not None:
        tokenizer = tokenizer_of(model_header(located.gguf))
    else:
        place, commit = located.place, located.commit
        tokenizer = read_tokenizer(settings.model, place, commit, located.runs_code)
    if settings.prefix is not None:
        put_before(settings.model, tokenizer, settings.prefix)
    require_rows(settings.model, tokenizer, located.config.get_text_config().vocab_size)
    return tokenizer


def require_packages(located: Located) -> None:
    """Check that the packages a model is loaded with are installed; reads no weights.

    Raises:
        ModelError: one is missing; the message has the command that installs it.
    """
    model, wanted = located.settings.model, located.settings.quantization
    stored = stored_quantization(located.config)
    if located.adapters is not None:
        require_peft(f"{located.adapters}, which holds adapters,")
    if wanted is not None or (stored is not None and "bitsandbytes" in method_of(stored)):
        if find_spec("bitsandbytes") is None:
            why = "it is stored" if wanted is None else f"quantization: {wanted}"
            raise ModelError(
                f"{model} needs the package bitsandbytes ({why}): pip install 'fusellm[quantized]'"
            )
    elif stored is not None:
        require_quantizer(model, stored)


def load_model(
    located: Located, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model with its weights, in evaluation mode.

    Args:
        device: to run on; a `device_map` of its settings goes before it.
        dtype: precision, where it is not the recipe's.

    Raises:
        ModelError: a package is missing, the weights cannot be loaded or some are missing, the
            attention implementation that is wanted is not there, or the architecture's head is
            not known here.
    """
    require_packages(located)
    arguments = _loading_arguments(located, device, dtype)
    offload = TemporaryDirectory(prefix="fusellm-offload-")
    place = model_alone(located.place, Path(offload.name))
    try:
        with without_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, **arguments, offload_folder=offload.name, output_loading_info=True
            )
    except _LOADING_ERRORS as error:
        offload.cleanup()
        raise ModelError(_why_not_loaded(located, error)) from error
    model, loading_info = loaded
    model.name_or_path = model.config.name_or_path = located.place
    weakref.finalize(model, offload.cleanup)
    absent = [*loading_info["missing_keys"], *(str(key) for key in loading_info["mismatched_keys"])]
    if absent:
        raise ModelError(lacking(located.settings.model, absent))
    if "device_map" not in arguments:  # else it is where it belongs, and must not be moved
        model.to(device)
    if located.gguf is not None:
        model = as_ordinary(model, located.gguf)
    if located.adapters is not None:
        model = merge_from(model, located.adapters)
    model.eval()
    _try(model, located)
    return cast(PreTrainedModel, model)


def lacking(model: str, names: Collection[str]) -> str:
    """What is said of a model without some of its weights."""
    return (
        f"{model} lacks weights that its configuration asks for ({few(sorted(names), 3)}); they "
        "would be random. Fetch all of its files, or take the config.json that belongs to them"
    )


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _loading_arguments(
    located: Located, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Arguments of from_pretrained; with a `device_map` where the model must not be moved later."""
    settings, config = located.settings, located.config
    recipe_dtype: torch.dtype = getattr(torch, settings.dtype)
    dtype = dtype or recipe_dtype
    wanted = settings.attention
    if wanted.startswith("flash") and dtype != recipe_dtype:  # training, in float32
        wanted = "auto"
    places = settings.device_map
    if isinstance(places, dict) and set(places.values()) <= {"cpu", "disk"}:
        device = torch.device("cpu")
    arguments: dict[str, Any] = {
        "revision": located.commit,
        "trust_remote_code": located.runs_code,
        "dtype": dtype,
        "use_safetensors": True,
        "attn_implementation": choose_attention(wanted, config, device, dtype),
        "adapter_kwargs": {"subfolder": _NO_ADAPTERS},
    }
    if located.gguf is not None:
        arguments |= {"revision": None} | loading_arguments(config, located.gguf)
    if settings.quantization is not None:
        arguments["quantization_config"] = _bitsandbytes(settings.quantization, dtype)
    if places is not None:
        arguments["device_map"] = places
    elif settings.quantization is not None or stored_quantization(config) is not None:
        arguments["device_map"] = {"": str(device)}
    return arguments


def _bitsandbytes(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _try(model: PreTrainedModel, located: Located) -> None:
    """Run a few tokens through a model that was just loaded, and check its head."""
    try:
        require_known_head(model)
    except ModelError:
        raise
    except Exception as error:  # whatever an architecture's own code raises
        raise ModelError(_why_not_loaded(located, error, "cannot run as it is loaded")) from error


def _why_not_loaded(located: Located, error: Exception, what: str = "could not be loaded") -> str:
    settings = located.settings
    untrusted = not_trusted(error, f"model {settings.model}")
    if untrusted is not None:
        return untrusted
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    cure = ""
    if "cannot be loaded with `safetensors`" in reason:
        return (
            f"{settings.model} has no safetensors weights, and fusellm reads no pickles, which can "
            "run code when loaded; convert them with save_pretrained() where you trust them"
        )
    if isinstance(settings.device_map, dict):
        cure = ". Every module needs its place in device_map"
        if located.config.get_text_config().tie_word_embeddings:
            cure += "; the head and the input embedding, which are tied, need the same"
    elif settings.attention != "auto":
        cure = f". Or is it attention: {settings.attention}? Try auto"
    return f"{settings.model} {what}: {reason}{cure}"


def _hub_commit(settings: ModelSettings) -> str:
    """The commit that a hub model's configuration, just read, is of."""
    cached = try_to_load_from_cache(settings.model, "config.json", revision=settings.revision)
    if not isinstance(cached, str):
        raise ModelError(
            f"the commit of {settings.model} is not to be told from the local hub cache "
            f"({hub_constants.HF_HUB_CACHE}); name one as its revision, or download the model and "
            "name its folder"
        )
    return Path(cached).parent.name


def describe(located: Located) -> dict[str, Any]:
    """What `check` and a model card say of a model."""
    return {
        "model": located.settings.model,
        "revision": located.settings.revision,
        "commit": located.commit,
        "architecture": (located.config.architectures or ["unknown"])[0],
        "context_tokens": located.context_tokens,
        "fingerprint": located.fingerprint,
        **located.settings.model_dump(
            include={"gguf_file", "tokenizer", "prefix"}, exclude_none=True
        ),
    }
