"""What benchmarks share: timing a call, what every record says of its origin, and where it is kept."""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch


def now() -> str:
    """The time of a measurement, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages, and of Python."""
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def cpu() -> str:
    """The processor, and how many of its threads are used."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def machine(device: str) -> str:
    """The GPU's name, or :func:`cpu`."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else cpu()


def gpu(device: str) -> str:
    """What ``--gpu`` of launch.py takes for cpu, cuda or cuda:N."""
    return "cpu" if device == "cpu" else device.removeprefix("cuda").removeprefix(":") or "0"


def milliseconds(function: Callable[[], object], device: str, repeats: int, warm_up: int) -> float:
    """The median time of a call; on a GPU of CUDA events over calls that follow each other without a pause."""
    for _ in range(warm_up):
        function()
    if torch.device(device).type == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)
    pairs = []
    for _ in range(repeats):
        pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        pairs[-1][0].record()
        function()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs)


def append(folder: Path, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to ``folder/name``, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
