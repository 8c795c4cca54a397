"""Hands tasks to workers, one each, and gives up on those that take too long. Where workers run, the pool decides."""

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Protocol

from threedrec.batch.task import FAILED, HALFWAY, INTERRUPTED, Outcome, Task

logger = logging.getLogger(__name__)

GPU, SIDE = "gpu", "side"
"""Lanes: workers that optimise, and workers that only finish what those have optimised."""

_TICK = 0.1
_WAITING = 2
"""Half-done tasks that may wait for a side worker, per side worker, before optimising pauses."""


class Pool(Protocol):
    """Workers, each with one task at a time."""

    def lanes(self) -> dict[int, str]:
        """Return the lane of every worker."""

    def free(self) -> list[int]:
        """Return the workers that can take a task now."""

    def submit(self, worker: int, task: Task) -> None:
        """Give a free worker a task."""

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Wait at most so long for outcomes, and return those that are there; a dead worker has one too."""

    def progress(self, worker: int) -> tuple[str, int, int]:
        """Return the stage, the steps done and all steps of a worker's task."""

    def kill(self, worker: int) -> None:
        """End a worker, with its task; a new one takes its place."""

    def stop(self) -> None:
        """Ask all workers to end their tasks with a checkpoint."""

    def close(self) -> None:
        """End all workers."""


class Interrupts:
    """Ctrl-C (and SIGTERM, with which clusters announce the end of a machine): once is a wish, twice an order.

    Outside the main thread, which signals never reach, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Running:
    """A task in a worker."""

    task: Task
    since: float


@dataclass
class Dispatcher:
    """One batch on one pool."""

    pool: Pool
    on_outcome: Callable[[Task, Outcome], Task | None]
    """Keeps what came out; returns the task to try again, if any."""
    interrupts: Interrupts
    timeout: float | None = None
    """Seconds after which a task is given up; None for never."""
    on_tick: Callable[["Dispatcher"], None] = lambda dispatcher: None
    """Called a few times a second, for progress."""

    def __post_init__(self) -> None:
        self.running: dict[int, Running] = {}
        self._queues: dict[str, deque[Task]] = {GPU: deque(), SIDE: deque()}
        self._spent: dict[str, float] = {}
        self._told = False

    def run(self, tasks: Iterable[Task]) -> None:
        """Do all tasks, or checkpoint those under way once an interruption asks for it."""
        self._queues[GPU].extend(tasks)
        try:
            while self.running or any(self._queues.values()):
                if self.interrupts.asked and not self._told:
                    self._stop()
                self._submit()
                for worker, outcome in self.pool.wait(_TICK):
                    self._take(worker, outcome)
                self._give_up_late_ones()
                self.on_tick(self)
        finally:
            self.pool.close()

    def _stop(self) -> None:
        logger.info("stopping: %d tasks end with a checkpoint; interrupt again to stop at once", len(self.running))
        self._told = True
        for queue in self._queues.values():
            queue.clear()
        self.pool.stop()

    def _submit(self) -> None:
        lanes = self.pool.lanes()
        sides = [worker for worker, lane in lanes.items() if lane == SIDE]
        for worker in self.pool.free():
            queue = self._queues[lanes[worker]]
            if not queue or (lanes[worker] == GPU and sides and len(self._queues[SIDE]) >= _WAITING * len(sides)):
                continue
            task = queue.popleft()
            if lanes[worker] == SIDE:
                task = replace(task, part="finish", afresh=False)
            elif sides:
                task = replace(task, part="optimise")
            if lanes[worker] == GPU:
                task = replace(task, next_image=self._next_image(task, len(lanes) - len(sides)))
            self.running[worker] = Running(task, time.monotonic())
            self.pool.submit(worker, task)

    def _next_image(self, task: Task, workers: int) -> str:
        """Return the image that the worker of ``task`` may read ahead.

        Images take about as long as one another, so whoever begins last ends last: each of the other workers takes one
        before it.
        """
        queue = self._queues[GPU]
        # After a failure nobody else's image is to be in the same process.
        if task.attempt == 1 and len(queue) >= workers and queue[workers - 1].attempt == 1:
            return queue[workers - 1].image
        return ""

    def _take(self, worker: int, outcome: Outcome) -> None:
        task = self.running.pop(worker).task
        seconds = self._spent.pop(task.input, 0.0) + outcome.seconds
        if outcome.status == HALFWAY:
            self._spent[task.input] = seconds
            if not self._told:
                self._queues[SIDE].append(task)
            return
        if outcome.status == INTERRUPTED:
            return
        again = self.on_outcome(task, replace(outcome, seconds=seconds))
        if again is not None and not self._told:
            self._queues[GPU].append(replace(again, part="all", next_image=""))

    def _give_up_late_ones(self) -> None:
        now = time.monotonic()
        for worker, running in list(self.running.items()):
            if self.timeout is not None and now - running.since > self.timeout:
                self.pool.kill(worker)
                stage, done, total = self.pool.progress(worker)
                what = f"no end after {self.timeout:g} s (stage {stage}, {done} of {total})"
                self._take(
                    worker, Outcome(FAILED, now - running.since, {}, f"{what}; --timeout sets the limit", "timeout")
                )
