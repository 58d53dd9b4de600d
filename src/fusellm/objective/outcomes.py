"""Fused distributions as the objective takes them: sparse, over sets of target ids.

N positions, R parts, M outcomes in all, E members in all, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outcomes:
    """The fused distributions of N positions.

    A part is one source's share of the distribution at one position: where a single source won, a
    position has one part. An outcome is a set of target ids that counts as one event: a single
    token, or a class of the common partition. The masses of a position's outcomes and the rests of
    its parts sum to 1.

    Attributes:
        present: [N] bool, whether the position has a fused distribution.
        position: [R] int64, the position of each part, ascending.
        rest: [R] float32, mass of everything that is in none of the part's outcomes; it is
            compared with the target's own mass outside them.
        part: [M] int64, the part of each outcome, ascending.
        mass: [M] float32.
        member_outcome: [E] int64, the outcome that each member belongs to, ascending.
        member_id: [E] int64, target ids; the outcomes of one part share none.
    """

    present: torch.Tensor
    position: torch.Tensor
    rest: torch.Tensor
    part: torch.Tensor
    mass: torch.Tensor
    member_outcome: torch.Tensor
    member_id: torch.Tensor

    @classmethod
    def none(cls, positions: int, device: torch.device | None = None) -> "Outcomes":
        """No fused distribution at any of `positions` positions."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        no_mass = torch.zeros(0, device=device)
        present = torch.zeros(positions, dtype=torch.bool, device=device)
        return cls(present, none, no_mass, none, no_mass, none, none)
