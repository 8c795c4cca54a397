"""What a run tells while it works: TensorBoard and CSV files, and progress in the terminal."""

import csv
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from threedrec.event_file import EventLog

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal, progress is one line of the log this often."""


class Sink(Protocol):
    """Where the values of steps are kept."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the values of a step, by name."""

    def flush(self) -> None:
        """Write what was taken in."""

    def close(self) -> None:
        """Write what was taken in, and end."""


class CsvLog:
    """Values as a table: a column a name and one for the step, a row per step; empty where a step has no value."""

    def __init__(self, folder: Path, every: int = 50) -> None:
        """Write ``folder/metrics.csv``, ``every`` rows at a time."""
        self.path, self.every = folder / "metrics.csv", every
        self._rows: list[dict[str, float]] = []
        self._names: list[str] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the values of a step, by name."""
        self._rows.append({**values, "step": step})
        if len(self._rows) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what was taken in."""
        if not self._rows:
            return
        fresh = set().union(*self._rows) - set(self._names)
        rows: list[dict[str, Any]] = list(self._rows)
        if fresh and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [*csv.DictReader(file), *rows]
        self._names = sorted({*self._names, *fresh})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self._names)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        self._rows = []

    def close(self) -> None:
        """Write what was taken in, and end."""
        self.flush()


def file_loggers(run_dir: Path) -> list[Sink]:
    """Return what writes ``tb_logs`` and ``csv_logs``; a resumed run begins a new version of each."""
    return [EventLog(_next_version(run_dir / "tb_logs")), CsvLog(_next_version(run_dir / "csv_logs"))]


def _next_version(folder: Path) -> Path:
    """Return ``folder/version_N``, N one above those that are there."""
    found = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return folder / f"version_{max((int(name) for name in found if name.isdigit()), default=-1) + 1}"


class Reporter:
    """Shows how far a stage has come: a bar in a terminal, now and then a line elsewhere."""

    def __init__(
        self,
        enabled: bool = True,
        console: Console | None = None,
        listener: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Report to ``console`` (default: stderr); with ``enabled`` false, to the log only.

        ``listener`` is told the stage, the steps that are over, and how many there are.
        """
        self.listener = listener
        self.console = console or Console(file=sys.stderr)
        self._bar = enabled and self.console.is_terminal

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator["StageReport"]:
        """Report a stage of ``total`` steps of which ``done`` are over."""
        if not self._bar:
            yield StageReport(name, total, done, None, self.listener)
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield StageReport(name, total, done, progress, self.listener)


class StageReport:
    """Progress of one stage."""

    def __init__(
        self,
        name: str,
        total: int,
        done: int,
        progress: Progress | None,
        listener: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.name, self.total = name, total
        self._progress = progress
        self._listener = listener
        self._first = done
        self._start = self._last_line = time.monotonic()
        if progress is not None:
            self._task = progress.add_task(name, total=total, completed=done, rate="", losses="")

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """Say that ``done`` steps are over, and the losses of the last one."""
        if self._listener is not None:
            self._listener(self.name, done, self.total)
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:5])
        if self._progress is not None:
            self._progress.update(self._task, completed=done, rate=f"{rate:.2f} it/s", losses=shown)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or done == self.total:
            left = (self.total - done) / max(rate, 1e-9)
            logger.info("%s %d/%d  %.2f it/s  %.0f s left  %s", self.name, done, self.total, rate, left, shown)
            self._last_line = now
