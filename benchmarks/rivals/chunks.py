"""Pieces of a text between two boundaries that both tokenizers have, and sums over them.

All rivals compare over such pieces: TRL aligns by byte offsets and closes a group of tokens where
both have read as much, tokenkit and NeMo-RL call it a chunk. A piece begins at a position that is
aligned in fusellm's sense. C pieces; P and Q positions of target and source that predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fusellm.alignment.positions import align_shard


@dataclass(frozen=True)
class Chunks:
    """Which positions predict the tokens of each piece.

    Attributes:
        target: [C, 2] int64, the first of the target's positions, and one more than the last.
        source: [C, 2] likewise of the source.
    """

    target: torch.Tensor
    source: torch.Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def covered(self) -> int:
        """The target's positions in all pieces."""
        return int((self.target[:, 1] - self.target[:, 0]).sum())

    @classmethod
    def joined(
        cls, parts: Sequence["Chunks"], targets: Sequence[int], sources: Sequence[int]
    ) -> "Chunks":
        """Those of several texts, whose positions stand one after another.

        Args:
            targets, sources: positions of each text.
        """
        of_target = np.cumsum([0, *targets])[:-1].tolist()
        of_source = np.cumsum([0, *sources])[:-1].tolist()
        return cls(
            torch.cat([c.target + at for c, at in zip(parts, of_target, strict=True)]),
            torch.cat([c.source + at for c, at in zip(parts, of_source, strict=True)]),
        )

    def from_places(self, target: int, source: int) -> "Chunks":
        """The same, where positions are counted from these on."""
        return Chunks(self.target - target, self.source - source)

    def windows(self, positions: int, most: int) -> list[tuple[slice, slice, slice]]:
        """Runs of pieces of no more positions of the target than `most`, if pieces are shorter.

        Args:
            positions: P; those in no piece belong to the run before or after them.

        Returns:
            (the run's positions of the target, those of the source, its pieces), a run an entry
        """
        begins, ends = self.target[:, 0].tolist(), self.target[:, 1].tolist()
        cuts, start = [0], 0
        for n in range(1, len(self)):
            if ends[n] - start > most:
                cuts.append(n)
                start = begins[n]
        sources = self.source[:, 0].tolist()
        last = int(self.source[-1, 1]) if len(self) else 0
        edges = [(c, begins[c] if c else 0, sources[c] if c else 0) for c in cuts]
        edges.append((len(self), positions, last))
        return [
            (slice(t, next_t), slice(s, next_s), slice(c, next_c))
            for (c, t, s), (next_c, next_t, next_s) in pairwise(edges)
        ]

    def __getitem__(self, pieces: slice) -> "Chunks":
        return Chunks(self.target[pieces], self.source[pieces])


def chunks_of(target_ends: np.ndarray | None, source_ends: np.ndarray | None) -> Chunks:
    """The pieces of one text.

    A token for the end of a text that only one of the two has is in no piece.

    Args:
        target_ends, source_ends: where each token ends, as `Encoded.ends`; None if not known.

    >>> found = chunks_of(np.array([2, 5, 8]), np.array([2, 3, 5, 6, 8]))
    >>> found.target.tolist(), found.source.tolist()
    ([[0, 1], [1, 2]], [[0, 2], [2, 4]])
    """
    none = torch.zeros((0, 2), dtype=torch.int64)
    if target_ends is None or source_ends is None or not len(target_ends) or not len(source_ends):
        return Chunks(none, none)
    offsets = np.array([0, len(target_ends)]), np.array([0, len(source_ends)])
    aligned, _ = align_shard(target_ends, offsets[0], source_ends, offsets[1])
    first = np.flatnonzero(aligned >= 0)
    if not len(first):
        return Chunks(none, none)
    source_first = aligned[first]
    marked = _ends_marked(target_ends), _ends_marked(source_ends)
    target_stop = len(target_ends) - 1 - (marked[0] and not marked[1])
    source_stop = len(source_ends) - 1 - (marked[1] and not marked[0])
    target = np.stack([first, np.append(first[1:], target_stop)], axis=1)
    source = np.stack([source_first, np.append(source_first[1:], source_stop)], axis=1)
    return Chunks(torch.from_numpy(target), torch.from_numpy(source))


def _ends_marked(ends: np.ndarray) -> bool:
    """Whether the last token is one for the end of a text: it has read nothing."""
    return len(ends) > 1 and bool(ends[-1] == ends[-2])


def sums(values: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """[C] or [C, V] sums of the rows [P] or [P, V] of each span; spans ascend.

    >>> sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0, 2], [2, 3]])).tolist()
    [3.0, 4.0]
    """
    lengths = spans[:, 1] - spans[:, 0]
    place = torch.repeat_interleave(torch.arange(len(spans), device=values.device), lengths)
    starts = torch.repeat_interleave(spans[:, 0], lengths)
    before = torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
    rows = starts + torch.arange(len(place), device=values.device) - before
    out = values.new_zeros((len(spans), *values.shape[1:]))
    return out.index_add(0, place, values[rows])
