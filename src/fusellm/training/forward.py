"""The objective inside a model's own forward.

For as long as a model is trained its `forward` is one that ends in the objective; nothing else
about the model changes, and saving, resuming and adapters work as for any model. `swapped_forward`
says why.

B rows, T positions, N positions that predict.
"""

import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from fusellm.errors import ModelError
from fusellm.models.heads import last_hidden, through_head
from fusellm.models.swapped_forward import swapped_forward
from fusellm.objective.chunked import Head, objective
from fusellm.objective.divergence import CROSS_ENTROPY, Divergence
from fusellm.objective.outcomes import Outcomes

IGNORED = -100

Value = TypeVar("Value")


class Untouched(Generic[Value]):
    """A value on its way into a forward.

    FSDP casts the tensors that it finds in a model's inputs, in dataclasses too, to the precision
    that it computes in. Half of that rounds a count of 778 to 776. It does not look into this.
    """

    def __init__(self, value: Value) -> None:
        self.value = value


def objective_inputs(
    batch: Mapping[str, Any], clm_weight: float, count: torch.Tensor | int | None = None
) -> dict[str, Any]:
    """A collator's batch as the objective's forward takes it.

    Args:
        clm_weight: λ, where the batch has fused distributions.
        count: predicted tokens of the global batch; the batch's own if None.
    """
    inputs = {name: value for name, value in batch.items() if name != "counts"}
    if "outcomes" in inputs:
        outcomes = Untouched(Outcomes(**inputs["outcomes"]))
        inputs |= {"outcomes": outcomes, "clm_weight": clm_weight}
    return inputs | {"num_items_in_batch": Untouched(count)}


def _forward(
    self: PreTrainedModel,
    divergence: Divergence,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    outcomes: Untouched[Outcomes] | None = None,
    clm_weight: float = 1.0,
    num_items_in_batch: Untouched[torch.Tensor | int | None] | None = None,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """The objective (docs/method.md) over a batch.

    Args:
        labels: [B, T] `input_ids`, IGNORED where a token is not to be predicted.
        outcomes: of the N predicted positions, row by row.
        num_items_in_batch: predicted tokens of the global batch; the batch's own if None.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    hidden = last_hidden(self, **{k: v for k, v in inputs.items() if v is not None})
    found: dict[str, torch.Tensor] = _eager_losses(
        self,
        hidden,
        labels,
        None if outcomes is None else outcomes.value,
        clm_weight,
        divergence,
        None if num_items_in_batch is None else num_items_in_batch.value,
    )
    return found


def _losses(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    outcomes: Outcomes | None,
    clm_weight: float,
    divergence: Divergence,
    count: torch.Tensor | int | None,
) -> dict[str, torch.Tensor]:
    """The losses of [B, T, d] hidden states, whose shapes depend on the batch's content."""
    predicted = labels[:, 1:] != IGNORED

    def losses(hidden: torch.Tensor, head: Head) -> dict[str, torch.Tensor]:
        found = objective(
            hidden,
            head,
            labels[:, 1:][predicted],
            outcomes,
            clm_weight,
            divergence,
            count=predicted.sum() if count is None else count,
        )
        return {"loss": found.total, "clm": found.clm, "fusion": found.fusion}

    return through_head(model, hidden[:, :-1][predicted], losses)


_eager_losses = torch.compiler.disable(_losses)  # a loop over chunks, with gradients of its own


@contextmanager
def objective_forward(
    model: PreTrainedModel, divergence: Divergence = CROSS_ENTROPY
) -> Iterator[PreTrainedModel]:
    """Within the block, `model(...)` gives the objective, and so does one that wraps it."""

    def forward(self: PreTrainedModel, *args: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        return _forward(self, divergence, *args, **inputs)

    with swapped_forward(model, types.MethodType(forward, model)):
        yield model


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
