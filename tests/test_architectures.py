"""Hidden states and head give each architecture's own logits, whatever it does to them.

Every model is tiny, random, saved and loaded as a user's is. What an architecture does in its own
way is set so that leaving it out would show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from fusellm.config import ModelSettings
from fusellm.errors import ArgumentError, ModelError
from fusellm.models import heads
from fusellm.models.adapters import without_adapters
from fusellm.models.attention import implementations
from fusellm.models.headers import weight_problems
from fusellm.models.heads import check_head, head_of, hidden_states, require_known_head
from fusellm.models.load import load_model, locate
from fusellm.objective.divergence import CROSS_ENTROPY
from fusellm.training.fit import Fit
from fusellm.training.loss import fusion_loss

CPU = torch.device("cpu")
ROWS, TOKENS = 72, 61  # of the head, and of them with a token
LENGTHS = (12, 3, 7, 1)  # of blocks

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_GEMMA = _LLAMA | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
_MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        config: name of its class in transformers.
        changes: to the configuration.
        quirks: fields of `Head` that must matter, with what they are without the quirk.
        tied: whether the head is the input embedding.
    """

    config: str
    changes: dict[str, Any]
    quirks: dict[str, Any] = field(default_factory=dict)
    tied: bool = False


_NO_SCALE, _NO_CAP, _NO_BIAS = {"scale": 1.0}, {"softcap": None}, {"bias": None}
CASES = {
    "llama": Case("LlamaConfig", _LLAMA),
    "llama, tied": Case("LlamaConfig", _LLAMA | {"tie_word_embeddings": True}, tied=True),
    "neox": Case("GPTNeoXConfig", _LLAMA),
    "neox, tied": Case("GPTNeoXConfig", _LLAMA | {"tie_word_embeddings": True}, tied=True),
    "gpt2": Case("GPT2Config", _GPT, tied=True),
    "mpt": Case("MptConfig", {"d_model": 16, "n_layers": 2, "n_heads": 2}, tied=True),
    # transformers' MPT leaves `logit_scale` out of its forward; its own forward is what counts.
    "mpt, logit_scale": Case(
        "MptConfig", {"d_model": 16, "n_layers": 2, "n_heads": 2, "logit_scale": 0.2}, tied=True
    ),
    "qwen2": Case("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}, tied=True),
    "gemma2": Case(
        "Gemma2Config",
        _GEMMA | {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.3},
        _NO_CAP,
        tied=True,
    ),
    "gemma3": Case(
        "Gemma3TextConfig", _GEMMA | {"final_logit_softcapping": 0.5}, _NO_CAP, tied=True
    ),
    "phi": Case("PhiConfig", _LLAMA, _NO_BIAS),
    "gptj": Case("GPTJConfig", _GPT | {"rotary_dim": 4}, _NO_BIAS),
    "mixtral": Case(
        "MixtralConfig",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "cohere": Case("CohereConfig", _LLAMA | {"logit_scale": 0.2}, _NO_SCALE, tied=True),
    "cohere2": Case("Cohere2Config", _LLAMA | {"logit_scale": 3.0}, _NO_SCALE, tied=True),
    "granite": Case("GraniteConfig", _LLAMA | {"logits_scaling": 5.0}, _NO_SCALE),
    "granite moe": Case(
        "GraniteMoeConfig",
        _LLAMA | {"logits_scaling": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2},
        _NO_SCALE,
    ),
    "opt": Case(
        "OPTConfig",
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 8,
        },
        tied=True,
    ),
    "bloom": Case("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}, tied=True),
    "falcon": Case("FalconConfig", _LLAMA | {"alibi": False}, tied=True),
    "falcon, alibi": Case("FalconConfig", _LLAMA | {"alibi": True}, tied=True),
    "stablelm": Case("StableLmConfig", _LLAMA),
    "mamba": Case("MambaConfig", _MAMBA, tied=True),
    "recurrent gemma": Case(
        "RecurrentGemmaConfig",
        _LLAMA
        | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 16}
        | {"logits_soft_cap": 0.5},
        _NO_CAP,
        tied=True,
    ),
    "falcon h1": Case(
        "FalconH1Config",
        _LLAMA
        | {"lm_head_multiplier": 0.2, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8}
        | {"mamba_d_state": 4, "mamba_chunk_size": 8},
        _NO_SCALE,
    ),
    "minicpm3": Case(
        "MiniCPM3Config",
        _LLAMA
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
        | {"v_head_dim": 4, "num_key_value_heads": 4, "dim_model_base": 4},
        _NO_SCALE,
        tied=True,
    ),
    "hyperclovax": Case("HyperCLOVAXConfig", _LLAMA | {"logits_scaling": 0.2}, _NO_SCALE),
}


def build(case: Case) -> PreTrainedModel:
    """A random model whose every parameter matters."""
    kind = getattr(transformers, case.config, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {case.config}")
    ids = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    config = kind(**({"vocab_size": ROWS, "initializer_range": 0.3} | ids | case.changes))
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of each case's model, made when it is first asked for."""
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        place: Path = root / name
        if not place.exists():
            build(CASES[name]).save_pretrained(place)
        return place

    return folder


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    located = locate(ModelSettings(model=str(folder), **settings))
    assert weight_problems(located) == []
    return load_model(located, CPU)


def blocks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, TOKENS, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def own_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """What the model itself says of each block: alone, without padding."""
    return [model(input_ids=ids[None]).logits[0].float() for ids in blocks()]


@torch.no_grad()
def hidden_in_a_batch(model: PreTrainedModel) -> list[torch.Tensor]:
    """Hidden states of each block, all of them in one batch padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(blocks(), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(b) for b in blocks()], True)
    hidden = hidden_states(model, input_ids=ids, attention_mask=mask)
    return [row[:length] for row, length in zip(hidden, LENGTHS, strict=True)]


def apart(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest logit."""
    worst = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
    return worst / max(float(b.abs().max()) for b in theirs)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_head_give_the_models_own_logits(saved: Any, name: str) -> None:
    case = CASES[name]
    model = load(saved(name))
    expected = own_logits(model)
    hidden = hidden_in_a_batch(model)
    head = head_of(model)
    assert head.weight.shape[0] == ROWS
    assert (head.weight is model.get_input_embeddings().weight) == case.tied
    with torch.no_grad():
        assert apart([head.logits(h) for h in hidden], expected) < 1e-5
        for quirk, without in case.quirks.items():
            plain = replace(head, **{quirk: without})
            assert apart([plain.logits(h) for h in hidden], expected) > 0.05
    assert case.quirks or head == replace(head, bias=None, scale=1.0, softcap=None)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_they_agree_to_its_precision(saved: Any, name: str) -> None:
    model = load(saved(name), dtype="bfloat16")
    head = head_of(model)
    assert head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        mine = [head.logits(h) for h in hidden_in_a_batch(model)]
    assert apart(mine, own_logits(model)) < 0.03
    exact = own_logits(load(saved(name)))
    errors = [(a - b).abs().amax(-1) / b.abs().amax(-1) for a, b in zip(mine, exact, strict=True)]
    assert torch.cat(errors).median() < 0.05  # the median: rounding may choose another expert


@pytest.mark.parametrize("name", CASES)
def test_every_attention_implementation_reads_padded_blocks_alike(saved: Any, name: str) -> None:
    model = load(saved(name))
    expected = own_logits(model)
    found = implementations(type(model), model.config)
    for attention in [one for one in found if not one.startswith("flash")]:
        model = load(saved(name), attention=attention)
        assert model.config._attn_implementation == attention
        head = head_of(model)
        with torch.no_grad():
            assert apart([head.logits(h) for h in hidden_in_a_batch(model)], expected) < 2e-5


def test_the_experts_of_a_mixture_are_chosen_by_token(saved: Any) -> None:
    model = load(saved("mixtral"))
    with torch.no_grad():
        routers = model(input_ids=blocks()[0][None], output_router_logits=True).router_logits
    for router in routers:
        assert len({tuple(sorted(pair)) for pair in router.topk(2).indices.tolist()}) > 1


LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}


def with_peft(*configs: Any, case: str = "llama") -> Any:
    """A random model with adapters of several configurations, all of them active."""
    torch.manual_seed(3)
    model = peft.get_peft_model(build(CASES[case]), configs[0], "0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    model.base_model.set_adapter([str(number) for number in range(len(configs))])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_B", "tokens_delta", "modules_to_save")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def logits_are_the_models_own(model: Any) -> bool:
    base = without_adapters(model)
    head_apart = []
    for ids in blocks():
        with torch.no_grad():
            mine_ = head_of(base).logits(hidden_states(base, input_ids=ids[None])[0])
            head_apart.append(float((mine_ - model(input_ids=ids[None]).logits[0]).abs().max()))
    return max(head_apart) < 1e-4


TOKENS_ALONE = {"trainable_token_indices": [3, 4]}
ADAPTERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "one": ("llama", [LORA]),
    "two": ("llama", [LORA, LORA | {"r": 3, "lora_alpha": 2}]),
    "two, one of them elsewhere": ("llama", [LORA | {"target_modules": ["q_proj"]}, LORA]),
    "none on the head": ("llama", [LORA | {"target_modules": ["q_proj"]}]),
    "with a bias": ("phi", [LORA | {"lora_bias": True}]),
    "tokens of a tied head": (
        "llama, tied",
        [LORA | TOKENS_ALONE | {"target_modules": ["q_proj"]}],
    ),
    "a head trained whole": (
        "llama",
        [LORA | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_a_head_count_as_peft_counts_them(name: str) -> None:
    """On, switched off, merged, and merged and switched off; the head is looked at each time."""
    case, settings = ADAPTERS[name]
    model = with_peft(*(peft.LoraConfig(**one) for one in settings), case=case)
    require_known_head(without_adapters(model))
    assert logits_are_the_models_own(model)
    with model.disable_adapter():
        assert logits_are_the_models_own(model)
    model.merge_adapter()
    require_known_head(without_adapters(model))
    assert logits_are_the_models_own(model)
    with model.disable_adapter():
        assert logits_are_the_models_own(model)
    assert logits_are_the_models_own(model)


def test_rows_of_new_tokens_have_the_gradients_of_full_logits() -> None:
    model = with_peft(peft.TrainableTokensConfig(token_indices=[3, 4]), case="llama, tied")
    ids = blocks()[0][None]
    base = without_adapters(model)
    logits = head_of(base).logits(hidden_states(base, input_ids=ids))
    for scores in (model(input_ids=ids).logits, logits):
        scores.float().logsumexp(-1).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(ours) == 1
    model.zero_grad()
    (2 * model(input_ids=ids).logits.float().logsumexp(-1).sum()).backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(r=2, target_modules=["lm_head"]), "loha"),
        (peft.OFTConfig(oft_block_size=4, target_modules=["lm_head"]), "oft"),
        (peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
        (peft.LoraConfig(use_dora=True, target_modules=["lm_head"]), "Dora"),
    ],
)
def test_other_adapters_on_a_head_are_refused_and_elsewhere_taken(config: Any, kind: str) -> None:
    model = build(CASES["llama"])
    require_known_head(model)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ModelError, match=f"PEFT's kind {kind}"):
        require_known_head(without_adapters(adapted))
    config.target_modules = ["q_proj"]
    elsewhere = peft.get_peft_model(build(CASES["llama"]), config)
    assert logits_are_the_models_own(elsewhere.eval())


def test_a_loss_of_the_router_is_refused_and_without_it_the_loss_is_the_models_own() -> None:
    model = build(CASES["mixtral"])
    ids = blocks()[0][None]
    with pytest.raises(ArgumentError, match="MixtralForCausalLM adds a loss of its router"):
        fusion_loss(hidden_states(model, input_ids=ids), model, ids)
    with pytest.raises(ArgumentError, match="MixtralForCausalLM adds a loss of its router"):
        Fit(model, None, CROSS_ENTROPY)
    with_router = model(input_ids=ids, labels=ids).loss
    model.config.output_router_logits = False
    own = model(input_ids=ids, labels=ids).loss
    assert not torch.isclose(own, with_router, rtol=1e-4)
    mine = fusion_loss(hidden_states(model, input_ids=ids), model, ids)
    torch.testing.assert_close(mine, own)
    Fit(model, None, CROSS_ENTROPY)


class _Scaled(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 1.05
        return found


class _Capped(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        cap = 3 * found.logits.abs().max()
        found.logits = torch.tanh(found.logits / cap) * cap
        return found


class _Cut(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits[..., :TOKENS]
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [_Scaled, _Capped, _Cut])
def test_logits_made_in_an_unknown_way_are_refused(
    kind: type[LlamaForCausalLM], dtype: torch.dtype
) -> None:
    model = kind(LlamaConfig(vocab_size=ROWS, initializer_range=0.3, **_LLAMA)).to(dtype)
    with pytest.raises(ModelError, match="in a way that fusellm does not know"):
        check_head(model)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "scale" in case.quirks])
def test_a_scale_that_is_not_in_the_table_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(CASES[name])
    check_head(model)
    monkeypatch.setattr(heads, "_scale", lambda config: 1.0)
    with pytest.raises(ModelError, match="in a way that fusellm does not know"):
        check_head(model)


def test_models_without_a_plain_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no linear head over its vocabulary"):
        head_of(LlamaModel(LlamaConfig(vocab_size=ROWS, **_LLAMA)))
    config = BertConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=True,
        initializer_range=0.3,
    )
    with pytest.raises(ModelError, match="in a way that fusellm does not know"):
        check_head(BertLMHeadModel(config).eval())
    BertLMHeadModel(config).save_pretrained(tmp_path)
    (problem,) = weight_problems(locate(ModelSettings(model=str(tmp_path))))
    assert "is a BertLMHeadModel, which has layers of its own before its head" in problem
    assert "(transform.dense.weight, " in problem
