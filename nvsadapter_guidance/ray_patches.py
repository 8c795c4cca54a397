"""The adapter's ray convolutions as products, which is what convolutions without overlap are."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nvsadapter_guidance.adapter import NVSAdapter


def convolve_patches(conv: nn.Conv2d, x: Float[Tensor, "rows channels h w"]) -> Float[Tensor, "rows tokens out"]:
    """``conv(x)`` as tokens, in the precision of ``x``, for a kernel as large as its stride that divides the image."""
    down, right = conv.kernel_size
    patches = x.unflatten(-1, (-1, right)).unflatten(-3, (-1, down)).permute(0, 2, 4, 1, 3, 5)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.linear(patches.flatten(3).flatten(1, 2), conv.weight.to(x.dtype).flatten(1), bias)


def positional_features(
    adapter: NVSAdapter, rays: Float[Tensor, "rows channels h w"], dtype: torch.dtype
) -> dict[int, Float[Tensor, "rows tokens dim"]]:
    """What `NVSAdapter.positional_features` returns, for a network of ``dtype``.

    Where that is half precision, products have factors and results in float16. Factors are as exact as those of TF32,
    which convolutions of float32 run in on a GPU: both keep ten bits, and no embedding or weight is beyond what float16
    holds. Results become half precision for the network anyway.
    """
    if dtype.itemsize != 2:
        return adapter.positional_features(rays)
    halved = rays.half()
    return {level: convolve_patches(cast(nn.Conv2d, adapter.ray_convs[level]), halved) for level in adapter.levels}
