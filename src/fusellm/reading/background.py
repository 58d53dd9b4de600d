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
        self._failed = False

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What failed elsewhere leaves finished work to be written; what failed here would again.
        self._pool.shutdown(wait=True, cancel_futures=self._failed)
        if kind is None:
            self.check()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done after those before it; waits while too many are waiting."""
        while len(self._jobs) >= _WAITING:
            self._done(self._jobs.popleft())
        self._jobs.append(self._pool.submit(job))

    def check(self) -> None:
        """Raise the error of a job that failed."""
        while self._jobs and self._jobs[0].done():
            self._done(self._jobs.popleft())

    def _done(self, job: Future[None]) -> None:
        try:
            job.result()
        except BaseException:
            self._failed = job.done()  # and not that waiting for it was interrupted
            raise
