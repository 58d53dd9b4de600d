"""Loading: models larger than one device, quantized ones, attention, what is refused, the hub."""

import gc
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from fusellm.config import LoraSettings, ModelSettings, Recipe
from fusellm.errors import ModelError
from fusellm.models import attention, load
from fusellm.models.adapters import ADAPTER_FILES, save_adapters, with_adapters
from fusellm.models.attention import choose_attention, implementations
from fusellm.models.configurations import class_of
from fusellm.models.headers import require_loadable, weight_problems
from fusellm.models.heads import head_of, hidden_states, input_device
from fusellm.models.load import load_model, locate, require_packages, weights_digest
from fusellm.store.identity import digest
from hubs import FIRST, SECOND, put_in_cache

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ROWS, LENGTHS = 64, (9, 4)
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
ALL_CPU = dict.fromkeys([*PLACES, "model.rotary_emb", "lm_head"], "cpu")


def save(folder: Path, tied: bool = False, kind: type[PretrainedConfig] = LlamaConfig) -> Path:
    torch.manual_seed(0)
    config = kind(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tied", tied=True)


def loaded(model: Path | str, **settings: Any) -> PreTrainedModel:
    return load_model(locate(ModelSettings(model=str(model), **settings), trusted=True), CPU)


@torch.no_grad()
def logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of two blocks in a padded batch, as externalize reads them."""
    place = input_device(model)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64, device=place)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.arange(3 + row, 3 + row + length)
        mask[row, :length] = 1
    hidden, head = hidden_states(model, input_ids=ids, attention_mask=mask), head_of(model)
    assert hidden.device == head.weight.device
    return [head.logits(row[:n]).cpu() for row, n in zip(hidden, LENGTHS, strict=True)]


def same(mine: PreTrainedModel, theirs: PreTrainedModel) -> None:
    for one, other in zip(logits(mine), logits(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


SPREADS = {
    "one device": {"": "cpu"},
    "auto": "auto",
    "sequential": "sequential",
    "a layer on disk": ALL_CPU | {"model.layers.1": "disk"},
    "the ends on disk": ALL_CPU | {"model.embed_tokens": "disk", "lm_head": "disk"},
    "all on disk": {"": "disk"},
}
HEAD_APART = {
    "the head on disk": {"model": "cpu", "lm_head": "disk"},
    "the embedding on disk": ALL_CPU | {"model.embed_tokens": "disk"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_spread_model_gives_what_one_device_gives(
    request: pytest.FixtureRequest, name: str, spread: str, dtype: str
) -> None:
    folder: Path = request.getfixturevalue(name)
    mine = loaded(folder, device_map=SPREADS[spread], dtype=dtype)
    same(mine, loaded(folder, dtype=dtype))


@pytest.mark.parametrize("spread", HEAD_APART)
def test_a_head_may_lie_elsewhere_unless_it_is_tied(llama: Path, tied: Path, spread: str) -> None:
    same(loaded(llama, device_map=HEAD_APART[spread]), loaded(llama))
    with pytest.raises(ModelError, match="head and the input embedding, which are tied, need the"):
        loaded(tied, device_map=HEAD_APART[spread])


def test_an_offloaded_head_stays_offloaded(llama: Path) -> None:
    model = loaded(llama, device_map=HEAD_APART["the head on disk"])
    head = head_of(model)
    assert head.weight.device == CPU
    assert torch.equal(head.weight, load_file(llama / "model.safetensors")["lm_head.weight"])
    assert model.get_output_embeddings().weight.is_meta


def test_a_model_whose_first_weights_are_offloaded_takes_its_tokens_on_a_device(
    llama: Path,
) -> None:
    model = loaded(llama, device_map={"": "disk"})
    assert model.device.type == "meta"
    assert input_device(model) == CPU
    assert input_device(loaded(llama)) == CPU


def test_what_is_written_to_offload_is_removed_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are stored apart and loaded together, so they cannot be read from their file."""
    folder = save(tmp_path / "mixtral", kind=MixtralConfig)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = loaded(folder, device_map={"": "disk"})
    assert list(tmp_path.glob("fusellm-offload-*/*.safetensors"))
    same(model, loaded(folder))
    del model
    gc.collect()
    assert not list(tmp_path.glob("fusellm-offload-*"))


@pytest.mark.parametrize("places", [{"": "nowhere"}, {"model.layers.1": "disk", "": "cpu"}])
def test_a_device_map_that_transformers_refuses_is_an_error(
    llama: Path, places: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match=r"llama could not be loaded: .*needs its place"):
        loaded(llama, device_map=places)


def test_a_spread_or_quantized_model_is_never_moved(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        pytest.fail("the model was moved")

    monkeypatch.setattr(PreTrainedModel, "to", refuse)
    loaded(llama, device_map={"": "cpu"})
    loaded(llama, device_map={"": "disk"})


# Quantization


def test_without_bitsandbytes_the_error_names_the_command_before_weights_are_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ModelError, match=r"pip install 'fusellm\[quantized\]'"):
        loaded(llama, quantization="8bit")
    stored = stored_as(llama, tmp_path / "stored", {"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"pip install 'fusellm\[quantized\]'"):
        loaded(stored)


def stored_as(model: Path, folder: Path, quantization: dict[str, Any]) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("places", [None, "auto"])
def test_quantization_is_asked_of_transformers(
    llama: Path, monkeypatch: pytest.MonkeyPatch, bits: str, places: str | None
) -> None:
    asked: dict[str, Any] = {}

    def spy(place: str, **arguments: Any) -> None:
        asked.update(arguments)
        raise OSError("seen")

    monkeypatch.setattr(load, "require_packages", lambda located: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    with pytest.raises(ModelError, match="seen"):
        loaded(llama, quantization=bits, dtype="bfloat16", device_map=places)
    wanted = asked["quantization_config"]
    assert (wanted.load_in_8bit, wanted.load_in_4bit) == (bits == "8bit", bits == "4bit")
    if bits == "4bit":
        assert wanted.bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["device_map"] == (places or {"": "cpu"})
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False


@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.1), ("4bit", 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_quantized_model_is_read_as_any_other(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: str,
    bits: str,
    error: float,
) -> None:
    pytest.importorskip("bitsandbytes")
    folder: Path = request.getfixturevalue(name)
    plain = logits(loaded(folder))
    monkeypatch.setattr(PreTrainedModel, "to", lambda *_, **__: pytest.fail("it was moved"))
    model = loaded(folder, quantization=bits, dtype=dtype)
    monkeypatch.undo()
    assert {p.dtype for p in model.model.layers.parameters()} & {torch.int8, torch.uint8}
    mine = logits(model)
    for one, other in zip(mine, plain, strict=True):
        assert 0 < float((one - other).norm() / other.norm()) < error
    model.save_pretrained(tmp_path / "stored")
    for one, other in zip(logits(loaded(tmp_path / "stored", dtype=dtype)), mine, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_stored_quantized_is_not_quantized_again(
    llama: Path, tmp_path: Path
) -> None:
    stored = stored_as(llama, tmp_path / "stored", {"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"stored quantized \(fp8\), .*quantization: 4bit; leave"):
        loaded(stored, quantization="4bit")


def test_a_quantized_head_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    every_layer = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    monkeypatch.setattr(load, "_bitsandbytes", lambda bits, dtype: every_layer)
    with pytest.raises(ModelError, match=r"the head of LlamaForCausalLM is quantized .*int8"):
        loaded(llama, quantization="8bit")


def test_a_quantized_target_is_refused_with_the_recipe() -> None:
    recipe = {
        "name": "r",
        "target": {"model": "zoo/prose"},
        "sources": [{"name": "big", "model": "zoo/python", "quantization": "4bit"}],
        "corpus": {"documents": [{"builtin": "prose"}]},
    }
    assert Recipe.model_validate(recipe).sources[0].precision == "float32, 4bit"
    recipe["target"] = {"model": "zoo/prose", "quantization": "8bit"}
    with pytest.raises(ValidationError, match=r"target.quantization: 8bit is for sources"):
        Recipe.model_validate(recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        {"quantization": "2bit"},
        {"device_map": "everywhere"},
        {"device_map": {}},
        {"attention": "fast"},
        {"attention": "flash_attention_2"},  # in float32
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ModelSettings(model="zoo/prose", **wrong)


# Attention

TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
CAPPED = Gemma2Config(**TINY)
UNCAPPED = Gemma2Config(**TINY, attn_logit_softcapping=None)
RANGE = FalconConfig(**TINY, alibi=True)


@pytest.mark.parametrize(
    ("config", "on_cpu", "on_gpu"),
    [
        (LlamaConfig(), None, "flash_attention_2"),
        (GPTNeoXConfig(), None, "flash_attention_2"),
        (MptConfig(), None, None),
        (BloomConfig(), None, None),
        (GptOssConfig(), None, None),  # its sinks are in kernels of its own only
        (CAPPED, "eager", "flash_attention_2"),
        (FalconConfig(), None, "flash_attention_2"),
        (RANGE, None, None),
    ],
)
def test_the_fastest_attention_is_chosen(
    config: PretrainedConfig,
    on_cpu: str | None,
    on_gpu: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_attention("auto", config, CPU, torch.bfloat16) == on_cpu
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: False)
    assert choose_attention("auto", config, CUDA, torch.bfloat16) == on_gpu
    assert choose_attention("auto", config, CUDA, torch.float32) == on_cpu
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: True)
    three = on_gpu and "flash_attention_3"
    assert choose_attention("auto", config, CUDA, torch.bfloat16) == three
    for generation, found in ((10, on_gpu), (7, on_cpu)):
        capability = (generation, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_attention("auto", config, CUDA, torch.float16) == found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), ["flash_attention_3", "flash_attention_2", "sdpa", "eager"]),
        (MptConfig(), ["eager"]),
        (CAPPED, ["flash_attention_3", "flash_attention_2", "eager"]),
        (RANGE, ["sdpa"]),
    ],
)
def test_what_an_architecture_does_not_have_is_refused_with_what_it_has(
    config: PretrainedConfig, expected: list[str]
) -> None:
    architecture = class_of(config)
    assert implementations(architecture, config) == expected
    for wanted in {"flash_attention_2", "sdpa", "eager"} - set(expected):
        with pytest.raises(ModelError, match=f"{wanted} is not .* which has {', '.join(expected)}"):
            choose_attention(wanted, config, CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "problem"),
    [
        (CPU, torch.bfloat16, "needs a CUDA device, not cpu"),
        (CUDA, torch.float32, "needs dtype bfloat16 or float16, not float32"),
        (CUDA, torch.float16, r"needs the package flash-attn \(pip install flash-attn\)"),
    ],
)
def test_flash_attention_that_cannot_run_is_refused_with_the_reason(
    device: torch.device, dtype: torch.dtype, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match=f"{problem}; or set attention: auto"):
        choose_attention("flash_attention_2", LlamaConfig(), device, dtype)


def test_flash_attention_is_for_reading_and_not_for_training(llama: Path) -> None:
    located = locate(
        ModelSettings(model=str(llama), dtype="bfloat16", attention="flash_attention_2")
    )
    with pytest.raises(ModelError, match="needs a CUDA device, not cpu"):
        load_model(located, CPU)
    assert load_model(located, CPU, torch.float32).config._attn_implementation == "sdpa"


def test_classes_without_sdpa_are_loaded_as_eager(llama: Path, tmp_path: Path) -> None:
    config = MptConfig(vocab_size=ROWS, d_model=16, n_layers=1, n_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mpt")
    assert loaded(tmp_path / "mpt").config._attn_implementation == "eager"
    assert loaded(llama).config._attn_implementation == "sdpa"
    with pytest.raises(
        ModelError, match="sdpa is not supported by MptForCausalLM, which has eager"
    ):
        loaded(tmp_path / "mpt", attention="sdpa")


# On GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("away", ["cpu", "disk", 1])
def test_spread_over_gpus_and_memory(
    request: pytest.FixtureRequest, name: str, away: str | int
) -> None:
    if torch.cuda.device_count() < (2 if away == 1 else 1):
        pytest.skip("needs more GPUs")
    folder: Path = request.getfixturevalue(name)
    places = dict.fromkeys(ALL_CPU, 0) | {"model.layers.1": away, "model.norm": away}
    if name == "llama":
        places["lm_head"] = away
    one = load_model(locate(ModelSettings(model=str(folder))), CUDA)
    same(loaded(folder, device_map=places), one)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_on_a_gpu(llama: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    settings = ModelSettings(model=str(llama), quantization=bits, dtype="bfloat16")
    model = load_model(locate(settings), CUDA)
    assert input_device(model) == CUDA
    for one, other in zip(logits(model), logits(loaded(llama)), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.5


@pytest.mark.gpu
def test_flash_attention_reads_padded_blocks_as_sdpa_does(llama: Path) -> None:
    pytest.importorskip("flash_attn")
    found = {}
    for name in ("auto", "sdpa"):
        settings = ModelSettings(model=str(llama), attention=name, dtype="bfloat16")
        model = load_model(locate(settings), CUDA)
        found[name] = logits(model)
        assert model.config._attn_implementation.startswith("flash") == (name == "auto")
    for one, other in zip(found["auto"], found["sdpa"], strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


# What is refused


def test_missing_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "part")
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    for settings in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises(ModelError, match=r"lacks weights .*up_proj.* they would be random"):
            loaded(tmp_path / "part", **settings)


def test_code_of_a_model_does_not_run_unless_it_is_trusted(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    with pytest.raises(ModelError, match="comes with code of its own"):
        loaded(folder)
    assert not (tmp_path / "ran").exists()
    same(loaded(folder, trust_remote_code=True), loaded(llama))
    assert loaded(folder, trust_remote_code=True, attention="eager")


# What is known of files before any weight is read


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not read."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )


def sharded(model: Path, folder: Path) -> Path:
    LlamaForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_headers_of_models_that_load_have_no_problem(
    llama: Path, tied: Path, tmp_path: Path
) -> None:
    mixtral = save(tmp_path / "mixtral", kind=MixtralConfig)  # whose experts are stored apart
    for folder in (llama, tied, mixtral, sharded(llama, tmp_path / "shards")):
        assert weight_problems(locate(ModelSettings(model=str(folder)))) == []


def pointer(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    )


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "Git LFS": (pointer, "model.safetensors of .* is a Git LFS pointer .*: git -C .* lfs pull"),
    "LFS config": (lambda f: pointer(f, "config.json"), "config.json of .* is a Git LFS pointer"),
    "cut off": (cut_off, "model.safetensors of .* is no whole safetensors file .*; fetch it again"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "no whole safetensors file"),
    "vocabulary": (
        lambda f: with_config(f, vocab_size=70),
        r" of .* is 64 × 64, and by its config.json 70 × 64 \(and 1 more\); take both from one",
    ),
    "hidden size": (lambda f: with_config(f, hidden_size=32), "64 × 64, and by its config.json"),
    "missing": (lambda f: with_weights(f, lambda w: w.pop(QUERY)), f"lacks weights .*{QUERY}"),
    "types": (
        lambda f: with_weights(f, lambda w: w.update({QUERY: w[QUERY].to(torch.uint8)})),
        f"stores {QUERY} as U8, and its config.json has no quantization_config",
    ),
    "quantization": (
        lambda f: with_config(f, quantization_config={"quant_method": "shrunk"}),
        "is stored quantized .shrunk., and cannot be loaded so: Unknown quantization type",
    ),
    "package": (
        lambda f: with_config(f, quantization_config={"quant_method": "awq", "bits": 4}),
        "is stored quantized .awq., and cannot be loaded so: .*pip install",
    ),
    "encoder": (
        lambda f: with_config(f, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "is a T5ForConditionalGeneration, an encoder with a decoder; fusellm reads causal",
    ),
    "masked": (
        lambda f: with_config(f, model_type="bert", architectures=["BertForMaskedLM"]),
        "is a BertForMaskedLM; fusellm reads causal language models",
    ),
    "reward": (
        lambda f: with_config(f, architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification; fusellm reads causal language models",
    ),
    "vision": (
        lambda f: with_config(f, model_type="vit", architectures=["ViTModel"]),
        "is a ViTModel; fusellm reads causal",
    ),
    "unknown": (
        lambda f: with_config(f, model_type="llama9"),
        "is of the model type 'llama9', which the installed transformers .* does not have; a newer",
    ),
    "no type": (
        lambda f: (f / "config.json").write_text("{}"),
        "the config.json of .* has no model_type",
    ),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "the config.json of .* cannot be used: .*not a valid JSON file",
    ),
    "no number": (lambda f: with_config(f, hidden_size="wide"), "config.json of .* cannot be used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_models_files_is_told_before_they_are_read(
    llama: Path, tmp_path: Path, unread: None, fault: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        require_loadable(locate(ModelSettings(model=str(folder))))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_shards_are_all_there_and_have_what_the_index_says(
    llama: Path, tmp_path: Path, unread: None
) -> None:
    folder = sharded(llama, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shards = sorted(set(whole["weight_map"].values()))

    def problem(weight_map: object) -> str:
        index.write_text(json.dumps(whole | {"weight_map": weight_map}))
        with pytest.raises(ModelError) as caught:
            require_loadable(locate(ModelSettings(model=str(folder))))
        return str(caught.value)

    of = whole["weight_map"]
    elsewhere = next(shard for shard in shards if shard != of[EMBEDDING])
    assert f"{elsewhere} of {folder} does not have {EMBEDDING}" in problem(
        of | {EMBEDDING: elsewhere}
    )
    assert "no lost.safetensors" in problem(of | {"more.weight": "lost.safetensors"})
    assert "names a file outside of its folder (../x.safetensors)" in problem(
        of | {EMBEDDING: "../x.safetensors"}
    )
    assert "names a file outside of its folder (/x.safetensors)" in problem(
        of | {EMBEDDING: "/x.safetensors"}
    )
    assert "does not say which tensor is in which file" in problem([])
    first = load_file(folder / shards[0])
    save_file(load_file(folder / shards[1]) | first, folder / shards[1], {"format": "pt"})
    assert f"is in {shards[1]} and elsewhere" in problem(of)
    pointer(folder, shards[1])
    assert f"{shards[1]} of {folder} is a Git LFS pointer" in problem(of)


def test_a_fingerprint_covers_every_file_that_is_loaded(llama: Path, tmp_path: Path) -> None:
    folder = sharded(llama, tmp_path / "model")
    (folder / "own.py").write_text("VALUE = 1\n")

    def fingerprint(**settings: Any) -> str:
        return locate(ModelSettings(model=str(folder), **settings), trusted=True).fingerprint

    seen = {fingerprint(), fingerprint(trust_remote_code=True)}
    assert len(seen) == 2
    (folder / "own.py").write_text("VALUE = 2\n")
    assert fingerprint() in seen  # no code is loaded
    assert fingerprint(trust_remote_code=True) not in seen
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"metadata": {', '"metadata": {"more": 1, '))
    assert fingerprint() not in seen


def test_a_model_in_one_file_has_the_fingerprint_that_it_had(llama: Path) -> None:
    """Stores that were made before headers were read are taken."""
    names = ("model.safetensors", "config.json")
    sums = {name: hashlib.sha256((llama / name).read_bytes()).hexdigest() for name in names}
    assert locate(ModelSettings(model=str(llama))).fingerprint == digest(sums)


def test_adapters_beside_a_model_are_merged_and_part_of_its_fingerprint(
    llama: Path, tmp_path: Path
) -> None:
    apart, beside = tmp_path / "adapters", tmp_path / "model"
    torch.manual_seed(0)
    settings = LoraSettings(r=2, target_modules=["q_proj"])
    adapted = with_adapters(loaded(llama), settings, None)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapters(adapted, apart)
    shutil.copytree(llama, beside)
    for name in ADAPTER_FILES:
        shutil.copy(apart / name, beside / name)
    plain, found = (locate(ModelSettings(model=str(folder))) for folder in (llama, beside))
    assert found.fingerprint != plain.fingerprint
    model = load_model(found, CPU)
    assert model.name_or_path == str(beside)
    same(model, loaded(apart))
    assert not any("lora" in name for name, _ in model.named_parameters())
    for one, other in zip(logits(model), logits(loaded(llama)), strict=True):
        assert (one - other).abs().max() > 0.01
    before = weights_digest(found)
    assert before != weights_digest(plain)
    config = json.loads((beside / "adapter_config.json").read_text())
    (beside / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    scaled = locate(ModelSettings(model=str(beside)))
    assert scaled.fingerprint not in (plain.fingerprint, found.fingerprint)
    assert weights_digest(scaled) != before
    (beside / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"adapters beside its model .*take adapter_config.json away"
    ):
        locate(ModelSettings(model=str(beside)))


def test_adapters_on_a_model_with_adapters_are_refused(llama: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=2, target_modules=["q_proj"])
    for name, base in (("one", llama), ("two", tmp_path / "one")):
        adapted = with_adapters(loaded(llama), settings, None)
        save_adapters(adapted, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"are on has adapters itself .*merge those into it first"):
        locate(ModelSettings(model=str(tmp_path / "two")))


def test_headers_of_a_hub_model_are_read_from_the_cache(hub: Path, llama: Path) -> None:
    snapshot = put_in_cache(hub, llama, FIRST)
    located = locate(ModelSettings(model="someone/tiny"))
    assert weight_problems(located) == []
    (snapshot / "model.safetensors").unlink()
    (problem,) = weight_problems(located)
    assert "no model.safetensors nor model.safetensors.index.json in the local hub cache" in problem


# The hub


def test_a_hub_model_is_read_at_the_commit_that_was_located(
    hub: Path, llama: Path, tied: Path
) -> None:
    put_in_cache(hub, llama, FIRST)
    located = locate(ModelSettings(model="someone/tiny"))
    assert (located.commit, located.place) == (FIRST, "someone/tiny")
    put_in_cache(hub, tied, SECOND)  # `main` moves on
    later = locate(ModelSettings(model="someone/tiny"))
    assert later.commit == SECOND
    assert later.fingerprint != located.fingerprint
    same(load_model(located, CPU), loaded(llama))
    same(load_model(later, CPU), loaded(tied))
    pinned = locate(ModelSettings(model="someone/tiny", revision=FIRST))
    assert (pinned.commit, pinned.fingerprint) == (FIRST, located.fingerprint)
    with pytest.raises(ModelError, match="no folder of the model someone/tiny at nowhere"):
        locate(ModelSettings(model="someone/tiny", revision="nowhere"))


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_have_the_same_digest_in_a_folder_and_on_the_hub(
    hub: Path, llama: Path, tmp_path: Path, shards: int
) -> None:
    folder = tmp_path / "model"
    size = {1: "1GB", 3: "40KB"}[shards]
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    snapshot = put_in_cache(hub, folder, FIRST)
    located = locate(ModelSettings(model="someone/tiny"))
    load_model(located, CPU)
    found = weights_digest(located)
    assert len(found) == 64
    local = locate(ModelSettings(model=str(folder)))
    assert local.commit is None
    assert weights_digest(local) == found
    (folder / "adapter_model.safetensors").write_bytes(b"not among the model's weights")
    assert weights_digest(locate(ModelSettings(model=str(folder)))) == found
    one = sorted(folder.glob("model*.safetensors"))[-1]
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    assert weights_digest(locate(ModelSettings(model=str(folder)))) != found
    (snapshot / one.name).unlink()
    with pytest.raises(ModelError, match=r"in the local hub cache .* load the model first"):
        weights_digest(located)


def test_a_weight_file_of_another_name_has_another_digest(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(llama, folder)
    weights = (folder / "model.safetensors").rename(folder / "other.safetensors")
    names = dict.fromkeys(load_file(weights), weights.name)
    index = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    digests = [weights_digest(locate(ModelSettings(model=str(f)))) for f in (llama, folder)]
    assert digests[0] != digests[1]
    same(loaded(folder), loaded(llama))


def test_a_hub_model_of_pickles_is_refused(hub: Path, llama: Path) -> None:
    snapshot = put_in_cache(hub, llama, FIRST)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors"):
        loaded("someone/tiny")


def test_packages_can_be_checked_beforehand(llama: Path) -> None:
    require_packages(locate(ModelSettings(model=str(llama))))
