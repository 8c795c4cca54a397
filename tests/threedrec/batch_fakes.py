"""Task functions for tests of batches: a real one with a tiny guidance, and one that does what an image's name says."""

import ctypes
import os
import signal
import time
from pathlib import Path

import spheres  # noqa: F401 - registers its guidance in the worker

from threedrec.batch import task as batch_task
from threedrec.batch.task import Outcome, Task
from threedrec.host import Host, Interrupted

FAKE = "batch_fakes:fake"
TINY = "batch_fakes:tiny"


def tiny(task: Task, host: Host) -> Outcome:
    """The real thing; the guidance of four spheres is registered by the import above."""
    return batch_task.reconstruct(task, host)


def fake(task: Task, host: Host) -> Outcome:
    """Write who was here, then end as the image's name says (``crash-once.png`` crashes at the first attempt)."""
    folder = Path(task.folder)
    (folder / "save").mkdir(parents=True, exist_ok=True)
    with (folder / "visits.txt").open("a") as file:
        file.write(f"{task.attempt} {os.getpid()} {task.part} {host.guidances.loads}\n")
    name = Path(task.input).stem
    host.progress("fake", 1, 3)
    if "full" in name:
        return Outcome("failed", error="the disk is full", kind="disk")
    if "once" not in name or task.attempt == 1:
        misbehave(name, host)
    return Outcome("halfway" if task.part == "optimise" else "done", 0.01, {"psnr": 20.0, "stages": {"fine": 0.01}})


def misbehave(name: str, host: Host) -> None:
    if "crash" in name:
        ctypes.string_at(0)
    if "killed" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in name:
        os._exit(3)
    if "raise" in name:
        raise ValueError("a fault\nof the program")
    if "greedy" in name:
        hoard = bytearray(1_500_000_000)
        time.sleep(60)
        del hoard
    if "hang" in name:
        time.sleep(600)
    if "slow" in name:
        for _ in range(200):
            time.sleep(0.05)
            if host.stop():
                raise Interrupted
