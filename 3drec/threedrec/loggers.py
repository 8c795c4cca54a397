"""What a run tells while it works: TensorBoard and CSV files, and progress in the terminal."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal, progress is one line of the log this often."""


def file_loggers(run_dir: Path) -> list[Any]:
    """Return Fabric loggers that write ``tb_logs`` and ``csv_logs``; a resumed run begins a new version of each."""
    from lightning.fabric.loggers import CSVLogger, TensorBoardLogger

    return [
        TensorBoardLogger(root_dir=run_dir, name="tb_logs"),
        CSVLogger(root_dir=run_dir, name="csv_logs", flush_logs_every_n_steps=50),
    ]


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
