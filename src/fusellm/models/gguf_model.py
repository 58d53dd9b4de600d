"""A model from a GGUF file: its configuration, and how transformers is asked to load it.

transformers takes most of a configuration from the file's metadata, and leaves some of it at the
defaults of the architecture, in silence. How positions are rotated (RoPE) and how attention is
scaled is mended here or refused, since another rotation or scale gives another model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import (
    AutoConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fusellm.errors import ModelError
from fusellm.models.gguf import GgufHeader

_NAME = "header.gguf"
_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
# Of Llama 3.1 to 3.3; a file has the factors that follow from them, and not themselves.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SCALED_BY_TRANSFORMERS = ("gpt-oss", "gpt_oss")
# Layers of Gemma's models of 27B, whose scale no file says; llama.cpp tells it by them too.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def config_of(header: GgufHeader) -> PretrainedConfig:
    """The configuration of a file's model.

    Raises:
        ModelError: transformers cannot make one, or its positions are scaled in a way that is not
            known here.
    """
    try:
        with TemporaryDirectory(prefix="fusellm-gguf-") as folder:
            _write_without_weights(header, Path(folder) / _NAME)
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=_NAME)
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"transformers makes no configuration of {header.path} ({type(error).__name__}: "
            f"{reason}); give the model as a folder of safetensors"
        ) from error
    if header.rows is not None:
        config.vocab_size = header.rows
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = [name] if isinstance(name, str) else None
    config.name_or_path = str(header.path)
    _mend_rotation(config, header)
    _mend_attention(config, header)
    return config


def _write_without_weights(header: GgufHeader, path: Path) -> None:
    """The same header with no vocabulary and weights of one number.

    transformers takes a second for every 15,000 tokens of a vocabulary, whose length alone a
    configuration needs.
    """
    import gguf

    writer = gguf.GGUFWriter(path, header.architecture)
    for key, field in header.fields.items():
        is_list = isinstance(field.value, list)
        if key == "general.architecture" or (is_list and key.startswith("tokenizer.")):
            continue
        kind = gguf.GGUFValueType(field.kind)
        if not is_list:
            writer.add_key_value(key, field.value, kind)
        elif field.value:
            writer.add_key_value(key, field.value, gguf.GGUFValueType.ARRAY, kind)
    writer.add_token_list(["token"])
    if header.rows is not None and header.own("vocab_size") is None:
        writer.add_vocab_size(header.rows)
    for name in header.tensors:
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loading_arguments(config: PretrainedConfig, path: Path) -> dict[str, Any]:
    """Arguments of from_pretrained, beside the folder, that load a file's model dequantized."""
    return {
        "gguf_file": path.name,
        "config": deepcopy(config),
        # Where kernels for it are installed, transformers else keeps the weights quantized.
        "quantization_config": GgufConfig(dequantize=True),
    }


@contextmanager
def without_bar() -> Iterator[None]:
    """Without transformers' bar over the tensors of a GGUF file; ours go on being shown."""
    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = lambda values, *_, **__: values
    try:
        yield
    finally:
        module.tqdm = bar


def as_ordinary(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """A dequantized model without the marks of a quantized one: it can be trained and saved.

    Its name is that of the file, which adapters that are trained on it are for.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    model.config.name_or_path = str(path)
    model.name_or_path = str(path)
    return model


def _mend_attention(config: PretrainedConfig, header: GgufHeader) -> None:
    """Have scores of Gemma 2 and 3 scaled, and capped, as llama.cpp does."""
    layers = _LARGEST_GEMMA.get(header.architecture)
    if layers is None:
        return
    is_largest = header.own("block_count") == layers
    whole = config.hidden_size // config.num_attention_heads
    config.query_pre_attn_scalar = whole if is_largest else config.head_dim
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (value := header.own(cap)) is not None:
            setattr(config, cap, value)


def _mend_rotation(config: PretrainedConfig, header: GgufHeader) -> None:
    """Have positions rotated as the file says.

    Raises:
        ModelError: it says something that is not known here.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    # Where layers that slide are rotated otherwise, the file's keys are of the other ones.
    sliding, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    for one, key in ((rope, "rope.freq_base"), (sliding, "rope.freq_base_swa")):
        if "rope_theta" in one and (base := header.own(key)) is not None:
            one["rope_theta"] = base
    _require_share(config, rope, header)
    if header.architecture in _SCALED_BY_TRANSFORMERS:
        return
    scaling = str(header.own("rope.scaling.type", "none"))
    factor = header.own("rope.scaling.factor", header.own("rope.scale_linear", 1.0))
    if scaling == "linear" or (scaling == "none" and factor not in (0.0, 1.0)):
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling != "none" or any(name in header.tensors for name in _LONG_FACTORS):
        name = "longrope" if scaling == "none" else scaling
        raise _unknown(header, f"scales positions by {name}, which is not known here, so that it")
    elif _FACTORS in header.tensors:
        rope |= _llama3(rope, header)


def _require_share(config: PretrainedConfig, rope: dict[str, Any], header: GgufHeader) -> None:
    """Check that as much of a head is rotated as the file says."""
    wanted = header.own("rope.dimension_count")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    if wanted is not None and "sliding_attention" not in (config.rope_parameters or {}):
        has = int(head * share)
        if has != wanted:
            what = f"rotates {wanted} of a head's {head} dimensions, and transformers {has}"
            raise _unknown(header, f"{what}, so that it")


def _llama3(rope: dict[str, Any], header: GgufHeader) -> dict[str, Any]:
    """The scaling of Llama 3.1 from the factors that a file has."""
    factors = _factors(header)
    wanted = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    low, high, context = _LLAMA3.values()
    frequencies = rope["rope_theta"] ** -(np.arange(len(factors)) / len(factors))
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / wanted["factor"] + smooth)
    if not np.allclose(expected, factors, rtol=1e-3):
        what = f"has factors of frequencies ({_FACTORS}) that are not Llama 3.1's"
        raise _unknown(header, f"{what}, so that it")
    return wanted


def _factors(header: GgufHeader) -> np.ndarray:
    import gguf

    tensor = header.tensors[_FACTORS]
    kind = gguf.GGMLQuantizationType(tensor.kind)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    length = tensor.shape[0] // per_block * block_bytes
    data = np.fromfile(header.path, np.uint8, length, offset=tensor.start)
    return np.asarray(gguf.dequantize(data.reshape(1, -1), kind), np.float64).reshape(-1)


def _unknown(header: GgufHeader, what: str) -> ModelError:
    return ModelError(
        f"{header.path} {what} would become another model; give the model as a folder of "
        "safetensors"
    )
