"""Which text a training stopped at."""

from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from fusellm.errors import NumericsError
from fusellm.store.blocks import BLOCKS
from fusellm.store.manifest import StageFolder
from fusellm.store.tables import Shard, shard_names

_NAMED = 8  # blocks of a batch that an error message names


class Blame:
    """Finds the documents of blocks, and the checkpoint to go back to."""

    def __init__(self, corpus: StageFolder, checkpoints: Path) -> None:
        self._corpus, self._checkpoints = corpus, checkpoints

    def error(self, what: str, blocks: Sequence[int]) -> NumericsError:
        """The error that ends a training.

        Args:
            what: that went wrong, and at which step.
            blocks: numbers of the blocks of the batch, within the part train.
        """
        named = [f"{number} ({self._document(number)})" for number in blocks[:_NAMED]]
        more = f" and {len(blocks) - _NAMED} more" if len(blocks) > _NAMED else ""
        last = None
        if self._checkpoints.is_dir():
            last = get_last_checkpoint(str(self._checkpoints))
        kept = (
            f"the last good checkpoint is kept: {last}" if last else "no checkpoint was saved yet"
        )
        return NumericsError(
            f"{what}, at the blocks {', '.join(named)}{more}; {kept}. Lower "
            "training.learning_rate or training.max_grad_norm, or train without fp16 or bf16; "
            "--redo begins anew"
        )

    def _document(self, number: int) -> str:
        for name in shard_names(self._corpus, "train-"):
            first, end = self._corpus.shards[name]["counts"]["numbers"]
            if first <= number < end:
                row = Shard(self._corpus, name, BLOCKS).block(number - first)
                return str(row["document"])
        return "unknown"
