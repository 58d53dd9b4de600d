"""What a run is planned to take, in its folder, for the report to put beside what it took."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from fusellm.errors import StoreError
from fusellm.store.files import from_json, make_folder, write_text
from fusellm.store.run_folder import PLAN

_Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, lt=1e30)]
_Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run.

    Attributes:
        name: of its folder.
        tokens: that its model reads, all times that it reads them.
        operations: floating-point operations of its models; None where there are none.
        bytes: that its folder will have on disk.
        seconds: that it will take here; None where that was not tried.
        memory: bytes that the process will hold at most, or the GPU, if there is one; None where
            that was not tried.
        steps: of a training.
    """

    name: str
    tokens: _Amount | None = None
    operations: _Amount | None = None
    bytes: _Amount | None = None
    seconds: _Amount | None = None
    memory: _Amount | None = None
    steps: int | None = None


@dataclass(frozen=True)
class MemoryParts:
    """What a device holds, in bytes, by the shapes of a model.

    Attributes:
        weights: and what is kept of them in another precision.
        gradients: of what is trained, with the copies that processes exchange.
        optimizer: its state.
        activations: of a batch, as autograd keeps them; where nothing is trained, of one layer.
        objective: logits of a chunk, their gradient, and the gradients of hidden states and head.
        sharded: processes that FSDP spreads weights, gradients and optimizer over.
        accumulates: whether gradients stay while the next batch's activations are made.
    """

    weights: _Amount
    gradients: _Amount = 0.0
    optimizer: _Amount = 0.0
    activations: _Amount = 0.0
    objective: _Amount = 0.0
    sharded: Annotated[int, Field(ge=1)] = 1
    accumulates: bool = False

    @property
    def total(self) -> float:
        """Bytes at the most on each device; in one batch gradients take activations' place.

        >>> MemoryParts(weights=4.0, gradients=4.0, optimizer=8.0, activations=6.0).total
        18.0
        """
        spread = (self.weights + self.optimizer) / self.sharded
        gradients, batch = self.gradients / self.sharded, self.activations + self.objective
        return spread + (gradients + batch if self.accumulates else max(gradients, batch))


@dataclass(frozen=True)
class PlannedPair:
    """A source beside the target, on the text that was tried.

    Attributes:
        situations: share of the target's positions in each, by domain.
        better_by: bits per byte that the source costs less than the target, by domain: below 0
            where it costs more.
        interval: of that, 95 %; None where there are too few documents.
        verdict: what the tokenizers make of it, in a sentence.
        is_referee: whether it is compared and never taught.
    """

    situations: Mapping[str, Mapping[str, _Share]]
    better_by: Mapping[str, _Number]
    interval: Mapping[str, tuple[_Number, _Number] | None]
    verdict: str
    is_referee: bool = False


@dataclass(frozen=True)
class RunPlan:
    """What a run will take.

    Attributes:
        recipe: its name.
        made_for: digest of the whole recipe.
        hardware: that it was tried on, in words.
        processes: that are to train.
        text: bytes of each part of the corpus.
        is_cut: whether these are counted, and not taken from the recipe's budgets.
        stages: in their order.
        checkpoints: bytes on disk that each training needs besides, until it is done.
        memory: by shapes, of "training" and of each source.
        pairs: by the names of sources; none where nothing was tried.
        cautions: what a user should know before.
    """

    recipe: str
    made_for: str
    hardware: str
    processes: int
    text: Mapping[str, _Amount]
    is_cut: bool
    stages: tuple[PlannedStage, ...]
    checkpoints: _Amount
    memory: Mapping[str, MemoryParts]
    pairs: Mapping[str, PlannedPair]
    cautions: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of all stages that were tried; None where none was."""
        told = [one.seconds for one in self.stages if one.seconds is not None]
        return sum(told) if told else None

    @property
    def is_whole(self) -> bool:
        """Whether all stages were tried."""
        return all(one.seconds is not None for one in self.stages)

    @property
    def bytes(self) -> float:
        """On disk, once the run is done."""
        return sum(one.bytes or 0 for one in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = {name: parts.total for name, parts in self.memory.items()}
        return asdict(self) | {
            "seconds": self.seconds,
            "bytes": self.bytes,
            "device_memory": totals,
        }


_PLAN = TypeAdapter(RunPlan)


def write_plan(run: Path, plan: RunPlan) -> None:
    """Write a plan into a run's folder, which is made where it is not there.

    Raises:
        StoreError: it cannot be written.
    """
    make_folder(run)
    write_text(run / PLAN, _PLAN.dump_json(plan, indent=1).decode() + "\n")


def plan_of(run: Path) -> RunPlan | None:
    """The plan of a run; None where there is none.

    Raises:
        StoreError: it is damaged.
    """
    path = run / PLAN
    try:
        return _PLAN.validate_python(from_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is not what `fusellm plan` writes ({type(error).__name__}); remove it, or "
            "plan again"
        ) from None
