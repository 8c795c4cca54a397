"""How alike two images or two masks are."""

import torch
from jaxtyping import Float
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""Wang et al. 2004: (K L)^2 with K of 0.01 and 0.03 and images of the range L = 1."""


def psnr(image: Float[Tensor, "*B H W C"], target: Float[Tensor, "*B H W C"]) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all pixels together; infinite for equal images."""
    _check_shapes(image, target)
    return -10.0 * torch.log10((image - target).square().mean())


def ssim(image: Float[Tensor, "*B H W C"], target: Float[Tensor, "*B H W C"]) -> Float[Tensor, ""]:
    """Mean structural similarity of images in [0, 1] (Wang et al. 2004, eq. 13), 11×11 Gaussian window of σ = 1.5.

    Raises:
        ValueError: shapes differ, or a side is shorter than the window.
    """
    _check_shapes(image, target)
    if min(image.shape[-3:-1]) < _WINDOW:
        raise ValueError(f"ssim needs images of at least {_WINDOW}×{_WINDOW} pixels, got {tuple(image.shape)}")
    x, y = (images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2).double() for images in (image, target))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return (alike / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean().float()


def _blurred(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
    """Gaussian means around every pixel; beyond their borders images are mirrored."""
    reach = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-0.5 * (reach / _SIGMA) ** 2)
    weights = weights / weights.sum()
    planes = torch.nn.functional.pad(images, [_WINDOW // 2] * 4, mode="reflect").flatten(0, 1)[:, None]
    planes = torch.nn.functional.conv2d(planes, weights.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(planes, weights.view(1, 1, -1, 1)).unflatten(0, images.shape[:2])[:, :, 0]


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
