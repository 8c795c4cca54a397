"""Whether Triton's kernels can run."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

INTERPRET = "TRITON_INTERPRET"


@functools.cache
def is_installed() -> bool:
    """Whether Triton is there; PyTorch for CUDA brings it along."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, one number after another, to be tested there."""
    return os.environ.get(INTERPRET) == "1"


def has_triton(device: torch.device) -> bool:
    """Whether kernels run on tensors of a device: Triton is there, and so is a GPU or its interpreter."""
    return is_installed() and (device.type == "cuda" or is_interpreted())


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, where Triton launches whatever device its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
