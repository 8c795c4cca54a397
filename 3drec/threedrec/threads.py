"""How many CPU threads to compute with.

Threads that share a core with another busy process wait for each other at the end of every operation: beside one such
process, two threads on two cores can take many times as long as one. So the choice is measured when a job starts.
"""

import logging
import os
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

SECONDS_PER_CHOICE = 0.4
PINNED = "OMP_NUM_THREADS"


def choose_threads() -> int:
    """Set torch to the fastest number of threads, measured on work like ours, and return it.

    ``OMP_NUM_THREADS`` in the environment is kept as it is. Sums are added up in another order by another number of
    threads, so pin it where results must repeat to the last bit.
    """
    if os.environ.get(PINNED):
        return torch.get_num_threads()
    available = torch.get_num_threads()
    choices = sorted({1, max(available // 2, 1), available})
    if len(choices) > 1:
        rates = {count: _rate(count, _work()) for count in choices}
        # More threads have to earn their place: the load that made them slow may come back.
        best = max(choices, key=lambda count: rates[count] * (1.0 if count == 1 else 0.95))
        torch.set_num_threads(best)
        shown = ", ".join(f"{count}: {rate:.0f}/s" for count, rate in rates.items())
        logger.info("CPU threads: %d of %d (measured %s; %s=N pins them)", best, available, shown, PINNED)
    return torch.get_num_threads()


def _work() -> Callable[[], None]:
    """A convolution and a chain of small matrix products: the network's kind of work, and the field's."""
    image, kernel = torch.randn(4, 96, 32, 32), torch.randn(96, 96, 3, 3)
    points, weight = torch.randn(8192, 32), torch.randn(32, 32)

    def run() -> None:
        torch.nn.functional.conv2d(image, kernel, padding=1)
        x = points
        for _ in range(6):
            x = torch.relu(x @ weight) * 0.1

    return run


def _rate(threads: int, work: Callable[[], None]) -> float:
    """Runs of ``work`` a second."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        work()
        start, runs = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS_PER_CHOICE:
            work()
            runs += 1
    return runs / (time.perf_counter() - start)
