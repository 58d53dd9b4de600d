"""A model with its tokenizer, by name, as a program loads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from fusellm.config import ModelSettings
from fusellm.errors import ArgumentError
from fusellm.models.load import default_device, load_model, locate
from fusellm.models.readers import encoder_of
from fusellm.models.tokenizer import Tokenizer
from fusellm.recipe_file import checked_settings


def load_pretrained(
    name: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model and its tokenizer, as a recipe's models are loaded.

    What transformers' own `from_pretrained` loads works in this library as well. This one knows the
    zoo besides, loads GGUF files with the tokenizer that they mean, merges adapters, checks that
    nothing is missing, and never reads a pickle.

    Args:
        name: a folder, a GGUF file, a hub name, or zoo/prose, zoo/python, zoo/cpp.
        dtype: float32, bfloat16 or float16.
        device: the first GPU if None, else the CPU.
        trust_remote_code: whether code that the model brings along may run.
        settings: others that a recipe's `target:` may have, such as `revision`, `quantization`,
            `device_map` and `tokenizer`.

    Raises:
        ArgumentError: there is no such setting, or it has a wrong value.
        ModelError: nothing is there, or it cannot be loaded.
        TokenizerError: its tokens cannot be told as bytes.

    >>> model, tokenizer = load_pretrained("zoo/prose", device="cpu")
    >>> type(model).__name__, len(tokenizer.vocabulary)
    ('LlamaForCausalLM', 8192)
    """
    named = str(dtype).removeprefix("torch.")
    given = {"model": fspath(name), "dtype": named, "trust_remote_code": trust_remote_code}
    given |= settings
    try:
        place = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(
            f"device {device!r} is none of torch ({error}); give cpu, cuda, or None for what there "
            "is, and device_map='auto' to spread a model"
        ) from error
    located = locate(checked_settings(ModelSettings, given), trust_remote_code)
    encoder = encoder_of(located)
    with _quietly():
        return load_model(located, place), encoder


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bar: a library prints nothing."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
