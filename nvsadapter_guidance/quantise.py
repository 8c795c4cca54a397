"""Weights in eight bits: how the embedded model fits into a small file.

A matrix or kernel is stored as int8 with one float16 scale for each output channel (symmetric, round to nearest), so
the largest error of a weight is half a step, ``max|w| / 254`` of its channel. Vectors (biases, norms) stay float16.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from nvsadapter_guidance.errors import InputError

SCALE_SUFFIX = ".int8_scale"
MIN_ELEMENTS = 2048
"""Smaller tensors are kept as float16: they cost little and often matter much."""


def quantise_tensor(weight: Float[Tensor, "out ..."]) -> tuple[Int8[Tensor, "out ..."], Float[Tensor, " out"]]:
    """Return int8 values and the float16 scale of each output channel, ``weight ~ values * scale``."""
    flat = weight.float().flatten(1)
    scale = (flat.abs().amax(dim=1).clamp_min(1e-12) / 127.0).half().clamp_min(torch.finfo(torch.float16).tiny)
    values = (flat / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return values.view_as(weight), scale


def quantise_state_dict(state: dict[str, Tensor], half: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Quantise the large floating tensors of ``state``; others become float16, as do keys beginning with ``half``."""
    packed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        large = tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() >= MIN_ELEMENTS
        if large and not key.startswith(half):
            packed[key], packed[key + SCALE_SUFFIX] = (t.contiguous() for t in quantise_tensor(tensor))
        else:
            packed[key] = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
    return packed


def dequantise_state_dict(packed: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Undo :func:`quantise_state_dict`, giving float32 tensors.

    Raises:
        InputError: an int8 tensor has no scale, or a value is not finite; ``where`` names the file.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in packed.items():
        if key.endswith(SCALE_SUFFIX):
            continue
        if tensor.dtype == torch.int8:
            scale = packed.get(key + SCALE_SUFFIX)
            if scale is None:
                raise InputError(f"{where}: tensor '{key}' is int8 but has no scale; the file is damaged")
            tensor = tensor.float() * scale.float().view(-1, *([1] * (tensor.ndim - 1)))
        state[key] = tensor.float() if tensor.is_floating_point() else tensor
        if not torch.isfinite(state[key]).all():
            raise InputError(f"{where}: tensor '{key}' holds NaN or infinity; the file is damaged, install again")
    return state
