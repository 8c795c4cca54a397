"""Which implementation a part of the field takes: Triton kernels on a GPU, plain PyTorch elsewhere."""

import logging
from functools import lru_cache

import torch

from nvsadapter_guidance.triton_support import is_installed, is_interpreted
from threedrec.errors import InputError

BACKENDS = ("auto", "triton", "torch")

logger = logging.getLogger(__name__)


def use_triton(backend: str, device: torch.device, misfit: str | None, key: str) -> bool:
    """Return whether to take Triton kernels.

    "auto" takes them on CUDA and says once, as a warning, why when it cannot; elsewhere it takes PyTorch.

    Args:
        backend: one of ``BACKENDS``.
        device: where the computation happens.
        misfit: what the kernels cannot do of what the configuration asks for, if anything.
        key: of the configuration, for messages.

    Raises:
        InputError: "triton" was asked for and cannot work here; the message starts with ``key``.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    problem = misfit or _missing(device.type)
    if problem is None:
        _say(logging.INFO, f"{key}: Triton kernels")
    elif backend == "triton":
        raise InputError(f"{key}.backend: triton does not work here: {problem}; use auto or torch")
    else:
        _say(logging.WARNING, f"{key}: plain PyTorch, several times slower than Triton kernels: {problem}")
    return problem is None


def check_backend(backend: str, key: str) -> None:
    """Raise InputError unless ``backend`` is one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise InputError(f"{key}.backend: unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")


def _missing(device_type: str) -> str | None:
    if device_type != "cuda" and not is_interpreted():
        return "the device is no CUDA GPU"
    return None if is_installed() else "Triton is not installed (pip install triton)"


@lru_cache
def _say(level: int, message: str) -> None:
    """Log a message once in the life of the process."""
    logger.log(level, message)
