"""The target before and after a training: loaded, with adapters or without, and saved."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusellm.config import LoraSettings
from fusellm.models.adapters import merged, save_adapters, untie, with_adapters, without_adapters
from fusellm.models.load import Located, load_model
from fusellm.store.files import saving_explained
from fusellm.store.writer import StageWriter

LOG = "log.jsonl"


def load_target(
    located: Located, lora: LoraSettings | None, device: torch.device, sharded: bool = False
) -> PreTrainedModel:
    """The target as it is trained.

    In float32, unless only adapters are trained: then the model's own weights, which stay as they
    are, have the recipe's precision.

    Args:
        sharded: whether FSDP is to spread it over processes.
    """
    spread = located.settings.model_copy(update={"device_map": None})  # accelerate places it
    dtype = torch.float32
    if lora is not None and not lora.modules_to_save:
        dtype = getattr(torch, located.settings.dtype)
    # What is sharded comes to its device piece by piece.
    device = torch.device("cpu") if sharded else device
    model = load_model(replace(located, settings=spread), device, dtype)
    if lora is None:
        return model
    adapted = with_adapters(model, lora, located.commit)
    if sharded and lora.modules_to_save:
        untie(without_adapters(adapted))  # FSDP takes no weight that two of its groups have
    return adapted


def save_model(
    folder: StageWriter,
    model: PreTrainedModel,
    lora: LoraSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    records: Sequence[dict[str, Any]],
) -> None:
    """Save what was trained, its tokenizer, its card and its log; safetensors, no pickle."""
    model.config.use_cache = True  # Trainer has it off, and a model that is used wants it
    with saving_explained(folder.path):
        if lora is not None and not lora.merge:
            save_adapters(model, folder.path)
        else:
            (model if lora is None else merged(model)).save_pretrained(folder.path)
        tokenizer.save_pretrained(folder.path)
    folder.adopt_all()
    folder.write_text("README.md", card)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder.write_text(LOG, "".join(lines))
