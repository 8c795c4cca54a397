"""The engine of one machine: worker processes that keep the model, one on each GPU or several that share it.

A worker that dies costs its task only: the next task gets a new one. Where a worker has a GPU to itself, a second
process finishes: it renders the turntables and makes the meshes, so that the first can go on with the next image.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from threedrec.batch.dispatch import GPU, SIDE
from threedrec.batch.process import Process
from threedrec.batch.task import FAILED, Outcome, Task
from threedrec.errors import InputError
from threedrec.files import write_error
from threedrec.threads import PINNED

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""A worker that has not said a word after this long never will."""


def worker_devices(gpu: str, share: float | None) -> list[str]:
    """Return the device of every worker that optimises, ``cpu`` or the id of a GPU.

    Args:
        gpu: as ``--gpu`` takes it: auto, cpu, or ids such as ``0,1``, each of which gets workers.
        share: of a GPU for each worker; None for all of it.

    Raises:
        InputError: no such GPU, or a share where there is none.
    """
    from threedrec.launch import choose_device

    ids = list(dict.fromkeys(gpu.strip(",").split(",")))
    if len(ids) > 1 and not all(entry.isdigit() for entry in ids):
        raise InputError(f"--gpu {gpu}: expected auto, cpu, or ids such as 0 or 0,1")
    found = [choose_device(entry) for entry in ids]
    if found[0].type != "cuda":
        if share not in (None, 1):
            raise InputError(f"--gpus-per-task {share:g}: there is no GPU to share; --engine ray uses many CPUs")
        return ["cpu"]
    _tell_of_others(gpu)
    return [str(device.index) for device in found for _ in range(int(1 / (share or 1)))]


def _tell_of_others(gpu: str) -> None:
    import torch

    count = torch.cuda.device_count()
    if gpu == "auto" and count > 1:
        ids = ",".join(map(str, range(count)))
        logger.info("this machine has %d GPUs, of which one is used; --gpu %s uses all", count, ids)


def environment(device: str, workers: int) -> dict[str, str]:
    """Return what a worker's environment says of its device, and of its part of the CPU's cores.

    Args:
        device: ``cpu``, or the id of the only GPU that the worker is to see (as its number 0).
        workers: how many of them share the machine.
    """
    variables = {}
    if device != "cpu":
        visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
        variables["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible else device
    if workers > 1 and not os.environ.get(PINNED):
        variables[PINNED] = str(max((os.cpu_count() or 1) // workers, 1))
    return variables


@dataclass
class _Worker:
    lane: str
    device: str
    process: Process
    ready: bool = False
    busy: bool = False
    since: float = field(default_factory=time.monotonic)
    progress: tuple[str, int, int] = ("start", 0, 1)


class LocalPool:
    """Worker processes of this machine; see `dispatch.Pool`."""

    def __init__(
        self, function: str, logs: Path, devices: Sequence[str], overlap: bool, memory_gb: float | None = None
    ) -> None:
        """Start the workers.

        Args:
            function: the task function, ``module:function``.
            logs: folder for what the processes say, a file each.
            devices: of the workers, as `worker_devices` returns them.
            overlap: start one more worker on each device, which finishes what the others have optimised.
            memory_gb: resident memory beyond which a worker is ended.
        """
        self._function, self._logs, self._memory_gb = function, logs, memory_gb
        self._failed_starts = 0
        places = [(GPU, device) for device in devices]
        if overlap:
            places += [(SIDE, device) for device in dict.fromkeys(devices)]
        self._count = len(places)
        self._workers: dict[int, _Worker] = {}
        try:
            logs.mkdir(exist_ok=True)
            for number, (lane, device) in enumerate(places):
                self._workers[number] = self._start(number, lane, device)
        except OSError as error:
            self.close()
            raise write_error(logs, error) from error

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
        # A GPU that is the only one to be seen has number 0.
        target.process.send(replace(task, device="cpu" if target.device == "cpu" else "0"))

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
        self._workers[worker] = self._start(worker, old.lane, old.device)
        self._workers[worker].progress = old.progress

    def stop(self) -> None:
        """Ask all workers to end their tasks with a checkpoint."""
        for worker in self._workers.values():
            worker.process.stop()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.process.kill()

    def _start(self, number: int, lane: str, device: str) -> _Worker:
        return _Worker(
            lane, device, Process(self._function, self._logs / f"{number}.log", environment(device, self._count))
        )

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
                raise InputError(f"workers cannot be started: {words} (see {worker.process.log})")
        self._workers[number] = self._start(number, worker.lane, worker.device)
        if not worker.busy:
            logger.warning("an idle worker has gone: %s", words)
            return None
        stage, done, total = worker.progress
        where = f"stage {stage}, {done} of {total}"
        return Outcome(FAILED, time.monotonic() - worker.since, {}, f"{words} ({where})", kind)

    def _over_limit(self, number: int, worker: _Worker) -> Outcome | None:
        if not worker.ready and time.monotonic() - worker.since > START_SECONDS:
            raise InputError(
                f"workers cannot be started: no sign of life after {START_SECONDS:.0f} s (see {worker.process.log})"
            )
        if self._memory_gb is None or not worker.busy:
            return None
        used = worker.process.memory_gb()
        if used <= self._memory_gb:
            return None
        self.kill(number)
        words = f"used {used:.1f} GB of memory; --memory {self._memory_gb:g} is the limit"
        return Outcome(FAILED, time.monotonic() - worker.since, {}, words, "memory")
