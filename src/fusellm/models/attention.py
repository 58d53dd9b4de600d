"""Which attention implementation a model is loaded with.

All of them compute the same function; they differ in speed, and in what they can do. Flash
attention takes no float32 and no CPU. PyTorch's own (sdpa) cannot soft-cap attention scores, as
Gemma 2 does; transformers 5.17 leaves the cap out in silence. Eager works everywhere but in a
Falcon with ALiBi, where transformers (5.17 to 5.23) adds the ALiBi bias twice.
"""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from fusellm.errors import ModelError
from fusellm.models.configurations import class_of

_HALF = (torch.bfloat16, torch.float16)
_AMPERE, _HOPPER = 8, 9  # compute capabilities: 2 runs from the first on, 3 on the second alone
_PACKAGES = {
    "flash_attention_3": "flash-attn-3, from github.com/Dao-AILab/flash-attention",
    "flash_attention_2": "flash-attn (pip install flash-attn)",
}


def choose_attention(
    wanted: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """The implementation to ask transformers for.

    Args:
        wanted: `attention` of the model's settings.
        device: that the model will run on.
        dtype: that it will compute in.

    Returns:
        Its name; None for what transformers takes by itself, which is sdpa where every part of
        the model has it, else eager.

    Raises:
        ModelError: the architecture or this machine does not have the one that is wanted.
    """
    architecture = class_of(config)
    if architecture is None:  # code that comes with the model: transformers checks it
        return None if wanted == "auto" else wanted
    has = implementations(architecture, config)
    if wanted == "auto":
        flash = (name for name in _PACKAGES if name in has)
        usable = (name for name in flash if _flash_problem(name, device, dtype) is None)
        return next(usable, "eager" if _caps_scores(config) else None)
    if wanted not in has:
        raise ModelError(
            f"attention: {wanted} is not supported by {architecture.__name__}, which has "
            f"{', '.join(has)}; choose one of them, or auto"
        )
    problem = _flash_problem(wanted, device, dtype) if wanted in _PACKAGES else None
    if problem is not None:
        raise ModelError(f"attention: {wanted} needs {problem}; or set attention: auto")
    return wanted


def implementations(architecture: Any, config: PretrainedConfig) -> list[str]:
    """What a model class can run on some machine, the fastest first."""
    only = getattr(architecture, "_compatible_flash_implementations", None)
    alibi_falcon = config.model_type == "falcon" and config.alibi
    names = []
    if getattr(architecture, "_supports_flash_attn", False) and not alibi_falcon:
        names += [name for name in _PACKAGES if only is None or name in only]
    if getattr(architecture, "_supports_sdpa", False) and not _caps_scores(config):
        names.append("sdpa")
    if not alibi_falcon:
        names.append("eager")
    return names


def _caps_scores(config: PretrainedConfig) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _flash_problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is missing for flash attention, or None."""
    if device.type != "cuda":
        return f"a CUDA device, not {device.type}"
    if dtype not in _HALF:
        return f"dtype bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    three = name == "flash_attention_3"
    generation = torch.cuda.get_device_capability(device)[0]
    if generation != _HOPPER if three else generation < _AMPERE:
        return f"a GPU of {'the Hopper generation' if three else 'the Ampere generation or later'}"
    if not (is_flash_attn_3_available() if three else is_flash_attn_2_available()):
        return f"the package {_PACKAGES[name]}"
    return None
