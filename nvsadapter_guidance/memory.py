"""How much goes through a model at a time: the same numbers from less memory, for a little more time."""

from dataclasses import dataclass

import torch

from nvsadapter_guidance.errors import InputError

MEMORY_MODES = ("auto", "normal", "low")
SMALL_DEVICE = 14e9
"""Bytes; ``auto`` is ``low`` on GPUs with less memory than this."""


@dataclass(frozen=True)
class MemoryPlan:
    """Limits of one call; None sets none. Whatever they are, results agree to rounding."""

    pixels_per_call: int | None = None
    """Image pixels that go through the autoencoder at a time. When a batch has more and a gradient is wanted, the
    activations of a part are made again for its backward pass instead of being kept."""
    half_pixels_per_call: int | None = None
    """The same for the encoder in half precision."""
    groups_per_call: int | None = None
    """Groups of views that the network denoises at a time."""
    offload_image_encoder: bool = False
    """Keep the image encoder in host memory except while a support view is prepared."""
    graphs: bool = True
    """CUDA graphs may be made, which keep the activations of their calls."""


PLANS = {
    # Released sizes on one GPU: four images of 256 pixels with their gradient are 3 GB of activations in float32.
    "normal": MemoryPlan(4 * 256**2, 16 * 256**2, groups_per_call=8, offload_image_encoder=True),
    "low": MemoryPlan(256**2, 256**2, groups_per_call=1, offload_image_encoder=True, graphs=False),
}


def memory_plan(mode: str, device: torch.device) -> MemoryPlan:
    """The plan of a mode: ``normal``, ``low``, or ``auto``, which chooses by the device's memory.

    Raises:
        InputError: an unknown mode.
    """
    if mode not in MEMORY_MODES:
        raise InputError(f"system.guidance.memory: '{mode}' is unknown; use one of {', '.join(MEMORY_MODES)}")
    if mode == "auto":
        small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < SMALL_DEVICE
        mode = "low" if small else "normal"
    return PLANS[mode]
