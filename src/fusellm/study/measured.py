"""What held-out text costs the models of a study; each is asked once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusellm.config import Recipe
from fusellm.config.study import ArmEnsemble
from fusellm.evaluation.text.ensemble import Ensemble, Member
from fusellm.models.load import default_device, load_model
from fusellm.models.readers import Reader
from fusellm.preflight import require_blocks_fit
from fusellm.progress import Progress
from fusellm.stages.evaluate import measured_nats, read_nats, scored_nats, write_nats
from fusellm.store.blocks import Block
from fusellm.store.identity import Identity, digest
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.writer import StageWriter, set_aside

_NATS = "nats.arrow"


class Measurements:
    """The folder `measured` of a study."""

    def __init__(
        self, out: Path, base: Recipe, blocks: Sequence[Block], progress: Progress
    ) -> None:
        """Nothing is measured yet.

        Args:
            out: the study's folder.
            base: the base recipe.
            blocks: of held-out text.
        """
        self._out, self._progress, self._corpus = out, progress, base.corpus
        self.blocks, self._batch_tokens = blocks, base.evaluation.batch_tokens
        self._held_out = digest_of_held_out(blocks)

    def of_model(
        self, name: str, model: str, find: Callable[[], Reader]
    ) -> tuple[list[np.ndarray], int]:
        """(nats of each block's bytes, parameters) of a model.

        Args:
            name: of its folder in `measured`.
            model: digest of what it is.
            find: gives the model, if it has not been measured yet.
        """

        def measure() -> tuple[list[np.ndarray], dict[str, int]]:
            tokens, progress, reader = self._batch_tokens, self._progress, find()
            require_blocks_fit(name, reader, self.blocks, self._corpus)
            nats, size = measured_nats(name, reader, self.blocks, tokens, progress)
            return nats, {"parameters": size}

        nats, counts = self._once(name, model, measure)
        return nats, int(counts["parameters"])

    def of_ensemble(
        self,
        name: str,
        model: str,
        how: ArmEnsemble,
        find: Callable[[], Reader],
        sources: Mapping[str, Reader],
    ) -> list[np.ndarray]:
        """Nats of each block's bytes, of a target with sources.

        Args:
            find: gives the target.
        """

        def measure() -> tuple[list[np.ndarray], dict[str, int]]:
            members = {one: _member(source) for one, source in sources.items()}
            ensemble = Ensemble(_member(find()), members, how.weights, progress=self._progress)
            texts = [block.text for block in self.blocks]
            nats = ensemble.nats(texts, [block.last for block in self.blocks], self._batch_tokens)
            return scored_nats(nats, self.blocks), {}

        return self._once(name, model, measure)[0]

    def _once(
        self, name: str, model: str, measure: Callable[[], tuple[list[np.ndarray], dict[str, int]]]
    ) -> tuple[list[np.ndarray], Mapping[str, Any]]:
        folder = self._out / "measured" / name
        identity = Identity("measured", {}, {"model": model, "held_out": self._held_out})
        if (folder / MANIFEST).exists() and StageFolder(folder).identity != identity:
            set_aside(self._out, [folder])  # minutes of work, of a model that is not asked for now
        with StageWriter.open(folder, identity) as writer:
            if not writer.complete:
                nats, counts = measure()
                write_nats(writer, _NATS, self.blocks, nats)
                writer.finish(counts)
            told = dict(writer.counts)
        return read_nats(StageFolder(folder), _NATS, self.blocks), told


def _member(reader: Reader) -> Member:
    return Member(reader.encoder, lambda: load_model(reader.located, default_device()))


def digest_of_held_out(blocks: Sequence[Block]) -> str:
    """Equal for the same text in the same blocks, of which the same is context."""
    rows = [[block.domain, block.document, block.text] for block in blocks]
    context = [[block.number, *map(list, block.context)] for block in blocks if block.context]
    return digest([rows, context] if context else rows)
