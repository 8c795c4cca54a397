"""Bilinear resizing of images."""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_bilinear(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C size size"]:
    """Bring images to ``size`` by ``size`` pixels; antialiased only when shrinking.

    Where a GPU is asked for the gradient it is two products, of rows and of columns: torch's own takes milliseconds
    for it once results are to repeat themselves.
    """
    if images.is_cuda and images.requires_grad and torch.is_grad_enabled():
        return multiplied(images, size)
    shrinking = images.shape[-1] > size
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=shrinking)


def multiplied(images: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C size size"]:
    """The same as products."""
    shrinking = images.shape[-1] > size
    rows, columns = (axis_weights(side, size, shrinking, images.dtype, images.device) for side in images.shape[-2:])
    return rows @ images @ columns.T


@functools.lru_cache(maxsize=32)
def axis_weights(
    side: int, size: int, shrinking: bool, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "size side"]:
    """What every pixel of ``size`` takes of every pixel of ``side``, along one axis."""
    with torch.inference_mode(False), torch.no_grad():
        every_pixel = torch.eye(side, dtype=torch.float64)[None, None]
        shares = F.interpolate(every_pixel, (size, side), mode="bilinear", align_corners=False, antialias=shrinking)
        return shares[0, 0].to(device, dtype)
