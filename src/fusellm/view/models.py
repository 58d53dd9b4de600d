"""The target and the models trained from it, loaded when they are asked, kept while they fit."""

import gc
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from fusellm.arrays.fused import Fused
from fusellm.arrays.outcome_sets import OutcomeSets
from fusellm.config import Recipe
from fusellm.errors import ModelError
from fusellm.explain.machine import free_memory
from fusellm.explain.predictions import Predictions, predictions_of
from fusellm.models.load import default_device, load_model
from fusellm.models.readers import Reader
from fusellm.pipeline import Pipeline
from fusellm.progress import Progress, Silent
from fusellm.stages.evaluate import trained_model
from fusellm.store.externalized import TARGET
from fusellm.store.manifest import MANIFEST, StageFolder
from fusellm.store.run_folder import CLM, FUSED, trained_folder

_ROOM = 1.5
"""A model is kept if the memory left has so many times its bytes: for the next one, and to work."""


class Models:
    """What says something about a block: the target before its training, CLM and fused after it.

    Attributes:
        readers: those that are there, by name.
    """

    def __init__(
        self, recipe: Recipe, run: Path, readers: Mapping[str, Reader], trusted: bool
    ) -> None:
        """Find them; none is loaded."""
        context = Pipeline(recipe, run, Silent(), trusted=trusted, readers=readers).context
        self.readers = {TARGET: readers[TARGET]}
        for which in (CLM, FUSED):
            place = trained_folder(run, which)
            if (place / MANIFEST).exists() and StageFolder(place).complete:
                self.readers[which] = trained_model(context, which)
        self._kept: dict[str, PreTrainedModel] = {}

    def ask(
        self,
        ids: np.ndarray,
        first: int,
        fused: Fused,
        sets: Sequence[OutcomeSets],
        progress: Progress,
    ) -> dict[str, Predictions]:
        """What each says at the positions of a block; arguments as those of `predictions_of`.

        Raises:
            ModelError: a model cannot be loaded, or memory does not suffice.
            NumericsError: a model gives NaN or infinity.
        """
        said = {}
        with progress.start("asking models", len(self.readers), "models") as bar:
            for name, reader in self.readers.items():
                what = reader.encoder, ids, first, fused, sets
                # No name is given to a model here: it would keep it from being freed.
                with suppress(ModelError):
                    said[name] = predictions_of(self._loaded(name), *what)
                if name not in said:  # memory is most often why; the error holds none of it now
                    self._forget(*self._kept)
                    said[name] = predictions_of(self._loaded(name), *what)
                if self._is_tight(name):
                    self._forget(name)
                bar.advance()
        return said

    def _loaded(self, name: str) -> PreTrainedModel:
        if name not in self._kept:
            self._kept[name] = load_model(self.readers[name].located, default_device())
        return self._kept[name]

    def _is_tight(self, name: str) -> bool:
        """Whether there may be no room for another model beside this one."""
        size = sum(one.numel() * one.element_size() for one in self._kept[name].parameters())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else what torch holds back counts as taken
        free = free_memory(default_device())
        return free is not None and free < _ROOM * size

    def _forget(self, *names: str) -> None:
        for name in names:
            del self._kept[name]
        gc.collect()  # models may be in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
