"""Fused distributions as the objective takes them: sparse, over sets of target ids.

N positions, M outcomes in all, E members in all, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outcomes:
    """The fused distributions of N positions.

    An outcome is a set of target ids that counts as one event: a single token, or a class of the
    common partition. At a position with a fused distribution the masses of its outcomes and its
    `rest` sum to 1.

    Attributes:
        present: [N] bool, whether the position has a fused distribution.
        rest: [N] float32, mass of everything that is in none of the position's outcomes; it is
            compared with the target's own mass outside them.
        row: [M] int64, the position of each outcome, ascending.
        mass: [M] float32.
        member_outcome: [E] int64, the outcome that each member belongs to, ascending.
        member_id: [E] int64, target ids; the outcomes of one position share none.
    """

    present: torch.Tensor
    rest: torch.Tensor
    row: torch.Tensor
    mass: torch.Tensor
    member_outcome: torch.Tensor
    member_id: torch.Tensor

    @classmethod
    def none(cls, positions: int, device: torch.device | None = None) -> "Outcomes":
        """No fused distribution at any of `positions` positions."""
        whole = {"dtype": torch.int64, "device": device}
        return cls(
            torch.zeros(positions, dtype=torch.bool, device=device),
            torch.zeros(positions, device=device),
            torch.zeros(0, **whole),  # type: ignore[arg-type]
            torch.zeros(0, device=device),
            torch.zeros(0, **whole),  # type: ignore[arg-type]
            torch.zeros(0, **whole),  # type: ignore[arg-type]
        )
