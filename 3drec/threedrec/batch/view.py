"""Progress of all workers in one view: bars in a terminal, now and then a line elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from threedrec.batch.dispatch import Dispatcher

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
_MOST_BARS = 32
_NAME = 40


class BatchView:
    """One bar for the batch and one for every worker."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = self._failed = 0
        self._start = self._last_line = time.monotonic()
        self._bars: dict[int, TaskID] = {}
        self._whole = None if progress is None else progress.add_task("batch", total=total)

    def finished(self, name: str, words: str, failed: bool) -> None:
        """Say that an image is settled."""
        self._done += 1
        self._failed += failed
        level = logging.WARNING if failed else logging.INFO
        logger.log(level, "[%d/%d] %s: %s", self._done, self._total, printable(name), words)
        if self._progress is not None and self._whole is not None:
            failures = f" ({self._failed} failed)" if self._failed else ""
            self._progress.update(self._whole, completed=self._done, description=f"batch{failures}")

    def tick(self, dispatcher: Dispatcher) -> None:
        """Show what the workers do."""
        if self._progress is not None:
            self._show_bars(dispatcher, self._progress)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log_line(dispatcher)

    def _log_line(self, dispatcher: Dispatcher) -> None:
        parts = []
        for worker, running in list(dispatcher.running.items())[:_MOST_BARS]:
            stage, done, total = dispatcher.pool.progress(worker)
            parts.append(f"{printable(running.task.input)}: {stage} {done}/{total}")
        left = self._total - self._done
        rate = self._done / (time.monotonic() - self._start)
        wait = f", about {left / rate:.0f} s" if rate > 0 else ""
        logger.info(
            "%d of %d settled, %d failed, %d left%s; %s",
            self._done,
            self._total,
            self._failed,
            left,
            wait,
            "; ".join(parts),
        )

    def _show_bars(self, dispatcher: Dispatcher, progress: Progress) -> None:
        for worker in list(self._bars):
            if worker not in dispatcher.running:
                progress.remove_task(self._bars.pop(worker))
        for worker, running in list(dispatcher.running.items())[:_MOST_BARS]:
            if worker not in self._bars:
                self._bars[worker] = progress.add_task("", total=None)
            stage, done, total = dispatcher.pool.progress(worker)
            name = printable(running.task.input)
            name = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
            progress.update(self._bars[worker], description=f"{name}  {stage}", completed=done, total=total)


def printable(name: str) -> str:
    """Return a file's name as one line of text, whatever is in it."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


@contextmanager
def batch_view(total: int) -> Iterator[BatchView]:
    """Show a batch of ``total`` images."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield BatchView(total, None)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4, redirect_stderr=True) as progress:
        yield BatchView(total, progress)


@contextmanager
def counting(words: str, total: int) -> Iterator[Progress | None]:
    """Show a bar for ``total`` quick things; advance its only task."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as progress:
        progress.add_task(words, total=total)
        yield progress
