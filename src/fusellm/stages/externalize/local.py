"""Reading a source in this process: tokenizing, the model, and writing, each in its own thread."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from fusellm.models.load import default_device, weights_digest
from fusellm.progress import Bar
from fusellm.reading.source_reader import Read
from fusellm.stages.externalize.memory import give_back
from fusellm.stages.externalize.task import EngineSettings, Task
from fusellm.stages.externalize.work import Done, Prepared, Worker, device_name
from fusellm.store.blocks import Block

_WAITING = 2  # shards that have been read and not written


def read_locally(task: Task, settings: EngineSettings) -> None:
    """The engine `local`: read shards in this process, on its first GPU where it has one.

    Raises:
        FusellmError: the model cannot be loaded, or what `task.write` raises; what has been
            written stays.
    """
    device = default_device()
    worker = Worker(task.recipe, task.located, task.encoder, device)
    task.begin(device_name(device), weights_digest(task.located))
    read_here(worker, task.names, task.load, task.write, task.bar)


def read_here(
    worker: Worker,
    names: Sequence[str],
    load: Callable[[str], list[Block]],
    write: Callable[[str, Done], None],
    bar: Bar,
) -> None:
    """Read shards one after another.

    While the model reads one, the next is tokenized and the last is written. An error in any of
    the three stops all of them: at the latest after the batch that the model is at.

    Args:
        names: of the shards to read.
        load: gives the blocks of a shard.
        write: writes a shard; is called in the order of `names`.
    """

    def prepare(name: str) -> Prepared:
        return worker.prepare(load(name))

    def finish(name: str, prepared: Prepared, read: Read) -> None:
        write(name, worker.finish(prepared, read))
        give_back()

    with _Background() as writing:

        def advance(blocks: int) -> None:
            writing.check()
            bar.advance(blocks)

        for name, prepared in _ahead(prepare, names):
            writing.submit(partial(finish, name, prepared, worker.read(prepared, advance)))


def _ahead(
    prepare: Callable[[str], Prepared], names: Sequence[str]
) -> Iterator[tuple[str, Prepared]]:
    """(name, prepared) of each shard, the next one being prepared meanwhile."""
    with ThreadPoolExecutor(1, "fusellm-tokenize") as pool:
        following = pool.submit(prepare, names[0]) if names else None
        for n, name in enumerate(names):
            assert following is not None
            prepared = following.result()
            following = pool.submit(prepare, names[n + 1]) if n + 1 < len(names) else None
            yield name, prepared


class _Background:
    """A thread that works off jobs in order; its first error is raised where it is waited for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "fusellm-write")
        self._jobs: deque[Future[None]] = deque()

    def __enter__(self) -> "_Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.check()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done after those before it; waits while too many are waiting."""
        while len(self._jobs) >= _WAITING:
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job))

    def check(self) -> None:
        """Raise the error of a job that failed."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
