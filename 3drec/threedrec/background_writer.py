"""Files that are written while the run goes on: one thread, one job after the other."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

logger = logging.getLogger(__name__)

Job = Callable[[], object]

UNFINISHED = 3
"""Jobs that may be unfinished: as many as one step leaves (a preview, a sheet, a checkpoint)."""


class BackgroundWriter:
    """Does jobs in their order, in a thread of its own, so that the device need not wait for files.

    A job that fails takes along those behind it, so that nothing is there without what was to be there before it; the
    error is raised where the run meets the writer next. A context, which may be entered again and again: at its end
    all jobs are done.
    """

    def __init__(self, unfinished: int = UNFINISHED) -> None:
        """Have at most ``unfinished`` jobs waiting or at work, since each holds what it writes in memory."""
        self._limit = unfinished
        # Its thread starts with the first job, and ends with this object or with the interpreter, its jobs done.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._jobs: deque[Future[None]] = deque()

    def submit(self, job: Job) -> None:
        """Do ``job`` after those before it; waits while too many are unfinished.

        Raises:
            Exception: whatever an earlier job raised.
        """
        self.make_room()
        before = self._jobs[-1] if self._jobs else None
        self._jobs.append(self._thread.submit(_do, before, job))

    def make_room(self) -> None:
        """Wait until another job would not be one too many.

        Raises:
            Exception: whatever an earlier job raised.
        """
        self._wait(self._limit - 1)

    def finish(self) -> None:
        """Wait until all jobs are done.

        Raises:
            Exception: whatever a job raised.
        """
        self._wait(0)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as late:
            if error is None:
                raise
            logger.warning("%s", late)  # the error that ends the run is the one that came first

    def _wait(self, unfinished: int) -> None:
        """Wait until no more than ``unfinished`` jobs are left, and look at those that are done."""
        while self._jobs and (len(self._jobs) > unfinished or self._jobs[0].done()):
            # Asked before it is taken out: an interrupt while waiting must not lose the job.
            error = self._jobs[0].exception()
            self._jobs.popleft()
            if error is not None:
                self._jobs.clear()
                raise error


def _do(before: Future[None] | None, job: Job) -> None:
    """Do ``job``, unless the one before it, which has ended since they share a thread, failed."""
    if before is not None:
        before.result()
    job()
