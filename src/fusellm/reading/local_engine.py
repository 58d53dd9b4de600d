"""The engine `local`: a source is read in this process, on its first GPU where it has one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fusellm.models.load import default_device, weights_digest
from fusellm.reading.engine import EngineSettings, Events, ModelLoaded, ReadingTask, ReadShard
from fusellm.reading.worker import TokenizedShard, Worker, device_name
from fusellm.store.blocks import Block


def read_locally(task: ReadingTask, settings: EngineSettings) -> Events:
    """Read a task's shards here.

    Raises:
        FusellmError: the model cannot be loaded.
    """
    device = default_device()
    worker = Worker(task.recipe, task.located, task.encoder, device)
    yield ModelLoaded(device_name(device), weights_digest(task.located))
    yield from read_shards(worker, task.names, task.blocks)


def read_shards(
    worker: Worker, names: Sequence[str], blocks_of: Callable[[str], list[Block]]
) -> Iterator[int | ReadShard]:
    """Read shards one after another. While the model reads one, the next is tokenized."""
    for name, prepared in _ahead(lambda name: worker.prepare(blocks_of(name)), names):
        read = yield from worker.steps(prepared)
        shard = ReadShard(name, partial(worker.finish, prepared, read))
        del read
        yield shard
        del shard  # or a whole shard would be held while the next one is read


def _ahead(
    prepare: Callable[[str], TokenizedShard], names: Sequence[str]
) -> Iterator[tuple[str, TokenizedShard]]:
    """(name, prepared) of each shard, the next one being prepared meanwhile."""
    with ThreadPoolExecutor(1, "fusellm-tokenize") as pool:
        following = pool.submit(prepare, names[0])
        for n, name in enumerate(names):
            prepared = following.result()
            if n + 1 < len(names):
                following = pool.submit(prepare, names[n + 1])
            yield name, prepared
