"""Training batches from rows of blocks: ids, labels, and fused distributions as sparse outcomes.

B rows, T positions, N positions that predict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.arrays.ragged import offsets_of
from fusellm.store.blocks import CONTEXT
from fusellm.training.forward import IGNORED


def _predicted(block: Mapping[str, Any]) -> np.ndarray:
    """[T-1] bool, whether each token but the first is predicted."""
    context = block.get(CONTEXT)
    return np.ones(len(block["ids"]) - 1, dtype=np.bool_) if context is None else ~context[1:]


class OutcomeTable:
    """The outcomes of all sources as sets of target ids, in one numbering.

    Attributes:
        temperature: by which renormalized distributions are flattened.
        largest_id: of all target ids.
    """

    def __init__(
        self,
        sets: Sequence[OutcomeSets],
        renormalize: bool = False,
        temperature: float = 1.0,
    ) -> None:
        """Number the sets.

        Args:
            sets: of each source, its outcomes.
            renormalize: whether what was not kept is scaled away.
            temperature: by which renormalized distributions are flattened.
        """
        self._base = offsets_of(np.array([len(of_source) for of_source in sets]))
        self._sets = OutcomeSets.concat(sets)
        self._renormalize, self.temperature = renormalize, temperature
        self.largest_id = int(self._sets.ids.max(initial=-1))

    def outcomes(
        self, blocks: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """What the fused store says of the predicted positions of the blocks, in order.

        Returns:
            (the fields of `Outcomes`, [N] float64 mass that is kept at each position)
        """
        fused = Fused.concat([Fused.of(block) for block in blocks])
        wanted = np.concatenate([_predicted(block) for block in blocks])
        if not wanted.all():
            fused = fused.take(np.flatnonzero(wanted))
        mass, rest = fused.masses.astype(np.float64), fused.rest.astype(np.float64)
        part, position = fused.part_of_outcome, fused.position_of_part
        part_mass = np.bincount(part, weights=mass, minlength=len(fused.lengths))
        kept = np.bincount(position, weights=part_mass, minlength=len(fused.parts))
        if self._renormalize:
            mass = flattened(mass, part, part_mass + rest, self.temperature)
            rest = np.zeros_like(rest)
        # Outcomes of all sources are numbered through: those of source s begin at base[s]. Such a
        # number gives its set of ids: `ids` of all, `place` the outcome that each is of.
        ids, place = self._sets.take(self._base[fused.source[part]] + fused.outcomes)
        fields = {
            "present": kept > 0,
            "position": position,
            "rest": rest.astype(np.float32),
            "part": part,
            "mass": mass.astype(np.float32),
            "member_outcome": place,
            "member_id": ids,
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in fields.items()}
        return tensors, kept


def flattened(
    mass: np.ndarray, part: np.ndarray, of_part: np.ndarray, temperature: float
) -> np.ndarray:
    """[M] masses of each part, to the power of 1 / temperature, scaled to sum to `of_part`.

    Args:
        mass: [M] of outcomes.
        part: [M] the part of each, ascending.
        of_part: [R] what the masses of a part are to sum to.

    >>> flattened(np.array([0.4, 0.1]), np.array([0, 0]), np.array([1.0]), 1.0).round(3).tolist()
    [0.8, 0.2]
    >>> flattened(np.array([0.4, 0.1]), np.array([0, 0]), np.array([1.0]), 2.0).round(3).tolist()
    [0.667, 0.333]
    """
    if temperature != 1.0:
        mass = mass ** (1 / temperature)
    sums = np.bincount(part, weights=mass, minlength=len(of_part))
    scaled: np.ndarray = mass * (of_part / np.where(sums > 0, sums, 1.0))[part]
    return scaled


@dataclass(frozen=True)
class BatchCounts:
    """What a batch holds, known where it is made, so that no device is asked.

    Attributes:
        blocks: numbers of its blocks, within the part train.
        tokens: without padding.
        predicted: tokens that are predicted.
        fused: of these, those with a fused distribution.
        kept_mass: sum over these of the mass that the fused store has kept.
    """

    blocks: list[int]
    tokens: int
    predicted: int
    fused: int = 0
    kept_mass: float = 0.0


class Collator:
    """Rows of blocks to a batch.

    Padded rows have an attention mask; packed rows have positions that begin anew with each
    block, by which transformers keeps the blocks apart.
    """

    def __init__(self, table: OutcomeTable | None, packed: bool) -> None:
        self._table, self._packed = table, packed

    def __call__(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The inputs of the objective's forward, and "counts", a `BatchCounts`."""
        longest = max(sum(len(block["ids"]) for block in row) for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        positions = np.tile(np.arange(longest), (len(rows), 1))
        for r, row in enumerate(rows):
            start = 0
            for block in row:
                stop = start + len(block["ids"])
                ids[r, start:stop] = block["ids"]
                labels[r, start + 1 : stop] = np.where(
                    _predicted(block), ids[r, start + 1 : stop], IGNORED
                )
                mask[r, start:stop] = 1
                positions[r, start:] = np.arange(longest - start)
                start = stop
            positions[r, start:] = np.arange(longest - start)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            **(
                {"position_ids": torch.from_numpy(positions)}
                if self._packed
                else {"attention_mask": torch.from_numpy(mask)}
            ),
        }
        blocks = [block for row in rows for block in row]
        real = [block for block in blocks if _predicted(block).any()]
        numbers = [int(block["block"]) for block in real]
        tokens = sum(len(block["ids"]) for block in real)
        counts = BatchCounts(numbers, tokens, int((labels != IGNORED).sum()))
        if self._table is not None:
            batch["outcomes"], kept = self._table.outcomes(blocks)
            counts = replace(counts, fused=int((kept > 0).sum()), kept_mass=float(kept.sum()))
        batch["counts"] = counts
        return batch
