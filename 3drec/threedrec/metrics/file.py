"""``metrics.json``: the numbers of a run, written as they come, so that a killed run keeps those it had."""

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from threedrec.errors import InputError
from threedrec.files import jsonable, read_json, write_json

_GB = 1e9


class MetricsFile:
    """Numbers under nested keys (``stages.mesh.seconds``, ``reference.psnr``), kept in one JSON file.

    Every change is written atomically at once. An existing file is loaded, so a resumed run adds to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``, which need not exist.

        Raises:
            InputError: the file exists and is not a JSON object.
        """
        self.path = Path(path)
        loaded = read_json(self.path) if self.path.exists() else {}
        if not isinstance(loaded, dict):
            raise InputError(f"{self.path}: not a metrics file (a JSON object is expected); delete it or restore it")
        self._values: dict[str, Any] = loaded

    @property
    def values(self) -> dict[str, Any]:
        """A copy of everything, nested."""
        return dict(jsonable(self._values))

    def get(self, key: str, default: Any = None) -> Any:
        """Value under the dotted ``key``, or ``default``."""
        node: Any = self._values
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def set(self, key: str, value: Any) -> None:
        """Put ``value`` (number, tensor, text, list or mapping) under the dotted ``key`` and write the file."""
        self.update({key: value})

    def update(self, values: Mapping[str, Any]) -> None:
        """Put several values under their dotted keys and write the file once. A mapping is merged, not replaced."""
        for key, value in values.items():
            self._put(key, value)
        write_json(self.path, self._values)

    def _put(self, key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                self._put(f"{key}.{name}", item)
            return
        *parents, leaf = key.split(".")
        node = self._values
        for part in parents:
            child = node.get(part)
            node[part] = child if isinstance(child, dict) else {}
            node = node[part]
        node[leaf] = jsonable(value)

    @contextmanager
    def stage(self, name: str, device: torch.device | str = "cpu", resumed: bool = False) -> Iterator["StageTimer"]:
        """Measure a stage: ``stages.<name>.seconds`` and ``stages.<name>.peak_memory_gb``, written on the way out.

        On CUDA the peak is of memory held by tensors, and ``peak_host_memory_gb`` is added. With ``resumed``, the
        seconds add to those already there. Call ``StageTimer.flush`` at checkpoints, so that a kill keeps the time.
        """
        timer = StageTimer(self, name, torch.device(device), resumed)
        try:
            yield timer
        finally:
            timer.flush()


class StageTimer:
    """Seconds and peak memory of one running stage."""

    def __init__(self, metrics: MetricsFile, name: str, device: torch.device, resumed: bool) -> None:
        self._metrics = metrics
        self._key = f"stages.{name}"
        self._device = device
        self._seconds_before = float(metrics.get(f"{self._key}.seconds") or 0.0) if resumed else 0.0
        self._peaks = {
            peak: float(metrics.get(f"{self._key}.{peak}") or 0.0) if resumed else 0.0
            for peak in ("peak_memory_gb", "peak_host_memory_gb")
        }
        _reset_peak_memory(device)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began, and those of earlier sittings of a resumed one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._seconds_before + time.perf_counter() - self._start

    def flush(self) -> None:
        """Write the stage's numbers as they are now."""
        now = stage_numbers(self.seconds, self._device)
        for name, before in self._peaks.items():
            if name in now:
                now[name] = max(now[name], before)
        self._metrics.update({self._key: now})


def stage_numbers(seconds: float, device: torch.device | str) -> dict[str, float]:
    """What ``metrics.json`` has of a stage that took ``seconds`` and ends now."""
    numbers = {"seconds": round(seconds, 3), "peak_memory_gb": round(peak_memory_gb(device), 4)}
    if torch.device(device).type == "cuda":
        numbers["peak_host_memory_gb"] = round(peak_memory_gb("cpu"), 4)
    return numbers


def peak_memory_gb(device: torch.device | str = "cpu") -> float:
    """Peak memory in GB (1e9 bytes): allocated by tensors on CUDA, resident in the process on the CPU.

    Since the last reset where that is possible (CUDA, Linux), else since the process began.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GB
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / _GB
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak resident size, Linux
    except OSError:
        pass
