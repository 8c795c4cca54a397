"""Images an hour on this machine's GPUs, for numbers of GPUs and of images on each at a time, by whole recipes.

    python benchmarks/batch.py                            1, 2, … GPUs; then 2 and 4 images at a time on each
    python benchmarks/batch.py --settings 1x1 2x1 2x2     GPUs x images at a time on each GPU
    python benchmarks/batch.py --settings 1x1+ --repeat 3 +: a further process makes the turntables and the meshes
    python benchmarks/batch.py --seconds 240              settings that are not done by then are left out
    python benchmarks/batch.py --device cpu --settings 1x1 trainer.max_steps=5     the benchmark itself, tried out

All workers of the largest setting are started first, and each warms up by a reconstruction of a few steps; the time
of that is not counted. A setting gives its workers ``--repeat`` images each, the same one for all, so that the times
differ by what is shared alone: the GPU, the CPU, the disk. Where a further process finishes, the images that fill the
pipeline are not counted. One record for each setting is added to ``<out>/throughput.jsonl``.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import records
import torch
from rich.console import Console
from rich.table import Table

from threedrec.batch import Outcome, Task
from threedrec.batch.dispatch import GPU, SIDE, Dispatcher, Interrupts
from threedrec.batch.engine_local import LocalPool
from threedrec.batch.options import RECONSTRUCT
from threedrec.config import dump_config, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "lightning")
FEW_STEPS = ("trainer.max_steps=20", "system.guidance.warm_start.fit_steps=10", "data.resolution_milestones=[5]")
"""Ten of the fit, and five of score distillation at each of two resolutions."""


@dataclass(frozen=True)
class Setting:
    """Which workers are measured."""

    gpus: int
    per_gpu: int
    finisher: bool = False
    """Whether one more process a GPU makes the turntables and the meshes."""

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read ``2x4`` or ``1x1+``."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(\+?)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text}: expected GPUSxIMAGES, such as 2x1, or 2x1+")
        return cls(int(found[1]), int(found[2]), bool(found[3]))

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.gpus}x{self.per_gpu}{'+' if self.finisher else ''}"


class Part:
    """Some workers of a pool that lives longer; see `dispatch.Pool`."""

    def __init__(self, pool: LocalPool, workers: Sequence[int]) -> None:
        self._pool, self._workers = pool, set(workers)
        self.submit, self.progress, self.kill, self.stop = pool.submit, pool.progress, pool.kill, pool.stop

    def lanes(self) -> dict[int, str]:
        """Return the lane of every worker."""
        return {worker: lane for worker, lane in self._pool.lanes().items() if worker in self._workers}

    def free(self) -> list[int]:
        """Return the workers that can take a task now."""
        return [worker for worker in self._pool.free() if worker in self._workers]

    def wait(self, seconds: float) -> list[tuple[int, Outcome]]:
        """Wait at most so long for outcomes."""
        return self._pool.wait(seconds)

    def close(self) -> None:
        """Leave the workers as they are."""


@dataclass
class Bench:
    """Warm workers, and what they are measured with."""

    pool: LocalPool
    devices: Sequence[str]
    folder: Path
    image: Path
    interrupts: Interrupts
    deadline: float
    """On the clock of ``time.monotonic``."""
    _count: int = 0
    ends: list[float] = field(default_factory=list)

    def workers(self, setting: Setting) -> list[int]:
        """Return the numbers of a setting's workers."""
        ids = list(dict.fromkeys(self.devices))[: setting.gpus]
        chosen = [
            [number for number, device in enumerate(self.devices) if device == entry][: setting.per_gpu]
            for entry in ids
        ]
        sides = [number for number, lane in self.pool.lanes().items() if lane == SIDE][: setting.gpus]
        return [number for numbers in chosen for number in numbers] + (sides if setting.finisher else [])

    def run(self, workers: Sequence[int], count: int, config: str) -> list[float]:
        """Reconstruct ``count`` images; return the seconds after which each was done.

        Raises:
            TimeoutError: the deadline has come.
            RuntimeError: an image failed.
        """
        ends: list[float] = []
        start = time.monotonic()

        def keep(task: Task, outcome: Outcome) -> None:
            if outcome.status != "done":
                raise RuntimeError(f"{task.input}: {outcome.error}")
            ends.append(time.monotonic() - start)

        def look_at_the_clock(dispatcher: Dispatcher) -> None:
            if time.monotonic() > self.deadline:
                raise TimeoutError

        tasks = [self._task(config) for _ in range(count)]
        Dispatcher(Part(self.pool, workers), keep, self.interrupts, None, look_at_the_clock).run(tasks)
        return ends

    def _task(self, config: str) -> Task:
        self._count += 1
        folder = self.folder / str(self._count)
        return Task(self.image.name, str(self.image), "", str(folder), config, "")

    def wait_for_workers(self) -> None:
        """Wait until all workers have started."""
        while len(self.pool.free()) < len(self.pool.lanes()):
            self.pool.wait(0.1)


def seconds_an_image(ends: Sequence[float], setting: Setting) -> float:
    """Return the seconds of the whole machine for each image.

    Args:
        ends: seconds after which each image was done, in order.
        setting: with a finisher, the first images only fill the pipeline.
    """
    first = setting.gpus * setting.per_gpu if setting.finisher else 0
    return (ends[-1] - (ends[first - 1] if first else 0.0)) / (len(ends) - first)


def measure(bench: Bench, setting: Setting, repeat: int, config: str) -> dict[str, Any]:
    """Measure one setting."""
    count = setting.gpus * setting.per_gpu * (max(repeat, 2) if setting.finisher else repeat)
    ends = bench.run(bench.workers(setting), count, config)
    return {
        "gpus": setting.gpus,
        "per_gpu": setting.per_gpu,
        "finisher": setting.finisher,
        "images": count,
        "ends": [round(end, 2) for end in ends],
        "images_per_hour": round(3600 / seconds_an_image(ends, setting), 1),
    }


def efficiency(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> float | None:
    """Images an hour of a GPU, over those of one GPU alone that works the same way; None without such a result."""
    alone = [
        other["images_per_hour"]
        for other in results
        if other["gpus"] == 1 and all(other[key] == result[key] for key in ("per_gpu", "finisher"))
    ]
    return result["images_per_hour"] / result["gpus"] / alone[-1] if alone else None


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Images an hour of every setting."""
    shown = Table(title="images an hour")
    for column in ("GPUs", "images on each", "images", "images an hour", "per GPU", "efficiency"):
        shown.add_column(column, justify="right")
    for result in results:
        share = efficiency(result, results)
        shown.add_row(
            str(result["gpus"]),
            f"{result['per_gpu']}{' + finisher' if result['finisher'] else ''}",
            str(result["images"]),
            f"{result['images_per_hour']:.0f}",
            f"{result['images_per_hour'] / result['gpus']:.0f}",
            "" if share is None else f"{share:.1%}",
        )
    return shown


def default_settings(gpus: int) -> list[Setting]:
    """1, 2, 4, … GPUs with one image each, then all with 2 and 4."""
    counts = [count for count in (1, 2, 4, 8) if count <= gpus]
    return [Setting(count, 1) for count in counts] + [Setting(counts[-1], per_gpu) for per_gpu in (2, 4)]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", type=Setting.parse, nargs="+", metavar="GxN", help="GPUs x images on each, + with a finisher")
    add("--repeat", type=int, default=1, help="images for each worker of a setting (default 1)")
    add("--seconds", type=float, default=float("inf"), help="for everything, starting and warming up included")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--image", type=Path, default=REPOSITORY / "load" / "images" / "robot.png")
    add("--config", default=str(REPOSITORY / "configs" / "nvsadapter.yaml"))
    add("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    add("--no-save", action="store_true", help="only print")
    add("overrides", nargs="*", help="key=value, as for launch.py")
    args = parser.parse_intermixed_args()
    available = torch.cuda.device_count() if args.device == "cuda" else 1
    if available == 0:
        parser.error("no GPU here")
    args.settings = args.settings or default_settings(available)
    if max(setting.gpus for setting in args.settings) > available:
        parser.error(f"this machine has {available} GPUs")
    if args.repeat < 1:
        parser.error("--repeat: expected 1 or more")
    return args


def resolved(path: Path, args: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Write the config of all images to ``path``."""
    image = {"data": {"image_path": str(args.image)}}
    config = load_config(args.config, overrides, values=image, device_type=args.device)
    config.data.image_path = ""
    dump_config(config, path)
    return str(path)


def origin(args: argparse.Namespace, config: str) -> dict[str, Any]:
    """What a record says of where it comes from."""
    return {
        "date": records.now(),
        "machine": records.cpu(),
        "cores": os.cpu_count(),
        "versions": records.versions(PACKAGES),
        "device": records.machine(args.device),
        "recipe": load_config(config).recipe,
        "image": args.image.name,
        "overrides": args.overrides,
    }


def run(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Measure all settings; save each one when it is done."""
    start = time.monotonic()
    gpus, per_gpu = (max(getattr(setting, key) for setting in args.settings) for key in ("gpus", "per_gpu"))
    names = [str(index) for index in range(gpus)] if args.device == "cuda" else ["cpu"]
    devices = [name for name in names for _ in range(per_gpu)]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, Interrupts() as interrupts:
        folder = Path(name)
        whole = resolved(folder / "whole.yaml", args, args.overrides)
        short = resolved(folder / "short.yaml", args, [*args.overrides, *FEW_STEPS])
        finisher = any(setting.finisher for setting in args.settings)
        pool = LocalPool(RECONSTRUCT, folder / "logs", devices, finisher)
        try:
            bench = Bench(pool, devices, folder, args.image, interrupts, start + args.seconds)
            bench.wait_for_workers()
            console.print(f"{len(pool.lanes())} workers started after {time.monotonic() - start:.0f} s")
            if not all(setting.finisher for setting in args.settings):
                bench.run([number for number, lane in pool.lanes().items() if lane == GPU], len(devices), short)
            if finisher:
                bench.run(list(pool.lanes()), len(devices), short)
            console.print(f"warm after {time.monotonic() - start:.0f} s")
            for setting in args.settings:
                results.append(origin(args, whole) | measure(bench, setting, args.repeat, whole))
                console.print(f"{setting}: {results[-1]['images_per_hour']} images an hour, {results[-1]['ends']} s")
                if not args.no_save:
                    records.append(args.out, "throughput.jsonl", results[-1:])
        except TimeoutError:
            console.print(f"--seconds {args.seconds:g} are over; done: {len(results)} of {len(args.settings)} settings")
        finally:
            pool.close()
    return results


def main() -> None:
    """Measure and show."""
    console = Console()
    results = run(parse(), console)
    console.print(table(results))
    if not results:
        sys.exit(1)


if __name__ == "__main__":
    main()
