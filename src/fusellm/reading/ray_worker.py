"""What runs in a worker of a Ray cluster: the model of one source, and shards read with it."""

import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusellm.config import ModelSettings, Recipe
from fusellm.errors import ClusterError, ModelError
from fusellm.models.load import default_device, locate, weights_digest
from fusellm.models.readers import chat_encoder_of, encoder_of, template_text
from fusellm.reading.engine import ReadingTask
from fusellm.reading.worker import Done, Worker, device_name
from fusellm.store.blocks import Block
from fusellm.store.identity import tokenizer_fingerprint
from fusellm.store.writer import software_versions

IN_FLIGHT = 3
"""Shards that a worker has at a time: one is tokenized, one read, one encoded and sent."""


@dataclass(frozen=True)
class Orders:
    """What a worker is to load, and what it must then have alike with the driver."""

    recipe: Recipe
    settings: ModelSettings
    runs_code: bool
    fingerprint: str
    tokenizer: str
    software: dict[str, str]
    cpus: int
    gpus: float


class Ready(NamedTuple):
    """A worker that has its model."""

    node: str
    device: str
    weights_sha256: str


def orders_of(task: ReadingTask, cpus: int, gpus: float) -> Orders:
    """What each worker of a task is told."""
    located = task.located
    settings = located.settings
    if located.commit is not None:  # a branch may have moved on since
        settings = settings.model_copy(update={"revision": located.commit})
    if settings.chat_template is not None:  # a file that workers need not have
        text = template_text(settings.chat_template)
        settings = settings.model_copy(update={"chat_template": text})
    return Orders(
        task.recipe,
        settings,
        located.runs_code,
        located.fingerprint,
        tokenizer_fingerprint(task.encoder),
        software_versions(),
        cpus,
        gpus,
    )


class RemoteWorker:
    """A worker's process: the model of one source, loaded once.

    Calls run in threads, so that one shard is tokenized and another encoded while the model reads
    a third.
    """

    def __init__(self) -> None:
        """Take no time: what can fail is in `load`, whose errors reach the driver as they are."""
        self._worker: Worker | None = None
        self._model = threading.Lock()

    def load(self, orders: Orders) -> Ready:
        """Find and load the model.

        Raises:
            ClusterError: the software is not the driver's, or torch sees no GPU.
            ModelError: the model is not here, is another one, or cannot be loaded.
        """
        node = platform.node()
        require_software(orders.software, node)
        os.environ["RAYON_NUM_THREADS"] = str(orders.cpus)  # of the tokenizer
        torch.set_num_threads(orders.cpus)
        require_gpu(orders.gpus, node)
        try:
            located = locate(orders.settings, orders.runs_code)
            conversations = orders.recipe.corpus.has_conversations
            encoder = chat_encoder_of(located) if conversations else encoder_of(located)
        except ModelError as error:
            raise ModelError(f"{error} (on {node}, where a worker runs)") from error
        here = (located.fingerprint, tokenizer_fingerprint(encoder))
        if here != (orders.fingerprint, orders.tokenizer):
            raise ModelError(
                f"{orders.settings.model} on {node}, where a worker runs, is not the model that is "
                "there for the driver; copy the one over the other"
            )
        device = default_device() if orders.gpus else torch.device("cpu")
        self._worker = Worker(orders.recipe, located, encoder, device)
        return Ready(node, device_name(device), weights_digest(located))

    def read(self, blocks: list[Block]) -> Done:
        """Read a shard."""
        assert self._worker is not None
        prepared = self._worker.prepare(blocks)
        with self._model:
            read = self._worker.read(prepared)
        return self._worker.finish(prepared, read)


def require_gpu(gpus: float, node: str) -> None:
    """Check that a worker that has GPUs can use them.

    Raises:
        ClusterError: torch sees none.
    """
    if gpus and not torch.cuda.is_available():
        raise ClusterError(
            f"torch sees no GPU on {node}; install its CUDA build there, or set --worker-gpus 0"
        )


def require_software(wanted: Mapping[str, str], node: str) -> None:
    """Check that a worker has the driver's releases; builds may differ (2.9+cpu and 2.9+cu128).

    Raises:
        ClusterError: it has others, whose numbers may differ.
    """
    here = software_versions()
    differing = [
        f"{name} {here[name]} (here {version})"
        for name, version in wanted.items()
        if name != "python" and here[name].split("+")[0] != version.split("+")[0]
    ]
    if differing:
        raise ClusterError(
            f"{node}, where a worker runs, has other software: {', '.join(differing)}; install the "
            "same versions on all machines of the cluster"
        )
