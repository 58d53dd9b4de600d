"""A run as the explorer has it open: read when it is first asked for, then kept."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from fusellm.config import Recipe
from fusellm.errors import ArgumentError, StoreError
from fusellm.explain.block import BlockInspector, require_fused
from fusellm.explain.documents import DocumentWins, wins_of_documents
from fusellm.explain.tokenizers import TokenizerComparison, compare_tokenizers
from fusellm.explain.views import BlockView
from fusellm.models.readers import Reader, readers_of
from fusellm.progress import Progress
from fusellm.store.blocks import BLOCKS, open_corpus
from fusellm.store.externalized import TARGET
from fusellm.store.fused import open_fused
from fusellm.store.tables import Shard, shard_names
from fusellm.view.data import position_data, predictions_data
from fusellm.view.jobs import Job
from fusellm.view.models import Models

_COMPARED_BYTES = 100_000
"""Of a domain's text, that two tokenizers are compared on."""
_SAMPLED_SHARDS = 16
_KEPT_PREDICTIONS = 4
_PATIENCE = 10.0
"""Seconds after which nobody is taken to wait for a block's predictions who has not asked again."""


class OpenedRun:
    """A fused run that is being looked at; several threads may ask.

    Attributes:
        recipe: of it.
        run: its folder.
        blocks: how many there are to look at.
        asks_models: whether models are loaded to say what they predict.
        inspector: a job that gives it; the tokenizers are read for it.
        documents: a job that gives the wins by document.
    """

    def __init__(
        self, recipe: Recipe, run: Path, *, asks_models: bool = True, trusted: bool = False
    ) -> None:
        """Look at what there is; no tokenizer is read and no model loaded.

        Raises:
            StoreError: nothing is fused yet.
        """
        require_fused(run)
        open_fused(run)
        corpus = open_corpus(run)
        self.recipe, self.run, self.asks_models = recipe, run, asks_models
        names = shard_names(corpus, "train-")
        self.blocks = sum(corpus.shards[name]["counts"]["blocks"] for name in names)
        self._trusted, self._lock, self._models_lock = trusted, Lock(), Lock()
        self._jobs_lock = Lock()
        self.inspector = Job("opening the run", self._open)
        self.documents: Job[list[DocumentWins]] = Job(
            "counting wins", lambda progress: wins_of_documents(recipe, run, progress)
        )
        self._comparisons: dict[str, Job[TokenizerComparison]] = {
            source.name: Job("comparing tokenizers", self._comparing(source.name))
            for source in recipe.sources
        }
        self._predictions: dict[tuple[int, int | None], Job[list[dict[str, Any]]]] = {}
        self._asked_at: dict[tuple[int, int | None], float] = {}

    def _open(self, progress: Progress) -> BlockInspector:
        readers = readers_of(self.recipe, self._trusted)
        opened = BlockInspector(self.recipe, self.run, readers, progress)
        opened.prepare()
        return opened

    @property
    def _inspector(self) -> BlockInspector:
        opened = self.inspector.wait()
        assert opened is not None
        return opened

    def block(self, number: int, answer: int | None = None) -> BlockView:
        """A block with an instructive position.

        Raises:
            StoreError: there is no such block or answer.
        """
        with self._lock:
            return self._inspector.block(number, None, answer)

    def position(self, number: int, position: int, answer: int | None = None) -> dict[str, Any]:
        """A position, for a page.

        Raises:
            StoreError: there is no such block, answer or position.
        """
        with self._lock:
            view = self._inspector.block(number, position, answer)
        assert view.at is not None
        return position_data(view, view.at)

    def predictions(self, number: int, answer: int | None = None) -> Job[list[dict[str, Any]]]:
        """What models say at the positions of a block, for a page: a job, which may take long."""
        which = number, answer
        with self._jobs_lock:
            job = self._predictions.pop(which, None) or self._asking(number, answer)
            self._predictions[which] = job  # as the one that was asked for last
            self._asked_at[which] = time.monotonic()
            for former in [*self._predictions][:-_KEPT_PREDICTIONS]:
                if self._predictions[former].told["done"]:
                    del self._predictions[former], self._asked_at[former]
        return job.start()

    def _asking(self, number: int, answer: int | None) -> Job[list[dict[str, Any]]]:
        def ask(progress: Progress) -> list[dict[str, Any]]:
            with self._models_lock:
                waited = time.monotonic() - self._asked_at[number, answer]
                if waited > _PATIENCE:  # somebody paged through; what is looked at now goes first
                    raise StoreError("nobody waited for it any more; load the page again")
                inspector = self._inspector
                with self._lock:  # and not while the models are asked
                    read = inspector.read_by_target(number, answer)
                    fused = inspector.fused(number, answer)
                return predictions_data(self._models.ask(*read, *fused, progress))

        return Job("loading models", ask)

    @cached_property
    def _models(self) -> Models:
        return Models(self.recipe, self.run, self._inspector.readers, self._trusted)

    def comparison(self, source: str) -> Job[TokenizerComparison]:
        """How far a source's tokenizer and the target's agree on the run's own text: a job.

        Raises:
            ArgumentError: there is no such source.
        """
        if source not in self._comparisons:
            known = ", ".join(self._comparisons)
            raise ArgumentError(f"there is no source {source!r}; known: {known}")
        return self._comparisons[source].start()

    def _comparing(self, source: str) -> Callable[[Progress], TokenizerComparison]:
        def compare(progress: Progress) -> TokenizerComparison:
            readers: Mapping[str, Reader] = self._inspector.readers
            pair = readers[source].encoder, readers[TARGET].encoder
            return compare_tokenizers(*pair, self._text, progress=progress)

        return compare

    @cached_property
    def _text(self) -> dict[str, list[str]]:
        """Some of the run's training text, by domain, from shards all over it."""
        corpus, texts = open_corpus(self.run), dict[str, list[str]]()
        names, room = shard_names(corpus, "train-"), dict[str, int]()
        for name in names[:: -(-len(names) // _SAMPLED_SHARDS) or 1]:
            for columns in Shard(corpus, name, BLOCKS).batches():
                for domain, text in zip(columns["domain"], columns["text"], strict=True):
                    if room.setdefault(str(domain), _COMPARED_BYTES) > 0:
                        texts.setdefault(str(domain), []).append(text)
                        room[str(domain)] -= len(text.encode())
        return texts
