"""Strict loading of state dicts: every tensor must be there, none may be left over, shapes must agree."""

from typing import Dict, Mapping

import torch
from torch import Tensor, nn

from nvsadapter_guidance.errors import InputError


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of tensors.

    Raises:
        InputError: names `source` and the first tensor that is missing, surplus or of another shape.
    """
    for key in sorted(wanted.keys() - found.keys()):
        raise InputError(f"{source}: tensor '{key}' is missing; the file is of another model")
    for key in sorted(found.keys() - wanted.keys()):
        raise InputError(f"{source}: tensor '{key}' is not known; the file is of another model")
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            shapes = f"{tuple(found[key].shape)}, needed is {tuple(value.shape)}"
            raise InputError(f"{source}: tensor '{key}' has shape {shapes}; the file is of another model")


def load_strict(module: nn.Module, tensors: Dict[str, Tensor], source: str) -> None:
    """Load exactly the tensors of `module`; values are converted to its dtype and device.

    Raises:
        InputError: names `source` and the first tensor that is missing, surplus, of another shape or not finite.
    """
    check_tensors(tensors, module.state_dict(), source)
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{source}: tensor '{key}' holds NaN or infinite values; download or train it again")
    module.load_state_dict(tensors)
