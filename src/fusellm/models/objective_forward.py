"""The objective inside a model's own forward.

Outside the forward, DDP would not average the gradients and FSDP's head would be a shard. So for
as long as a model is trained its `forward` is one that ends in the objective; nothing else about
the model changes, and saving, resuming and adapters work as for any model.

B rows, T positions, N positions that predict.
"""

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from fusellm.errors import ModelError
from fusellm.models.heads import head_of, last_hidden
from fusellm.objective.chunked import objective
from fusellm.objective.divergence import CROSS_ENTROPY, Divergence
from fusellm.objective.outcomes import Outcomes

IGNORED = -100


def _forward(
    self: PreTrainedModel,
    divergence: Divergence,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    outcomes: Mapping[str, torch.Tensor] | None = None,
    clm_weight: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """The loss of DESIGN section 6 over a batch.

    Args:
        labels: [B, T] `input_ids`, IGNORED where a token is not to be predicted.
        outcomes: the fields of `Outcomes`, over the N predicted positions row by row.
        num_items_in_batch: predicted tokens of the global batch; the batch's own if None.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    hidden = last_hidden(self, **{k: v for k, v in inputs.items() if v is not None})
    found: dict[str, torch.Tensor] = _eager_losses(
        self, hidden, labels, outcomes, clm_weight, divergence, num_items_in_batch
    )
    return found


def _losses(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    outcomes: Mapping[str, torch.Tensor] | None,
    clm_weight: float,
    divergence: Divergence,
    count: torch.Tensor | int | None,
) -> dict[str, torch.Tensor]:
    """The losses of [B, T, d] hidden states, whose shapes depend on the batch's content."""
    predicted = labels[:, 1:] != IGNORED
    losses = objective(
        hidden[:, :-1][predicted],
        head_of(model),
        labels[:, 1:][predicted],
        None if outcomes is None else Outcomes(**outcomes),
        clm_weight,
        divergence,
        count=predicted.sum() if count is None else count,
    )
    return {"loss": losses.total, "clm": losses.clm, "fusion": losses.fusion}


_eager_losses = torch.compiler.disable(_losses)  # a loop over chunks, with gradients of its own


@contextmanager
def objective_forward(
    model: PreTrainedModel, divergence: Divergence = CROSS_ENTROPY
) -> Iterator[PreTrainedModel]:
    """Within the block, `model(...)` gives the objective, and so does one that wraps it."""

    def forward(self: PreTrainedModel, *args: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        return _forward(self, divergence, *args, **inputs)

    model.forward = types.MethodType(forward, model)
    try:
        yield model
    finally:
        del model.forward


@torch.no_grad()
def require_packing(model: PreTrainedModel) -> None:
    """Check that blocks of a packed row are kept apart: read packed and alone, they are the same.

    Raises:
        ModelError: the architecture takes no position ids, by which transformers tells blocks
            apart, or does not heed them.
    """
    refusal = ModelError(
        f"training.rows: packed does not work with {type(model).__name__}, which does not keep "
        "packed blocks apart by their position ids; use rows: block"
    )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise refusal
    length = 12
    ids = torch.arange(2 * length, device=model.device)[None]
    positions = torch.arange(length, device=model.device).repeat(2)[None]
    packed = last_hidden(model, input_ids=ids, position_ids=positions)[:, length:].float()
    alone = last_hidden(model, input_ids=ids[:, length:]).float()
    if bool((packed - alone).abs().max() > 0.02 * alone.abs().max()):
        raise refusal
