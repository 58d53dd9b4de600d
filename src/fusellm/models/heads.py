"""How each architecture gets from its last hidden states to logits.

B blocks, T positions, d hidden size, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from fusellm.errors import ModelError
from fusellm.objective.chunked import Head


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with the scaling and capping of its architecture.

    Raises:
        ModelError: the model has no linear output embedding.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear head over its vocabulary (found "
            f"{type(layer).__name__}); fusellm needs a causal language model"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale /= config.logits_scaling
    if model.config.model_type in ("cohere", "cohere2") and getattr(config, "logit_scale", None):
        scale *= config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    return Head(layer.weight, layer.bias, scale, softcap)


def last_hidden(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """[B, T, d] hidden states as the head takes them."""
    hidden: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that hidden states and head give what the model itself gives.

    Raises:
        ModelError: they do not: the architecture scales or caps its logits in a way of its own.
    """
    ids = torch.arange(8, device=model.device)[None]
    mine = head_of(model).logits(last_hidden(model, input_ids=ids))
    theirs = model(input_ids=ids).logits.float()
    apart = (mine - theirs).abs().max()
    if bool(apart > 0.02 * theirs.abs().max() + 1e-6):
        raise ModelError(
            f"{type(model).__name__} makes its logits in a way that fusellm does not know (they "
            f"differ by {float(apart):.3g}); please report the architecture"
        )
