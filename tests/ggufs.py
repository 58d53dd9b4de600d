"""Tiny GGUF files, written as llama.cpp's converter writes them, and the folders they equal."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from conftest import code, prose

TEXTS = [prose(n) + code(n) for n in range(40)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_NUMBERS = gguf.GGUFValueType
# The name that transformers' class for Qwen 2 wants among the tokens.
_END, _CALL = "<|endoftext|>", "<call>"
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@dataclass
class Vocabulary:
    """A tokenizer, and what a GGUF file says of it."""

    tokenizer: PreTrainedTokenizerBase
    fields: dict[str, Any]
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = len(self.fields["tokenizer.ggml.tokens"])


def byte_level(word: str) -> Vocabulary:
    """Byte-level BPE with the rules of a word, written out here; three rows pad its head."""
    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if word == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        pieces = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    else:
        assert word == "smollm"
        digits = pre_tokenizers.Digits(individual_digits=True)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([_CALL])
    layout = json.loads(tokenizer.to_str())
    tokens = sorted(layout["model"]["vocab"], key=layout["model"]["vocab"].get)
    tokens += [_CALL, *(f"[PAD{len(tokens) + 1 + n}]" for n in range(3))]
    types = [NORMAL] * len(tokens)
    types[0], types[-4], types[-3:] = CONTROL, USER_DEFINED, [UNUSED] * 3
    fields = {
        "model": "gpt2",
        "pre": word,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in layout["model"]["merges"]],
        "eos_token_id": 0,
        "add_bos_token": False,
    }
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)
    return Vocabulary(made, {f"tokenizer.ggml.{key}": value for key, value in fields.items()})


def sentencepiece(prefix: bool) -> Vocabulary:
    """SentencePiece's BPE; without a dummy prefix it is as Gemma's, runs of spaces listed."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("\n|▁+"), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    vocabulary = trained.get_vocab()
    learned = [token for token in sorted(vocabulary, key=vocabulary.get) if token != "▁▁"]
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    runs = [] if prefix else ["  ", "   "]
    tokens = [*special, *bytes_, *runs, *learned]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(runs)]
    types += [NORMAL] * len(learned)
    merged = [len(token) > 1 for token in learned]
    order = [*range(len(learned))]
    # Letters come last in SentencePiece's order.
    ranks = sorted(order, key=lambda n: (not merged[n], n))
    scores = [0.0] * 259 + [-1000.0] * len(runs) + [0.0] * len(learned)
    for rank, n in enumerate(ranks):
        scores[len(tokens) - len(learned) + n] = -float(rank)
    fields: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    if not prefix:
        fields["add_space_prefix"] = False
    made = _marked(tokens, [*runs, *(learned[n] for n in ranks if merged[n])], prefix)
    return Vocabulary(made, {f"tokenizer.ggml.{key}": value for key, value in fields.items()})


def _marked(tokens: list[str], merged: Iterable[str], prefix: bool) -> PreTrainedTokenizerBase:
    """The tokenizer.json that converters make: every way in which a token can come about."""
    marked = [token.replace(" ", "▁") for token in tokens]
    ids = {token: id_ for id_, token in enumerate(marked)}
    merges = [
        (token[:at], token[at:])
        for token in (token.replace(" ", "▁") for token in merged)
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    replace: normalizers.Normalizer = normalizers.Replace(" ", "▁")
    if prefix:
        replace = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos_token=True,
    )


def tiny(architecture: str, rows: int, tied: bool = True, **changes: Any) -> PreTrainedModel:
    """A random model of llama.cpp's architecture `llama`, `qwen2` or `gemma3`."""
    kinds: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    }
    config, model = kinds[architecture]
    gemma = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    own = gemma if architecture == "gemma3" else {}
    torch.manual_seed(0)
    made = model(config(vocab_size=rows, tie_word_embeddings=tied, **(_SIZES | own | changes)))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.1)
    return made.eval()


def write(
    path: Path,
    model: PreTrainedModel,
    fields: dict[str, Any],
    kind: str = "F32",
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a model; matrices have the type `kind`, everything else is float32."""
    config = model.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(config, architecture) | fields).items():
        if value is None:
            continue
        if isinstance(value, list):
            inner = {str: _NUMBERS.STRING, int: _NUMBERS.INT32, float: _NUMBERS.FLOAT32}
            writer.add_key_value(key, value, _NUMBERS.ARRAY, inner[type(value[0])])
        else:
            outer = {bool: _NUMBERS.BOOL, str: _NUMBERS.STRING, int: _NUMBERS.UINT32}
            writer.add_key_value(key, value, outer.get(type(value), _NUMBERS.FLOAT32))
    names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = _as_llama_cpp(name, weight.float().numpy(), config, architecture)
        stem, suffix = name.rsplit(".", 1)
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder_of(folder: Path, model: PreTrainedModel, vocabulary: Vocabulary, kind: str) -> Path:
    """The same model as a folder: what is left of its weights after `kind`, as float32."""
    stored = gguf.GGMLQuantizationType[kind]
    left = {}
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if array.ndim == 2:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, stored), stored)
        elif model.config.model_type == "gemma3_text" and "norm" in name:
            array = (array + np.float32(1)) - np.float32(1)
        left[name] = torch.from_numpy(np.array(array, np.float32))
    whole = type(model)(model.config)
    whole.load_state_dict(left)
    whole.save_pretrained(folder)
    vocabulary.tokenizer.save_pretrained(folder)
    return folder


def _architecture(name: str) -> Any:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _metadata(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture == "llama":
        own["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    if architecture == "gemma3":
        own["attention.key_length"] = config.head_dim
        own["attention.sliding_window"] = config.sliding_window
    return {"general.type": "model"} | {f"{architecture}.{k}": v for k, v in own.items()}


def _as_llama_cpp(
    name: str, array: np.ndarray, config: PretrainedConfig, architecture: str
) -> np.ndarray:
    """Rows of Llama's queries and keys in llama.cpp's order, and Gemma's norms with their 1."""
    if architecture == "gemma3" and "norm" in name:
        return array + np.float32(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if part in name), None)
    if architecture != "llama" or count is None:
        return array
    rows = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)
