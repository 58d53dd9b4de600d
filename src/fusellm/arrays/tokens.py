"""Blocks of a shard as one model reads them, one after another in flat arrays.

B blocks; N positions that predict, in all.
"""

from dataclasses import dataclass

import numpy as np

from fusellm.arrays.ragged import offsets_of


@dataclass(frozen=True)
class Tokens:
    """Blocks as one model reads them.

    Attributes:
        offsets: [B+1] where each block's tokens are; a block that could not be read has none.
        ids: token ids, prefix and EOS included.
        ends: their boundaries, in bytes from the block's beginning.
        prefix_tokens: of each block, the tokens that its model's tokenizer puts before a text.
    """

    offsets: np.ndarray
    ids: np.ndarray
    ends: np.ndarray
    prefix_tokens: int = 0

    @property
    def position_offsets(self) -> np.ndarray:
        """[B+1] where each block's predicting positions are: all but each block's last."""
        return offsets_of(np.maximum(np.diff(self.offsets) - 1, 0))

    @property
    def predicting(self) -> np.ndarray:
        """[N] the token last read at each position: all but each block's last."""
        last = self.offsets[1:][np.diff(self.offsets) > 0] - 1
        return np.delete(np.arange(self.offsets[-1]), last)

    @property
    def asked(self) -> np.ndarray:
        """[N] bool, whether a model is asked what comes next at each predicting position.

        It is not where that is a token of the prefix, which is put and not written.
        """
        lengths = np.diff(self.position_offsets)
        place = np.arange(lengths.sum()) - np.repeat(self.position_offsets[:-1], lengths)
        return np.asarray(place + 1 >= self.prefix_tokens)
