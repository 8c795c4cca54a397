"""What makes a process ready for its first reconstruction sooner. Importing this does not import PyTorch."""

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_DRIVER = "libcuda.so.1"
_HEAVY = "diffusers"
"""Once it has been imported, there is nothing to hurry."""


def wake_driver(library: str = _DRIVER) -> threading.Thread:
    """Start the CUDA driver in a thread; PyTorch, which has yet to be imported, then finds it ready.

    The driver takes its time for every GPU of the machine, and does not hold Python's lock meanwhile. Starting it again
    is free, and where there is none PyTorch will say so.
    """
    thread = threading.Thread(target=_wake, args=(library,), name="cuda-driver")
    thread.start()
    return thread


def _wake(library: str) -> None:
    try:
        status = ctypes.CDLL(library).cuInit(0)
    except (OSError, AttributeError) as error:
        logger.debug("no CUDA driver: %s", error)
    else:
        logger.debug("cuInit: %d", status)


def repeatable_products() -> None:
    """Let cuBLAS give the same results in every run; it reads this when it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def warm_device(device: "torch.device") -> threading.Thread:
    """Have PyTorch load its GPU libraries in a thread, while others are imported; join it before the work begins.

    The first product and the first convolution of a process wait for hundreds of megabytes of cuBLAS and cuDNN. What
    goes wrong here goes wrong again, and is told of, where results are needed.
    """
    repeatable_products()
    thread = threading.Thread(target=_use, args=(device,), name="cuda-libraries")
    thread.start()
    return thread


def _use(device: "torch.device") -> None:
    import torch

    # A PyTorch without CUDA asserts that it has none.
    with contextlib.suppress(RuntimeError, AssertionError), torch.no_grad():
        image = torch.zeros(1, 8, 32, 32, device=device)
        image = torch.nn.functional.conv2d(image, torch.zeros(8, 8, 3, 3, device=device), padding=1)
        (image[0, 0] @ image[0, 1]).sum().item()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without looking for garbage: modules make a million objects that stay, and no garbage.

    What is there at the end is left out of later searches too, which an optimisation loop would otherwise pay for.
    Inside, packages are listed once: diffusers and transformers each ask for all that are installed, which takes a
    second where many are.
    """
    if _HEAVY in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    listing = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(listing)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = listing
        gc.freeze()
        gc.enable()
