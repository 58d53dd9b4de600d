"""What a model computes and holds, by its shapes alone: no weight is read.

The model is built on torch's meta device, where tensors have shapes and no numbers, and run once
forward. torch's counter of floating-point operations sees every product, and autograd says which
tensors it would keep for the backward pass. So both are right for any architecture.

torch's own attention has no kernel there, and would be taken apart into products that keep all
scores. In its place stands one that keeps what the kernels keep: queries, keys, values, their mean
and a sum for each position.

B rows, H heads, T positions; d hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusellm.models.load import Located

_FORWARD = 2  # operations for each parameter and token, where a model cannot be built so


@dataclass(frozen=True)
class Shapes:
    """A model's size, and what a row costs it.

    Attributes:
        parameters: of all, those that are tied once.
        rows: of its head, V.
        width: of its hidden states, d.
        layers: how many blocks it has.
        linear: inputs and outputs of all its linear layers but the head, added up: an adapter of
            rank r on each has r times as many parameters.
        row_tokens: T of the row that the following are of.
        forward: floating-point operations of a forward pass, without the head.
        kept: bytes that autograd keeps of it in float32, weights not counted.
    """

    parameters: int
    rows: int
    width: int
    layers: int
    linear: int
    row_tokens: int
    forward: float
    kept: int

    @property
    def head(self) -> float:
        """Operations of the head for one position: 2 V d.

        >>> Shapes(100, 10, 4, 1, 30, 8, 800.0, 0).head
        80.0
        """
        return 2.0 * self.rows * self.width

    @property
    def operations(self) -> float:
        """Operations of a forward pass for one token, head included."""
        return self.forward / self.row_tokens + self.head


def shapes_of(located: Located, row_tokens: int) -> Shapes:
    """A model's shapes, for rows of so many tokens.

    An architecture that cannot be run without numbers gets the usual estimate of 2 operations for
    each parameter and token, and of its activations what a block of a transformer keeps (34 d bytes
    a token and layer in half precision: Korthikanti et al. 2022, arXiv:2205.05198, eq. 2, without
    its attention scores).
    """
    config = located.config
    text = config.get_text_config()
    code: dict[str, Any] = {"trust_remote_code": located.runs_code}
    if located.runs_code and located.commit is not None:
        code["code_revision"] = located.commit
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **code)
    model.train()
    parameters = sum(one.numel() for one in model.parameters())
    rows, width, layers = text.vocab_size, text.hidden_size, text.num_hidden_layers
    try:
        forward, kept = _run(model, row_tokens)
    except (RuntimeError, TypeError, ValueError):  # it asks for numbers, or takes no such mask
        inner = parameters - rows * width
        forward = float(_FORWARD * inner * row_tokens)
        kept = 2 * 34 * width * layers * row_tokens
    head = model.get_output_embeddings()
    linear = sum(
        one.in_features + one.out_features
        for one in model.modules()
        if isinstance(one, torch.nn.Linear) and one is not head
    )
    return Shapes(parameters, rows, width, layers, linear, row_tokens, forward, kept)


def _run(model: PreTrainedModel, row_tokens: int) -> tuple[float, int]:
    """(operations, bytes kept) of a row, without the head."""
    ids = torch.zeros((1, row_tokens), dtype=torch.int64, device="meta")
    # A whole mask is taken as it is; transformers would look into a shorter one, which has none.
    mask = torch.ones((1, 1, row_tokens, row_tokens), dtype=torch.bool, device="meta")
    weights = {_storage(one) for one in model.parameters()}
    with _kept_tensors() as kept, FlopCounterMode(display=False) as counter, _Attention() as inner:
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    sizes = {_storage(one): one.untyped_storage().nbytes() for one in kept}
    own = sum(size for storage, size in sizes.items() if storage not in weights)
    return float(counter.get_total_flops()) + inner.operations, own


class _Attention(TorchFunctionMode):
    """Puts an attention that has shapes alone in the place of torch's own, and counts its work."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **named)
        names = ("query", "key", "value")
        given = [args[n] if n < len(args) else named[name] for n, name in enumerate(names)]
        query, key, value = given
        widths = query.shape[-1] + value.shape[-1]
        self.operations += 2.0 * query.shape[:-1].numel() * key.shape[-2] * widths
        return _KeepsNoScores.apply(query, key, value)  # type: ignore[no-untyped-call]


class _KeepsNoScores(torch.autograd.Function):
    """Attention by shapes: [B, H, T, d/H] of each, and what its kernels keep; forward alone."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        mean = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mean, sums)
        return mean


@contextmanager
def _kept_tensors() -> Iterator[list[torch.Tensor]]:
    """What autograd keeps for the backward pass, while the context is open."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(keep, give_back)
    with hooks:
        yield kept


def _storage(tensor: torch.Tensor) -> int:
    """What views of one tensor have in common."""
    return int(tensor.untyped_storage()._cdata)
