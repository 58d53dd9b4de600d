"""Low-rank adapters on a model (PEFT): made, saved, read back and merged.

PEFT is an extra, so that it is imported where it is used.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fusellm.config import LoraSettings
from fusellm.errors import ModelError
from fusellm.store.files import from_json

_CONFIG = "adapter_config.json"
ADAPTER_FILES = (_CONFIG, "adapter_model.safetensors")


def require_peft(why: str) -> None:
    """Check that PEFT is installed.

    Raises:
        ModelError: it is not; the message has the command that installs it.
    """
    if find_spec("peft") is None:
        raise ModelError(f"{why} needs the package peft: pip install 'fusellm[lora]'")


def with_adapters(
    model: PreTrainedModel, settings: LoraSettings, commit: str | None
) -> PreTrainedModel:
    """A model with new adapters, which alone are trained; their weights are float32.

    Args:
        commit: of a hub model, for who loads the adapters without fusellm.

    Raises:
        ModelError: no layer has one of the names, or one that has takes no adapter.
    """
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
    )
    with without_warnings():
        try:
            adapted = peft.get_peft_model(model, config, revision=commit)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"training.lora does not fit {type(model).__name__}: {reason}; its linear layers "
                f"are named {', '.join(_linear_names(model))}"
            ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # those of modules_to_save have the model's own precision
            parameter.data = parameter.data.float()
    return cast(PreTrainedModel, adapted)


def without_adapters(model: torch.nn.Module) -> PreTrainedModel:
    """The model that adapters, if there are any, are on; its layers have them still.

    Raises:
        ModelError: they are prompts, which are no part of any layer.
    """
    active = getattr(model, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise ModelError(
            "prompt, prefix and P-tuning put learnt tokens before each text, which is not known "
            "here; use adapters on layers, such as LoRA"
        )
    base = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if base is None else base())


def merged(model: torch.nn.Module) -> PreTrainedModel:
    """An ordinary model with the adapters added to its weights, in float32.

    A head that is tied to the input embedding becomes a weight of its own where either has an
    adapter, or is trained: they are no longer the same.
    """
    base = without_adapters(model).float()
    untie(base)
    with without_warnings():
        ordinary = cast(Any, model).merge_and_unload()
    return cast(PreTrainedModel, ordinary)


def untie(model: PreTrainedModel) -> None:
    """Make the head a weight of its own where it is the input embedding's and either is adapted."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends):
        return
    own = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    if own[0] is None or own[1] is None or own[0].weight is not own[1].weight:
        return
    own[1].weight = torch.nn.Parameter(own[1].weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Save adapters alone, as PEFT reads them."""
    with without_warnings():
        cast(Any, model).save_pretrained(folder, save_embedding_layers=False)


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters, and no model."""
    return _has_adapters(folder) and not (folder / "config.json").exists()


def adapters_beside(folder: Path) -> bool:
    """Whether the folder of a model holds adapters on that model as well.

    Raises:
        ModelError: their weights are missing, or a pickle.
    """
    if not (folder / _CONFIG).is_file():
        return False
    if not _has_adapters(folder):
        raise ModelError(
            f"{folder} has adapters beside its model ({_CONFIG}), and not their weights as "
            f"{ADAPTER_FILES[1]}; fetch these, or take {_CONFIG} away to read the model without"
        )
    return True


def model_alone(place: str, scratch: Path) -> str:
    """Where the model of a folder is loaded from, so that no adapters beside it are found.

    transformers before 5.23 takes them from a folder whatever it is told: it is given links to all
    other files, made in `scratch`.
    """
    folder = Path(place)
    if not (folder / _CONFIG).is_file():
        return place
    alone = scratch / "model"
    alone.mkdir()
    for path in folder.iterdir():
        if path.name not in ADAPTER_FILES:
            (alone / path.name).symlink_to(path.resolve())
    return str(alone)


def _has_adapters(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """(model, revision) that the adapters of a folder are on.

    Raises:
        ModelError: the folder does not say.
    """
    path = folder / _CONFIG
    try:
        config = from_json(path.read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"]), config.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} names no model that the adapters are on ({error!r}); fetch it again, or set "
            "its base_model_name_or_path"
        ) from error


def merge_from(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with the adapters of a folder merged in, in the model's precision.

    Raises:
        ModelError: PEFT is missing, or the adapters do not fit the model.
    """
    require_peft(f"{folder}, which holds adapters,")
    import peft

    dtype, device = model.dtype, model.device
    with without_warnings():
        try:
            adapted = peft.PeftModel.from_pretrained(model, folder, torch_device=str(device))
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the adapters of {folder} do not fit their model: {reason}; take those that were "
                "made on it"
            ) from error
    return cast(PreTrainedModel, cast(Any, merged(adapted)).to(dtype))


def _linear_names(model: PreTrainedModel) -> list[str]:
    linear = (n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without PEFT's warnings: of tied weights, which are untied before adapters are merged, and of
    names that transformers is about to drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        yield
