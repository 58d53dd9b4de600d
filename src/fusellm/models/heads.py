"""How each architecture gets from its last hidden states to logits, wherever its layers lie.

A model that is spread over devices has accelerate's hooks on its modules: a hook knows the device
that its module runs on, and brings offloaded weights there for as long as the module runs.

A head with a low-rank adapter, W + s·BA, is one of wider hidden states: [h, s·A·h] on [W, B], so
that A and B have gradients, and an adapter's dropout is its own. Several are set side by side.

B blocks, T positions, d hidden size, r rank of an adapter, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from fusellm.errors import ModelError
from fusellm.models.swapped_forward import swapped_forward
from fusellm.objective.chunked import Head

# The setting that multiplies logits, by model_type; elsewhere `logits_scaling` divides (Granite).
_MULTIPLIERS = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_PROBE_TOKENS = 8

Result = TypeVar("Result")


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with the scaling and capping of its architecture.

    Weights that are offloaded are brought to the device that the head runs on; hold on to the
    result rather than ask for each batch anew. Where the head has adapters, its weight is
    [V, d + r], r of all of them together, for the hidden states of `hidden_states`.

    Raises:
        ModelError: the model has no linear output embedding, or a quantized one, or one with an
            adapter of another kind than LoRA.
    """
    layers = _head_layers(model)
    layer, name = layers.own, type(model).__name__
    if not isinstance(layer, torch.nn.Linear):
        raise ModelError(
            f"{name} has no linear head over its vocabulary (found {type(layer).__name__}); "
            "fusellm needs a causal language model"
        )
    weight, bias = _tensors(layer)
    if weight.is_meta:
        raise ModelError(
            f"the weights of {name}'s head are on no device; name a place for it in device_map"
        )
    if not weight.is_floating_point():
        raise ModelError(
            f"the head of {name} is quantized ({type(layer).__name__}, {weight.dtype}); fusellm "
            "needs it whole: quantize the model without its head"
        )
    if layers.tokens is not None:
        weight = layers.tokens.get_merged_weights(layers.tokens.active_adapters)
    if layers.adapters:
        ups = [adapter.up.weight.to(weight.dtype) for adapter in layers.adapters]
        weight = torch.cat([weight, *ups], dim=1)
    for adapter in layers.adapters:
        if adapter.up.bias is not None:
            added = adapter.up.bias * adapter.scale
            bias = added if bias is None else bias + added.to(bias.dtype)
    config = model.config.get_text_config()
    return Head(weight, bias, _scale(config), _cap(config))


def hidden_states(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """[B, T, d] hidden states as the head takes them: on its device, in its precision.

    Inputs may be on any device if the model is spread over several. Where the head has
    adapters they are [B, T, d + r].
    """
    place = _runs_on(model.get_input_embeddings())
    if place is not None:
        inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
    hidden: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    layers = _head_layers(model)
    head = layers.own
    hidden = hidden.to(_runs_on(head) or hidden.device)
    whole = isinstance(head, torch.nn.Linear) and head.weight.is_floating_point()
    if whole and not torch.is_autocast_enabled(hidden.device.type):  # which casts by itself
        hidden = hidden.to(head.weight.dtype)  # Mamba's are float32 whatever its weights are
    if not layers.adapters:
        return hidden
    inner = [adapter.inner(hidden).to(hidden.dtype) for adapter in layers.adapters]
    return torch.cat([hidden, *inner], dim=-1)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the head's weights are spread over the processes of a training (FSDP2)."""
    return isinstance(getattr(_head_layers(model).own, "weight", None), DTensor)


def through_head(
    model: PreTrainedModel, hidden: torch.Tensor, use: Callable[[torch.Tensor, Head], Result]
) -> Result:
    """What `use` makes of hidden states and the head, called as the forward of the head's module.

    FSDP has a module's weights whole for as long as its forward runs, and takes their gradients
    from there, so that `use` finds them whole. It may cast the tensors that a forward is given to
    another precision; only the hidden states are.
    """
    layer: Any = model.get_output_embeddings()
    if layer is None:
        return use(hidden, head_of(model))  # which says that there is none
    with swapped_forward(layer, lambda hidden: use(hidden, head_of(model))):
        result: Result = layer(hidden)
    return result


@dataclass(frozen=True)
class _Adapter:
    """A low-rank adapter: `up` [V, r] of `scale` times `down` [r, d] of hidden states."""

    down: torch.nn.Linear
    up: torch.nn.Linear
    dropout: torch.nn.Module
    scale: float

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., r] what `up` takes."""
        low_rank: torch.Tensor = self.down(self.dropout(hidden.to(self.down.weight.dtype)))
        return low_rank * self.scale


@dataclass(frozen=True)
class _HeadLayers:
    """What a head is made of, as PEFT's own forward would use it now.

    Attributes:
        own: the head's own layer; of one that is trained whole, its new copy.
        adapters: that are added to it.
        tokens: PEFT's layer that has new rows for some tokens, in place of the head's own.
    """

    own: Any
    adapters: tuple[_Adapter, ...] = ()
    tokens: Any = None


def _head_layers(model: PreTrainedModel) -> _HeadLayers:
    """The layers of a head; adapters that are off, or merged into its weights, are left out.

    Raises:
        ModelError: it has an adapter of a kind that is not known.
    """
    layer: Any = model.get_output_embeddings()
    if not hasattr(layer, "active_adapters"):
        return _HeadLayers(layer)
    own = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
    tuner = getattr(layer, "token_adapter", layer)
    if layer.disable_adapters and tuner.merged_adapters:
        tuner.unmerge()  # as PEFT's own forward does
    if layer.disable_adapters or tuner.merged_adapters or not layer.active_adapters:
        return _HeadLayers(own)
    if hasattr(tuner, "get_merged_weights"):
        return _HeadLayers(own, tokens=tuner)
    if hasattr(layer, "modules_to_save"):
        copies = dict(layer.modules_to_save)
        return _HeadLayers(copies.get(layer.active_adapters[0], own))  # PEFT has one active there
    return _HeadLayers(own, _adapters_of(layer))


def _adapters_of(layer: Any) -> tuple[_Adapter, ...]:
    """The active low-rank adapters of a head; others may be active elsewhere in the model.

    Raises:
        ModelError: they are of another kind.
    """
    # FSDP2 makes a class of its own of each sharded layer's: PEFT's is among those it is of.
    modules = [one.__module__.split(".") for one in type(layer).__mro__]
    kinds = {next(one[2] for one in modules if one[:2] == ["peft", "tuners"])}  # …KIND.layer
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    variants = getattr(layer, "lora_variant", {})
    kinds |= {type(variants[name]).__name__ for name in names if name in variants}
    if kinds != {"lora"}:
        raise ModelError(
            f"the head has an adapter of PEFT's kind {', '.join(sorted(kinds - {'lora'}))}, which "
            "is not known here; use LoRA on it, train it whole (modules_to_save), or leave it out "
            "of target_modules"
        )
    parts = ("lora_A", "lora_B", "lora_dropout", "scaling")
    return tuple(_Adapter(*(getattr(layer, part)[name] for part in parts)) for name in names)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model takes its tokens on.

    `model.device` is "meta" where the first weights are offloaded.
    """
    return _runs_on(model.get_input_embeddings()) or model.device


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that hidden states and head give what the model itself gives.

    Raises:
        ModelError: they do not: the architecture scales or caps its logits in a way of its own.
    """
    head = head_of(model)
    ids = torch.arange(min(_PROBE_TOKENS, len(head.weight)), device=input_device(model))[None]
    ours = head.logits(hidden_states(model, input_ids=ids)[0])
    reference = model(input_ids=ids, use_cache=False).logits[0].float().to(ours.device)
    name = type(model).__name__
    if ours.shape != reference.shape:
        raise ModelError(
            f"{name} gives {reference.shape[-1]} logits from a head of {ours.shape[-1]} rows, in a "
            "way that fusellm does not know; please report the architecture"
        )
    apart = (ours - reference).abs().max()
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.02
    if bool(apart > tolerance * reference.abs().max() + 1e-6):
        raise ModelError(
            f"{name} makes its logits in a way that fusellm does not know (they differ by "
            f"{float(apart):.3g}); please report the architecture"
        )


def layers_before_head(model: PreTrainedModel) -> list[str]:
    """Weights that stand with the head in a module of its own, as BERT's dense layer does.

    They change the hidden states on their way to the head, so that `check_head` would refuse the
    model; this is told without any numbers.
    """
    layer: Any = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is layer), "")
    holder = model.get_submodule(name.rpartition(".")[0])
    inner = {model.base_model, model.get_input_embeddings()}
    if not isinstance(layer, torch.nn.Linear) or not inner.isdisjoint(holder.modules()):
        return []
    own = f"{name.rpartition('.')[2]}."
    weights = [one for one, _ in holder.named_parameters() if "." in one]  # a bias is the head's
    return [one for one in weights if not one.startswith(own)]


_KNOWN: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models whose head was looked at, with what it was made of then."""


def require_known_head(model: PreTrainedModel) -> None:
    """Check a model's head, as `check_head` does, where that was not done before.

    It is done anew where adapters on the head have changed since.

    The model is left as it was, dropout and all. One whose weights are nowhere yet is passed over.

    Raises:
        ModelError: as `check_head` does.
    """
    made_of = _made_of(model)
    if _KNOWN.get(model) == made_of or any(p.is_meta for p in model.parameters()):
        return
    with left_as_it_was(model):
        model.eval()
        check_head(model)
    _KNOWN[model] = made_of


def _made_of(model: PreTrainedModel) -> str:
    """Of what kinds the layers of a head are, and how many adapters there are."""
    layers = _head_layers(model)
    kinds = [type(model.get_output_embeddings()), type(layers.own), type(layers.tokens)]
    return f"{kinds}, {len(layers.adapters)}"


@contextmanager
def left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Have each module of a model be in training or not, after the block, as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _scale(config: PretrainedConfig) -> float:
    multiplier = _MULTIPLIERS.get(config.model_type)
    if multiplier is not None:
        return float(getattr(config, multiplier, None) or 1.0)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)


def _cap(config: PretrainedConfig) -> float | None:
    return next((float(v) for key in _CAPS if (v := getattr(config, key, None))), None)


def is_plain(config: PretrainedConfig) -> bool:
    """Whether an architecture's logits are what its head gives, neither scaled nor capped."""
    text = config.get_text_config()
    return _scale(text) == 1.0 and _cap(text) is None


def _runs_on(module: torch.nn.Module | None) -> torch.device | None:
    """The device that accelerate's hooks run a module on; None where it has none."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def _tensors(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [V, d], bias [V] or None), brought from CPU or disk where they are offloaded."""
    if not layer.weight.is_meta:
        return layer.weight, layer.bias
    with align_module_device(layer):
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
