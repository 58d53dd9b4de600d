"""Weights by their headers: whether they are whole, and those that config.json asks for.

A safetensors file begins with the name, type and shape of each of its tensors, some kilobytes that
are read in milliseconds, be the model as large as it will.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from fusellm.errors import ModelError
from fusellm.models.configurations import class_of, stored_quantization
from fusellm.models.heads import layers_before_head
from fusellm.models.load import Located, lacking, require_packages
from fusellm.models.weights import INDEX, loaded_files, read_index, require_content
from fusellm.text_table import few

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3
# What transformers raises where an architecture cannot be built without weights.
_BUILDING_FAULTS = (
    AttributeError,
    ImportError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file's header has it; `dtype` as safetensors spells it."""

    dtype: str
    shape: tuple[int, ...]


def require_loadable(located: Located) -> None:
    """Check all that can be known of a model before its weights are read.

    Raises:
        ModelError: a package is missing, or something is wrong with its files.
    """
    require_packages(located)
    problems = weight_problems(located)
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise ModelError("; ".join(problems[:_SHOWN]) + more)


def weight_problems(located: Located) -> list[str]:
    """What is wrong with a model's weights, in a line each; nothing of a GGUF file is looked at.

    A hub model's headers are read from the local cache, or else by the hub's own client.
    """
    if located.gguf is not None:
        return []
    try:
        by_file = _headers(located)
    except ModelError as error:
        return [str(error)]
    problems: list[str] = []
    tensors: dict[str, TensorHeader] = {}
    for name, in_file in by_file.items():
        twice = sorted(tensors.keys() & in_file.keys())
        if twice:
            problems.append(f"{twice[0]} of {located.settings.model} is in {name} and elsewhere")
        tensors |= in_file
    if stored_quantization(located.config) is None:
        problems += _of_types(located.settings.model, tensors)
        problems += _against_configuration(located, tensors)
    return problems


def read_header(model: str, path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file.

    Args:
        model: what the recipe calls it.

    Raises:
        ModelError: it is none, is cut off, or is a Git LFS pointer.
    """
    require_content(model, path)
    try:
        with safe_open(path, "pt") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118  no dict
            return {n: TensorHeader(s.get_dtype(), tuple(s.get_shape())) for n, s in slices}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path.name} of {model} is no whole safetensors file ({error}); fetch it again"
        ) from error


def _headers(located: Located) -> dict[str, dict[str, TensorHeader]]:
    """The tensors of each file.

    Raises:
        ModelError: a file is missing or damaged, or the hub cannot be reached.
    """
    model, named = located.settings.model, getattr(located.config, "transformers_weights", None)
    try:
        files = loaded_files(model, located.place, located.commit, named)
    except ModelError:
        if located.commit is None or hub_constants.HF_HUB_OFFLINE:
            raise
        return _hub_headers(located)
    by_file = {n: read_header(model, path) for n, path in files.items() if not n.endswith(INDEX)}
    for index in (path for name, path in files.items() if name.endswith(INDEX)):
        for tensor, shard in read_index(model, index).items():
            if tensor not in by_file[shard]:
                raise ModelError(
                    f"{shard} of {model} does not have {tensor}, which {index.name} says is in it; "
                    "fetch both again"
                )
    return by_file


def _hub_headers(located: Located) -> dict[str, dict[str, TensorHeader]]:
    from huggingface_hub import HfApi  # not above: to import it prints, and most are local

    model = located.settings.model
    try:
        metadata = HfApi().get_safetensors_metadata(located.place, revision=located.commit)
    except NotASafetensorsRepoError as error:
        raise ModelError(
            f"{model} has no safetensors weights, and fusellm reads no pickles, which can run code "
            "when loaded; convert them with save_pretrained() where you trust them"
        ) from error
    except (HTTPError, OSError, SafetensorsParsingError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the weights of {model} cannot be looked at on the hub: {reason}; check the "
            "connection, or download it and name its folder"
        ) from error
    return {
        name: {n: TensorHeader(t.dtype, tuple(t.shape)) for n, t in file.tensors.items()}
        for name, file in metadata.files_metadata.items()
    }


def _of_types(model: str, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """Weights that are no plain numbers, though nothing says how they are to be read."""
    odd = [n for n, t in tensors.items() if n.endswith(".weight") and t.dtype not in _FLOATS]
    if not odd:
        return []
    return [
        f"{model} stores {few(sorted(odd), _SHOWN)} as {tensors[odd[0]].dtype}, and its "
        "config.json has no quantization_config that says how that is read; take the config.json "
        "that belongs to it"
    ]


def _against_configuration(located: Located, tensors: Mapping[str, TensorHeader]) -> list[str]:
    """What transformers would miss or could not use, told by a loading without any numbers.

    Code that comes with a model is not run for this, and an architecture that cannot be built
    without weights is left to the loading itself.
    """
    architecture = class_of(located.config)
    if architecture is None:
        return []
    whole, text = located.config, located.config.get_text_config()
    state = {name: torch.empty(t.shape, device="meta") for name, t in tensors.items()}
    try:
        with _quiet():
            built, loading_info = architecture.from_pretrained(
                None,
                config=deepcopy(text if architecture.config_class is type(text) else whole),
                state_dict=state,
                device_map={"": "meta"},
                dtype=torch.float32,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except _BUILDING_FAULTS:
        return []
    model, between = located.settings.model, layers_before_head(built)
    if between:
        return [
            f"{model} is a {architecture.__name__}, which has layers of its own before its head "
            f"({few(between, _SHOWN)}), in a way that fusellm does not know; take a model whose "
            "head reads the last hidden states"
        ]
    if loading_info["mismatched_keys"]:
        (name, stored, wanted), *others = sorted(loading_info["mismatched_keys"])
        more = f" (and {len(others):,} more)" if others else ""
        return [
            f"{name} of {model} is {_size(stored)}, and by its config.json {_size(wanted)}{more}; "
            "take both from one place"
        ]
    return [lacking(model, loading_info["missing_keys"])] if loading_info["missing_keys"] else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and report: no model is loaded, and what is wrong is told here."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _size(shape: Sequence[int]) -> str:
    return " × ".join(f"{n:,}" for n in shape)
