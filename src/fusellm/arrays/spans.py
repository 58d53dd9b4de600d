"""Spans of conversations as blocks of their own, so that all else works on them as on texts.

A span is what one learnt message says. A model has read nothing of it at the token before it, which
is its template's; then come the tokens of what is said, and the end of the turn. T tokens, B blocks
and S spans, in all; L bytes.
"""

from dataclasses import dataclass

import numpy as np

from fusellm.arrays.ragged import Ragged, offsets_of
from fusellm.arrays.tokens import Tokens


@dataclass(frozen=True)
class Spans:
    """The spans of blocks.

    Attributes:
        block: [S] that each is of.
        byte_offsets: [S+1] where the bytes of each are, of all spans one after another.
    """

    block: np.ndarray
    byte_offsets: np.ndarray

    @classmethod
    def of(cls, ends: Ragged) -> "Spans":
        """Those that end at these bytes of their blocks.

        >>> spans = Spans.of(Ragged(np.array([0, 2, 3]), np.array([3, 5, 4])))
        >>> spans.block.tolist(), spans.byte_offsets.tolist()
        ([0, 0, 1], [0, 3, 5, 9])
        """
        block = np.repeat(np.arange(len(ends.lengths)), ends.lengths)
        values = ends.values.astype(np.int64)
        before = np.concatenate([[0], values[:-1]])
        before[ends.offsets[:-1][ends.lengths > 0]] = 0
        return cls(block, offsets_of(values - before))

    def tokens(self, of_blocks: Tokens, predicted: np.ndarray) -> Tokens:
        """The tokens of spans, each with the one before it, which has read nothing.

        A span that a model does not learn from has none.

        Args:
            predicted: [T] bool, which tokens of the blocks are predicted; never a block's first.
        """
        at = np.flatnonzero(predicted)
        blocks = len(of_blocks.offsets) - 1
        block = np.repeat(np.arange(blocks), np.diff(of_blocks.offsets))[at]
        first_span = np.searchsorted(self.block, np.arange(blocks))
        starts = self.byte_offsets[np.minimum(first_span, len(self.block))]
        whole = of_blocks.ends[at] + starts[block]
        span = np.searchsorted(self.byte_offsets[1:], whole, side="left")
        begins = np.flatnonzero(np.diff(span, prepend=-1))
        counts = np.bincount(span, minlength=len(self.block))
        lengths = np.where(counts > 0, counts + 1, 0)
        ends = whole - self.byte_offsets[span]
        return Tokens(
            offsets_of(lengths),
            np.insert(of_blocks.ids[at], begins, of_blocks.ids[at[begins] - 1]),
            np.insert(ends, begins, 0),
            1,
        )
