"""The objective inside a model's own forward.

A model that is trained here has a `forward` that ends in the objective where it is called with the
inputs of `objective_inputs`, and is its own for every other call: a callback may generate with it.
Nothing else about the model changes; saving, resuming and adapters work as for any model.
`swapped_forward` says why it is the forward.

B rows, T positions, N positions that predict.
"""

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from fusellm.errors import ModelError
from fusellm.models.heads import hidden_states, left_as_it_was, through_head
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
    batch: Mapping[str, Any],
    clm_weight: float,
    count: torch.Tensor | int | None = None,
    divergence: Divergence = CROSS_ENTROPY,
) -> dict[str, Any]:
    """A collator's batch as the objective's forward takes it.

    Args:
        clm_weight: λ, where the batch has fused distributions.
        count: predicted tokens of the global batch; the batch's own if None.
        divergence: what L_Fusion is.
    """
    inputs = {name: value for name, value in batch.items() if name != "counts"}
    if "outcomes" in inputs:
        outcomes = Untouched(Outcomes(**inputs["outcomes"]))
        inputs |= {"outcomes": outcomes, "clm_weight": clm_weight}
    return inputs | {"num_items_in_batch": Untouched(count), "divergence": Untouched(divergence)}


def _forward(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    divergence: Untouched[Divergence],
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
    hidden = hidden_states(self, **{k: v for k, v in inputs.items() if v is not None})
    losses: dict[str, torch.Tensor] = _eager_losses(
        self,
        hidden,
        labels,
        None if outcomes is None else outcomes.value,
        clm_weight,
        divergence.value,
        None if num_items_in_batch is None else num_items_in_batch.value,
    )
    return losses


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
        loss = objective(
            hidden,
            head,
            labels[:, 1:][predicted],
            outcomes,
            clm_weight,
            divergence,
            count=predicted.sum() if count is None else count,
        )
        return {"loss": loss.total, "clm": loss.clm, "fusion": loss.fusion}

    return through_head(model, hidden[:, :-1][predicted], losses)


_eager_losses = torch.compiler.disable(_losses)  # a loop over chunks, with gradients of its own


_TAUGHT = "of_fusellm"


def teach_objective(model: PreTrainedModel) -> None:
    """Let a model's `forward` end in the objective where it is called for that, from now on.

    It stays so after a training: accelerate wraps the forward that it finds once, for mixed
    precision, and does not do so again where another one is put back.
    """
    if hasattr(model.forward, _TAUGHT):
        return
    # Not as bound to this model, where that can be: a deep copy of it has weights of its own.
    own = model.__dict__.get("forward", type(model).forward)
    is_bound = getattr(own, "__self__", None) is model
    call = getattr(own, "__func__", own) if is_bound else own
    takes_self = is_bound or "forward" not in model.__dict__

    @functools.wraps(model.forward)
    def forward(self: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        if isinstance(inputs.get("divergence"), Untouched):
            return _forward(self, *args, **inputs)
        return call(self, *args, **inputs) if takes_self else call(*args, **inputs)

    setattr(forward, _TAUGHT, True)
    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def require_packing(model: PreTrainedModel) -> None:
    """Check that blocks of a packed row are kept apart: read packed and alone, they are the same.

    Raises:
        ModelError: the architecture takes no position ids, by which transformers tells blocks
            apart, or does not heed them.
    """
    refusal = ModelError(
        f"packed rows (training.rows: packed, or row_tokens) do not work with "
        f"{type(model).__name__}, which does not keep packed texts apart by their position ids; "
        "use rows of one block each"
    )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise refusal
    length = 12
    with left_as_it_was(model):
        model.eval()
        same = _same_packed(model, length)
    if not same:
        raise refusal


def _same_packed(model: PreTrainedModel, length: int) -> bool:
    ids = torch.arange(2 * length, device=model.device)[None]
    positions = torch.arange(length, device=model.device).repeat(2)[None]
    packed = hidden_states(model, input_ids=ids, position_ids=positions)[:, length:].float()
    alone = hidden_states(model, input_ids=ids[:, length:]).float()
    return bool((packed - alone).abs().max() <= 0.02 * alone.abs().max())
