"""The objective as a function, for anyone's training loop."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fusellm.errors import ArgumentError, ModelError
from fusellm.models.adapters import without_adapters
from fusellm.models.configurations import adds_router_loss
from fusellm.models.heads import (
    head_of,
    hidden_states,
    input_device,
    is_plain,
    is_sharded,
    require_known_head,
)
from fusellm.objective.chunked import Head, objective
from fusellm.objective.divergence import CROSS_ENTROPY, Divergence
from fusellm.objective.outcomes import Outcomes
from fusellm.objective.schedule import checked_lambda
from fusellm.training.forward import IGNORED


def fusion_loss(
    hidden: torch.Tensor,
    model_or_head: torch.nn.Module | Head,
    labels: torch.Tensor,
    fused: Outcomes | Mapping[str, torch.Tensor] | None = None,
    lambda_: float = 0.9,
    *,
    shifted: bool = False,
    divergence: Divergence = CROSS_ENTROPY,
    count: torch.Tensor | float | None = None,
    config: PretrainedConfig | None = None,
) -> torch.Tensor:
    """L = λ·L_CLM + (1−λ)·L_Fusion, a mean over the predicted tokens (FuseLLM, eq. 4).

    The logits are made chunk by chunk, and their gradients at once, so that no [B, T, V] tensor is
    ever there. The result serves one `backward()`. Where a position has no fused distribution its
    loss is L_CLM alone.

    Under DDP the hidden states must come from a call of the wrapped model, whose gradients DDP
    averages: `ddp(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]` (with
    `ddp.module.base_model(...)` nothing would be averaged). DDP takes means over processes: where
    these have different numbers of predicted tokens, give `count` as the mean of them over the
    processes. `FusionTrainer` does all that.

    Args:
        hidden: [B, T, d] last hidden states, after the final norm, as `last_hidden(model, batch)`
            gives them; or [N, d] with `shifted`.
        model_or_head: the causal language model that they are of, wrapped by DDP or PEFT or not.
            Or a `Head`. Or its head, a `torch.nn.Linear`, with the model's `config`: some
            architectures scale or cap their logits, which the layer alone does not say.
        labels: [B, T] int64, as transformers has them: the ids themselves, -100 where a token is
            not to be predicted; they are shifted here. With `shifted`, entry t is what is to be
            predicted from hidden state t, of any shape that fits `hidden`.
        fused: fused distributions of the predicted tokens, row by row: `batch["outcomes"]` of a
            `FusionCollator`, on any device. None for L_CLM alone.
        lambda_: λ, the weight of L_CLM at positions with a fused distribution.
        divergence: what L_Fusion is (docs/method.md).
        count: what the sum is divided by; the predicted tokens if None.
        config: of the model whose head is given as a layer.

    Raises:
        ArgumentError: shapes do not fit, λ is not in [0, 1], a layer comes without `config`,
            tokens are meant that the head has no row for, or the model adds a loss of its router.
        ModelError: the head is none that is known, or quantized; or it is spread over processes
            (FSDP), which have it whole only inside the model's own forward: use `FusionTrainer`.

    >>> hidden = torch.zeros(1, 4, 2, requires_grad=True)
    >>> head = Head(torch.zeros(8, 2))
    >>> loss = fusion_loss(hidden, head, torch.tensor([[1, 2, 3, 4]]))
    >>> round(loss.item(), 4)  # log 8
    2.0794
    """
    lambda_ = checked_lambda(lambda_)
    _require_tensors(hidden=hidden, labels=labels)
    labels = labels.to(hidden.device)
    if hidden.shape[:-1] != labels.shape:
        raise ArgumentError(
            f"hidden states are {list(hidden.shape)} and labels {list(labels.shape)}: labels need "
            "one entry a hidden state"
        )
    if not shifted:
        if labels.dim() < 2:
            raise ArgumentError(
                "labels of one dimension cannot be shifted, as it is not said where rows begin; "
                "shift them, and say so by shifted=True"
            )
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    predicted = labels != IGNORED
    outcomes = _outcomes(fused, hidden.device)
    if outcomes is not None and len(outcomes.present) != int(predicted.sum()):
        raise ArgumentError(
            f"there are fused distributions of {len(outcomes.present)} positions, and "
            f"{int(predicted.sum())} labels to predict: they must be of the same rows"
        )
    head = _head(model_or_head, config)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ArgumentError(
            f"hidden states have {hidden.shape[-1]} numbers each, and the head takes "
            f"{head.weight.shape[1]}; take them from fusellm.last_hidden(model, batch)"
        )
    _require_ids(labels[predicted], outcomes, head.weight.shape[0])
    losses = objective(
        hidden[predicted],
        head,
        labels[predicted],
        outcomes,
        lambda_,
        divergence,
        count=predicted.sum().clamp(min=1) if count is None else count,
    )
    return losses.total


def last_hidden(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """[B, T, d] last hidden states of a batch, as `fusion_loss` takes them.

    `model.base_model(...)` gives the same for most models. This one also keeps the texts of a
    packed row apart, which transformers does only without a cache, and knows adapters (PEFT) on the
    head, with which hidden states are wider.

    Args:
        model: a causal language model of transformers, with adapters or without.
        batch: of a `FusionCollator`, on any device.

    Raises:
        ArgumentError: the model is wrapped by DDP, which would not average the gradients, or is
            none of transformers.
    """
    if hasattr(model, "require_backward_grad_sync"):
        raise ArgumentError(
            "the model is wrapped by DDP, which averages gradients around its own call alone: take "
            "model(..., output_hidden_states=True, logits_to_keep=1).hidden_states[-1], or use "
            "FusionTrainer"
        )
    base = without_adapters(_unwrapped(model))
    if not isinstance(base, PreTrainedModel):
        raise ArgumentError(
            f"a model of transformers is needed, and this is a {type(model).__name__}; give the "
            "model first, then the batch"
        )
    names = ("input_ids", "attention_mask", "position_ids")
    place = input_device(base)
    return hidden_states(base, **{name: batch[name].to(place) for name in names if name in batch})


def _require_tensors(**given: object) -> None:
    """Check that arguments are tensors.

    Raises:
        ArgumentError: one is something else.
    """
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(value).__name__}, and no tensor; give hidden states, model and "
                "labels in this order"
            )


def _require_ids(labels: torch.Tensor, outcomes: Outcomes | None, rows: int) -> None:
    """Check that a head has a row for each token that is predicted.

    Raises:
        ArgumentError: it has not.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < rows:
        wrong = int(labels.max()) if int(labels.max()) >= rows else int(labels.min())
        raise ArgumentError(
            f"labels have {wrong}, and the head has rows for 0 to {rows - 1}; give token ids, and "
            f"{IGNORED} where nothing is to be predicted"
        )
    if outcomes is not None and len(outcomes.member_id):
        require_rows(int(outcomes.member_id.max()), rows)


def require_no_router_loss(model: PreTrainedModel) -> None:
    """Check that a model's own loss is that of its predictions alone, as the objective's L_CLM is.

    Raises:
        ArgumentError: it adds one of its router.
    """
    if adds_router_loss(model.config):
        raise ArgumentError(
            f"{type(model).__name__} adds a loss of its router to its own (output_router_logits of "
            "its config), which λ·L_CLM + (1−λ)·L_Fusion leaves out; set "
            "model.config.get_text_config().output_router_logits = False to train without it"
        )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of DDP and torch.compile."""
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    return model if inner is None else _unwrapped(inner)


def _outcomes(fused: Outcomes | Mapping[str, Any] | None, device: torch.device) -> Outcomes | None:
    """Fused distributions on a device.

    Raises:
        ArgumentError: they are something else.
    """
    if fused is None or isinstance(fused, Outcomes):
        return fused
    fields = fused.get("outcomes", fused)  # of the whole batch, or these alone
    if set(fields) != set(Outcomes.__dataclass_fields__):
        raise ArgumentError(
            f'fused has {", ".join(sorted(fields)) or "nothing"}; give batch["outcomes"] of a '
            "FusionCollator"
        )
    return Outcomes(**{name: value.to(device) for name, value in fields.items()})


def require_rows(largest_id: int, rows: int) -> None:
    """Check that a head has rows for the tokens that distributions are of.

    Raises:
        ArgumentError: it has not.
    """
    if largest_id >= rows:
        raise ArgumentError(
            f"the distributions are of tokens up to {largest_id}, and the target's head has {rows} "
            "rows: its tokenizer has tokens that it neither reads nor predicts. Give fuse() "
            f"fusellm.Tokenizer(tokenizer, rows={rows})"
        )


def _head(given: torch.nn.Module | Head, config: PretrainedConfig | None) -> Head:
    """The head that is meant, with its architecture's scaling and capping.

    Raises:
        ArgumentError, ModelError: as `fusion_loss` does.
    """
    if isinstance(given, Head):
        return given
    if isinstance(given, torch.nn.Linear):
        if config is None:
            raise ArgumentError(
                "a Linear does not say whether its model scales or caps its logits, as Gemma, "
                "Cohere and Granite do; give the model itself, or config=model.config"
            )
        if not is_plain(config):
            raise ArgumentError(
                f"{config.model_type} scales or caps its logits, which its Linear alone does not; "
                "give the model itself"
            )
        return Head(given.weight, given.bias)
    model = _unwrapped(given)
    if not isinstance(without_adapters(model), PreTrainedModel):
        raise ArgumentError(
            f"a model of transformers, its head or a Head is needed, and this is a "
            f"{type(given).__name__}"
        )
    model = without_adapters(model)
    require_no_router_loss(model)
    if is_sharded(model):
        raise ModelError(
            "the head is spread over processes (FSDP), which have it whole only inside the model's "
            "own forward; train with FusionTrainer, whose loss is computed there"
        )
    require_known_head(model)
    return head_of(model)
