"""Blocks of a shard as one model reads them, one after another in flat arrays.

B blocks; N positions that predict, in all.
"""

from dataclasses import dataclass

import numpy as np

from fusellm.align.ragged import offsets_of


@dataclass(frozen=True)
class Tokens:
    """Blocks as one model reads them.

    Attributes:
        offsets: [B+1] where each block's tokens are; a block that could not be read has none.
        ids: token ids, BOS and EOS included.
        ends: their boundaries, in bytes from the block's beginning.
    """

    offsets: np.ndarray
    ids: np.ndarray
    ends: np.ndarray

    @property
    def position_offsets(self) -> np.ndarray:
        """[B+1] where each block's predicting positions are: all but each block's last."""
        return offsets_of(np.maximum(np.diff(self.offsets) - 1, 0))

    @property
    def predicting(self) -> np.ndarray:
        """[N] the token last read at each position: all but each block's last."""
        last = self.offsets[1:][np.diff(self.offsets) > 0] - 1
        return np.delete(np.arange(self.offsets[-1]), last)
