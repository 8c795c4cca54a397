"""The engine of many workers: Ray actors, each with its share of a GPU. Placement and machines are Ray's affair.

An actor is a warm worker (`hosting.WarmHost`). The batch's own process keeps the manifest: it hands out the tasks, so a
lost machine costs the tasks it had, and each of them goes on from its checkpoint somewhere else.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from threedrec.batch.dispatch import GPU
from threedrec.batch.options import RECONSTRUCT, BatchOptions
from threedrec.batch.plan import Settings
from threedrec.batch.task import FAILED, Outcome, Task
from threedrec.batch.weight_share import SharedWeights, place, shared_weights
from threedrec.errors import InputError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_QUESTIONS = 1.0
_SECONDS_OF_PATIENCE = 60.0
_MOST_FAILED_STARTS = 3
_SECONDS_TO_ANSWER = 10.0
_LONGEST_MESSAGE = 300


def ray_module() -> Any:
    """Return the package ``ray``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--engine ray: the package 'ray' is not installed; pip install -e '.[cluster]', or use --engine local"
        ) from error
    return ray


def connect(options: BatchOptions) -> Any:
    """Return ``ray``, connected to the cluster of ``--address`` or to one on this machine.

    Raises:
        InputError: Ray is not installed, or there is no cluster at that address.
    """
    ray = ray_module()
    if ray.is_initialized():
        return ray
    _knock(options.address)
    # Paths of a checkout; what is installed, every machine has for itself.
    paths = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}}
    try:
        ray.init(
            address=options.address or "local",
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if options.address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--address {options.address or 'local'}: no Ray cluster there: {reason}") from error
    return ray


@contextmanager
def connection() -> Iterator[None]:
    """End what `connect` begins in the block, with a cluster that it has started; a connection of before stays."""
    before = _is_connected()
    try:
        yield
    finally:
        if not before and _is_connected():
            ray_module().shutdown()


def _is_connected() -> bool:
    ray = sys.modules.get("ray")  # not imported for this
    return ray is not None and ray.is_initialized()


def _knock(address: str | None) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise InputError(f"--address {address}: no Ray cluster there: {error.strerror or error}") from error


def gpu_share(options: BatchOptions) -> float:
    """Return how much of a GPU each worker gets; without ``--gpus-per-task``, what the cluster suggests."""
    if options.gpus_per_task is not None:
        return options.gpus_per_task
    if options.gpu == "cpu":
        return 0.0
    if connect(options).cluster_resources().get("GPU", 0) > 0:
        return 1.0
    logger.warning("the Ray cluster has no GPU: its CPUs are used; --gpus-per-task 1 waits for machines with GPUs")
    return 0.0


def device_type(options: BatchOptions) -> str:
    """Return what the workers compute on, ``cuda`` or ``cpu``; recipes are chosen by it."""
    return "cuda" if gpu_share(options) > 0 else "cpu"


class Worker:
    """The actor: does tasks, and answers questions meanwhile."""

    def __init__(self, function: str, shared: SharedWeights | None) -> None:
        from threedrec.batch.hosting import WarmHost, task_function
        from threedrec.terminal import setup_logging

        setup_logging()
        self._shared, self._values = shared, dict[str, Any]()
        self._progress = ("start", 0, 1)
        self._host = WarmHost(task_function(function), self._hear, read_ahead=function == RECONSTRUCT)

    def ready(self) -> bool:
        """Whether the worker has all it needs; if not, it is waiting for ``take_weights``."""
        if self._shared is None:
            return True
        # The very files of the batch, whatever else this machine would find.
        self._values = self._shared.values(self._shared.source)
        return self._shared.is_here()

    def take_weights(self, *contents: Any) -> bool:
        """Keep weight files on this machine's disk, once for all of its workers."""
        if self._shared is not None:
            self._values = place(self._shared, contents)
        return True

    def work(self, task: Task) -> Outcome:
        """Do a task."""
        self._progress = ("start", 0, 1)
        return self._host.work(replace(task, values=self._values))

    def progress(self) -> tuple[str, int, int]:
        """Return the stage, its steps done, and all its steps."""
        return self._progress

    def stop(self) -> None:
        """Ask the task under way to end with a checkpoint."""
        self._host.stop()

    def _hear(self, stage: str, done: int, total: int) -> None:
        self._progress = (stage, done, total)


@dataclass
class _Slot:
    actor: Any
    starting: Any
    """What ``ready`` or ``take_weights`` will return; None once the worker is ready."""
    result: Any = None
    asked: Any = None
    progress: tuple[str, int, int] = ("start", 0, 1)
    since: float = field(default_factory=time.monotonic)


class RayPool:
    """Actors of a Ray cluster; see `dispatch.Pool`."""

    def __init__(self, options: BatchOptions, settings: Settings) -> None:
        """Start the actors; those that find no room wait for it (or for the autoscaler to make it).

        Raises:
            InputError: no Ray, no cluster, or no room for a single worker now or ever.
        """
        self._ray = connect(options)
        self._share, self._function = gpu_share(options), options.function
        self._memory_gb = options.memory_gb
        self._on_cluster = options.address is not None
        self._shared = shared_weights(settings.config) if self._on_cluster else None
        self._contents: list[Any] | None = None
        self._failed_starts = 0
        self._last_question = self._last_warning = time.monotonic()
        count = options.workers or self._room()
        self._slots = {number: self._start() for number in range(count)}
        logger.info("%d Ray workers with %g GPU each", count, self._share)

    def lanes(self) -> dict[int, str]:
        """Return the lane of every worker."""
        return dict.fromkeys(self._slots, GPU)

    def free(self) -> list[int]:
        """Return the workers that can take a task now."""
        return [number for number, slot in self._slots.items() if slot.starting is None and slot.result is None]

    def submit(self, worker: int, task: Task) -> None:
        """Give a free worker a task."""
        slot = self._slots[worker]
        slot.since, slot.progress = time.monotonic(), ("start", 0, 1)
        device = "auto" if self._share > 0 else "cpu"
        slot.result = slot.actor.work.remote(replace(task, device=device))

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Wait at most so long for outcomes.

        Raises:
            InputError: workers cannot be started.
        """
        waiting = [slot.starting or slot.result for slot in self._slots.values()]
        waiting = [reference for reference in waiting if reference is not None]
        if not waiting:
            time.sleep(seconds)
            return []
        # Only what is ready: no results of several gigabytes are fetched by this.
        finished, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=seconds)
        outcomes = []
        for number, slot in list(self._slots.items()):
            if slot.starting in finished:
                self._started(number, slot)
            elif slot.result in finished:
                outcomes.append((number, self._collect(number, slot)))
        self._ask_for_progress()
        return outcomes

    def progress(self, worker: int) -> tuple[str, int, int]:
        """Return the stage, the steps done and all steps of a worker's task, at most some seconds old."""
        return self._slots[worker].progress

    def kill(self, worker: int) -> None:
        """End a worker, with its task; a new one takes its place."""
        old = self._slots[worker]
        self._ray.kill(old.actor, no_restart=True)
        self._slots[worker] = self._start()
        self._slots[worker].progress = old.progress

    def stop(self) -> None:
        """Ask all workers to end their tasks with a checkpoint."""
        for slot in self._slots.values():
            slot.actor.stop.remote()

    def close(self) -> None:
        """End all workers."""
        for slot in self._slots.values():
            self._ray.kill(slot.actor, no_restart=True)

    def _start(self) -> _Slot:
        memory = {} if self._memory_gb is None else {"memory": int(self._memory_gb * 1e9)}
        actor_class = self._ray.remote(Worker).options(
            num_cpus=1, num_gpus=self._share, max_restarts=0, max_concurrency=4, **memory
        )
        actor = actor_class.remote(self._function, self._shared)
        return _Slot(actor, actor.ready.remote())

    def _room(self) -> int:
        """Return how many workers the cluster as it is has room for."""
        resources = self._ray.cluster_resources()
        if self._share == 0:
            count = int(resources.get("CPU", 0))
        elif self._share < 1:
            count = int(resources.get("GPU", 0)) * int(1 / self._share)
        else:
            count = int(resources.get("GPU", 0) / self._share)
        if self._memory_gb is not None:
            count = min(count, int(resources.get("memory", 0) / (self._memory_gb * 1e9)))
        if count == 0:
            raise InputError(
                f"--gpus-per-task {self._share:g}: the Ray cluster has no room for a worker now; with --workers N the"
                " batch waits for N of them (autoscaling clusters), --gpus-per-task 0 uses CPUs"
            )
        return count

    def _started(self, number: int, slot: _Slot) -> None:
        try:
            complete = self._ray.get(slot.starting)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_FAILED_STARTS:
                raise InputError(f"Ray workers cannot be started: {_first_line(error)}") from error
            self._slots[number] = self._start()
            return
        self._failed_starts = 0
        slot.starting = None if complete else slot.actor.take_weights.remote(*self._weights())

    def _weights(self) -> list[Any]:
        """Put the weight files into the object store, once; Ray brings them to the machines that ask."""
        if self._contents is None:
            shared = self._shared
            if shared is None:
                raise RuntimeError("no weights to share")
            logger.info("weights go to the cluster: %s", shared.source)
            self._contents = [self._ray.put(content) for content in shared.contents()]
        return self._contents

    def _collect(self, number: int, slot: _Slot) -> Outcome:
        reference, slot.result = slot.result, None
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._slots[number] = self._start()
            stage, done, total = slot.progress
            words = f"{_first_line(error)} (stage {stage}, {done} of {total})"
            return Outcome(FAILED, time.monotonic() - slot.since, {}, words, self._kind(error))
        if outcome.kind == "memory":
            self.kill(number)
        return outcome

    def _kind(self, error: Exception) -> str:
        """Return the manifest's word for the end of an actor."""
        text = str(error).lower()
        if isinstance(error, self._ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
            return "memory"
        if getattr(error, "preempted", False) or "node has died" in text or "node was" in text:
            return "lost"
        return "crash"

    def _ask_for_progress(self) -> None:
        """Collect answers and ask again, without waiting for either."""
        now = time.monotonic()
        if now - self._last_question < _SECONDS_BETWEEN_QUESTIONS:
            return
        self._last_question = now
        waiting = sum(slot.starting is not None for slot in self._slots.values())
        if waiting and now - self._last_warning > _SECONDS_OF_PATIENCE:
            self._last_warning = now
            logger.warning(
                "%d of %d Ray workers have not begun: they wait for room in the cluster", waiting, len(self._slots)
            )
        asked = [slot.asked for slot in self._slots.values() if slot.asked is not None]
        answered = self._ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for slot in self._slots.values():
            if slot.asked in answered:
                try:
                    slot.progress = self._ray.get(slot.asked)
                except self._ray.exceptions.RayError:
                    logger.debug("a worker did not say how far it is")
                slot.asked = None
            if slot.asked is None and slot.result is not None:
                slot.asked = slot.actor.progress.remote()


def _first_line(error: Exception) -> str:
    """Return the first sentence that says something; Ray's messages are pages long."""
    text = str(error)
    if "Worker exit detail:" in text:
        text = f"the worker died: {text.partition('Worker exit detail:')[2].strip().split('. ')[0]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:_LONGEST_MESSAGE] if lines else type(error).__name__
