"""Images at the door of the sampling pipeline: what callers have in, what they want out."""

from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModelConfig

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def support_tensor(image: Union[Image.Image, np.ndarray, Tensor], size: int) -> Float[Tensor, "1 3 size size"]:
    """A support image in about [-1, 1] as the released project prepares it.

    Pixels whose alpha is exactly 0 become white and all others keep their raw colour (no blending); then bicubic
    antialiased resizing to a square, whose overshoot is kept.

    Args:
        image: PIL image of any mode; array ``(H, W, 3 or 4)`` of bytes or of floats in [0, 1]; tensor
            ``([1,] 3 or 4, H, W)`` of floats in [0, 1].
        size: side in pixels.

    Raises:
        InputError: no such image.
    """
    pixels = _channels_first(image)
    if pixels.shape[0] == 4:
        pixels = torch.where(pixels[3:] == 0.0, 1.0, pixels[:3])
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    return pixels[None] * 2.0 - 1.0


def convert_views(views: Float[Tensor, "V 3 H W"], output_type: str) -> Any:
    """Views in [-1, 1] as callers want them, on the CPU.

    Args:
        output_type: ``pil`` images, or in [0, 1] an ``np`` array ``(V, H, W, 3)`` or a ``pt`` tensor ``(V, 3, H, W)``.

    Raises:
        InputError: an unknown output type.
    """
    check_output_type(output_type)
    unit = (0.5 * views.float() + 0.5).clamp(0.0, 1.0).cpu()
    if output_type == "pt":
        return unit
    arrays = unit.permute(0, 2, 3, 1).numpy()
    return arrays if output_type == "np" else [Image.fromarray(array) for array in to_bytes(arrays)]


def to_bytes(pixels: Float[np.ndarray, "*shape"], truncate: bool = False) -> np.ndarray:
    """Bytes of values in [0, 1], rounded; ``truncate`` cuts the fraction off, as the released script does."""
    return (pixels * 255.0 + (0.0 if truncate else 0.5)).astype(np.uint8)


def check_output_type(output_type: str) -> None:
    """Raise InputError unless the output type is known."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type '{output_type}' is unknown; use one of {', '.join(OUTPUT_TYPES)}")


def native_image_size(config: NVSModelConfig) -> int | None:
    """Side of the only images that a model knows, in pixels; None where any multiple of 64 or so works."""
    return None if config.image_preprocessing == "clip" else config.image_size


def check_image_size(size: int, config: NVSModelConfig, option: str = "image_size") -> None:
    """Raise InputError, naming ``option``, unless a model makes views of ``size`` pixels."""
    if native_image_size(config) not in (None, size):
        raise InputError(f"{option} is {size}; the {config.name} model makes views of {config.image_size} pixels alone")
    # Every level of the autoencoder and of the UNet but the first halves the sides.
    stride = 2 ** (len(config.vae["block_out_channels"]) + len(config.unet["block_out_channels"]) - 2)
    if size < stride or size % stride:
        raise InputError(f"{option} is {size}; use a multiple of {stride}")


def _channels_first(image: Any) -> Float[Tensor, "C H W"]:
    if isinstance(image, Image.Image):
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        image = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    if isinstance(image, np.ndarray):
        scale = 255.0 if image.dtype == np.uint8 else 1.0
        image = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).movedim(-1, 0) / scale
    if not isinstance(image, Tensor):
        raise InputError(f"image: is a {type(image).__name__}; give a PIL image, an array or a tensor")
    pixels = image.detach().float()
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] not in (3, 4):
        raise InputError(f"image: has shape {tuple(image.shape)}; give one image of 3 or 4 channels")
    if not bool(torch.isfinite(pixels).all()):
        raise InputError("image: holds NaN or infinite values; give values in [0, 1]")
    return pixels
