"""The engine of one machine: a worker process that keeps the model, and on a GPU a second one that finishes.

A worker that dies costs its task only: the next task gets a new one. The second process renders the turntables and
makes the meshes, so that the first can go on with the next image.
"""

import logging
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from threedrec.batch.dispatch import GPU, SIDE
from threedrec.batch.process import Process
from threedrec.batch.task import FAILED, Outcome, Task
from threedrec.errors import InputError

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""A worker that has not said a word after this long never will."""


@dataclass
class _Worker:
    lane: str
    process: Process
    ready: bool = False
    busy: bool = False
    since: float = field(default_factory=time.monotonic)
    progress: tuple[str, int, int] = ("start", 0, 1)


class LocalPool:
    """Worker processes of this machine; see `dispatch.Pool`."""

    def __init__(self, function: str, log: Path, overlap: bool, memory_gb: float | None = None) -> None:
        """Start the workers.

        Args:
            function: the task function, ``module:function``.
            log: file for what the processes say.
            overlap: start a second worker, which finishes what the first has optimised.
            memory_gb: resident memory beyond which a worker is ended.
        """
        self._function, self._log, self._memory_gb = function, log, memory_gb
        self._failed_starts = 0
        self._workers = {0: self._start(GPU)}
        if overlap:
            self._workers[1] = self._start(SIDE)

    def lanes(self) -> dict[int, str]:
        """Return the lane of every worker."""
        return {number: worker.lane for number, worker in self._workers.items()}

    def free(self) -> list[int]:
        """Return the workers that can take a task now."""
        return [number for number, worker in self._workers.items() if worker.ready and not worker.busy]

    def submit(self, worker: int, task: Task) -> None:
        """Give a free worker a task."""
        target = self._workers[worker]
        target.busy, target.since, target.progress = True, time.monotonic(), ("start", 0, 1)
        target.process.send(task)

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Wait at most so long for outcomes.

        Raises:
            InputError: workers cannot be started here.
        """
        wait([worker.process.connection for worker in self._workers.values()], seconds)
        outcomes = []
        for number, worker in list(self._workers.items()):
            outcome = self._hear(number, worker)
            if outcome is not None:
                outcomes.append((number, outcome))
        return outcomes

    def progress(self, worker: int) -> tuple[str, int, int]:
        """Return the stage, the steps done and all steps of a worker's task."""
        return self._workers[worker].progress

    def kill(self, worker: int) -> None:
        """End a worker, with its task; a new one takes its place."""
        old = self._workers[worker]
        old.process.kill()
        self._workers[worker] = self._start(old.lane)
        self._workers[worker].progress = old.progress

    def stop(self) -> None:
        """Ask all workers to end their tasks with a checkpoint."""
        for worker in self._workers.values():
            worker.process.stop()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.process.kill()

    def _start(self, lane: str) -> _Worker:
        return _Worker(lane, Process(self._function, self._log))

    def _hear(self, number: int, worker: _Worker) -> Outcome | None:
        try:
            for kind, *content in worker.process.receive():
                if kind == "ready":
                    worker.ready, self._failed_starts = True, 0
                elif kind == "progress":
                    worker.progress = (content[0], content[1], content[2])
                else:
                    worker.busy = False
                    return self._settled(number, worker, content[0])
        except EOFError:
            return self._buried(number, worker)
        return self._over_limit(number, worker)

    def _settled(self, number: int, worker: _Worker, outcome: Outcome) -> Outcome:
        if outcome.kind == "memory":
            # What filled the memory may still be referred to from somewhere.
            self.kill(number)
        return outcome

    def _buried(self, number: int, worker: _Worker) -> Outcome | None:
        """Put a new worker in the place of a dead one; return what became of its task."""
        kind, words = worker.process.ending()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= 3:
                raise InputError(f"workers cannot be started: {words} (see {self._log})")
        self._workers[number] = self._start(worker.lane)
        if not worker.busy:
            logger.warning("an idle worker has gone: %s", words)
            return None
        stage, done, total = worker.progress
        where = f"stage {stage}, {done} of {total}"
        return Outcome(FAILED, time.monotonic() - worker.since, {}, f"{words} ({where})", kind)

    def _over_limit(self, number: int, worker: _Worker) -> Outcome | None:
        if not worker.ready and time.monotonic() - worker.since > START_SECONDS:
            raise InputError(
                f"workers cannot be started: no sign of life after {START_SECONDS:.0f} s (see {self._log})"
            )
        if self._memory_gb is None or not worker.busy:
            return None
        used = worker.process.memory_gb()
        if used <= self._memory_gb:
            return None
        self.kill(number)
        words = f"used {used:.1f} GB of memory; --memory {self._memory_gb:g} is the limit"
        return Outcome(FAILED, time.monotonic() - worker.since, {}, words, "memory")
