"""How alike two images or two masks are."""

import torch
from jaxtyping import Float
from torch import Tensor


def psnr(image: Float[Tensor, "*B H W C"], target: Float[Tensor, "*B H W C"]) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all pixels together; infinite for equal images."""
    _check_shapes(image, target)
    return -10.0 * torch.log10((image - target).square().mean())


def ssim(image: Float[Tensor, "*B H W C"], target: Float[Tensor, "*B H W C"]) -> Float[Tensor, ""]:
    """Mean structural similarity of images in [0, 1] (Wang et al. 2004, eq. 13), 11×11 Gaussian window of σ = 1.5.

    Raises:
        ValueError: shapes differ, or a side is shorter than the window.
    """
    # Imported here: torchmetrics takes seconds to import, which commands that need no SSIM should not pay.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_shapes(image, target)
    if min(image.shape[-3:-1]) < 11:
        raise ValueError(f"ssim needs images of at least 11×11 pixels, got {tuple(image.shape)}")
    first, second = (x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).float() for x in (image, target))
    value = structural_similarity_index_measure(first, second, data_range=1.0)
    return value if isinstance(value, Tensor) else value[0]


def mask_iou(
    mask: Float[Tensor, "*B H W 1"], target: Float[Tensor, "*B H W 1"], threshold: float = 0.5
) -> Float[Tensor, ""]:
    """Intersection over union of two masks cut at ``threshold``, over all pixels together; 1 for two empty masks."""
    _check_shapes(mask, target)
    first, second = mask > threshold, target > threshold
    union = (first | second).sum()
    return torch.where(union > 0, (first & second).sum() / union.clamp(min=1), 1.0)


def _check_shapes(image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape:
        raise ValueError(f"shapes of image and target must agree, got {tuple(image.shape)} and {tuple(target.shape)}")
