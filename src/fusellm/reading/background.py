"""A thread that works off jobs in order, while something else goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_WAITING = 2  # jobs that are not done yet; each may hold a shard in memory


class Background:
    """A thread for jobs; its first error is raised where it is waited for."""

    def __init__(self, name: str) -> None:
        """`name`: of the thread."""
        self._pool = ThreadPoolExecutor(1, name)
        self._jobs: deque[Future[None]] = deque()

    def __enter__(self) -> "Background":
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
