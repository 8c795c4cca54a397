"""Augmentations of view batches: every view of an object is changed alike, so that it stays one object.

Colours change by 3x3 matrices on display RGB. Rotations about the grey axis turn hues, and tints ``t y^T`` (with
luminance weights ``y``) give colour to grey things, which a rotation leaves grey. Parts are told apart by colour alone,
so they stay the same part in every view.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.training.views import ViewBatch

LUMINANCE = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


@dataclass(frozen=True)
class AugmentConfig:
    """How often and how strongly views are changed; probabilities are per object."""

    mirror: float = 0.5
    recolour: float = 0.85  # otherwise the colours stay
    parts: float = 0.5  # of the recoloured objects: each part its own change
    part_count: int = 3
    hue: float = 180.0  # degrees, uniform in [-hue, hue]
    tint: float = 0.5  # of the colour changes: tint instead of a hue rotation alone
    permute: float = 0.25
    saturation: tuple[float, float] = (0.5, 1.4)
    brightness: tuple[float, float] = (0.65, 1.15)
    contrast: tuple[float, float] = (0.8, 1.15)
    gamma: tuple[float, float] = (0.55, 1.3)  # below one lightens: many meshes are nearly black


def augment(batch: ViewBatch, generator: torch.Generator, config: AugmentConfig | None = None) -> ViewBatch:
    """Mirror and recolour a batch, on its device.

    Args:
        batch: views of B objects.
        generator: on the batch's device.
        config: probabilities and ranges.
    """
    config = config or AugmentConfig()
    return recolour(mirror(batch, generator, config.mirror), generator, config)


def mirror(batch: ViewBatch, generator: torch.Generator, probability: float = 0.5) -> ViewBatch:
    """Replace objects by their mirror image in the plane y = 0: images flip, azimuths change sign."""
    flip = torch.rand(len(batch.azimuth), generator=generator, device=batch.azimuth.device) < probability
    rgba = torch.where(flip[:, None, None, None, None], batch.rgba.flip(3), batch.rgba)
    return replace(batch, rgba=rgba, azimuth=torch.where(flip[:, None], -batch.azimuth, batch.azimuth))


def recolour(batch: ViewBatch, generator: torch.Generator, config: AugmentConfig) -> ViewBatch:
    """Change the colours of objects, whole or part by part; alpha stays."""
    count, device = len(batch.azimuth), batch.azimuth.device
    rgb = batch.rgba[..., :3]
    parts = config.part_count
    matrices = colour_matrices(count * parts, generator, device, config).unflatten(0, (count, parts))
    one = torch.rand((count, 1, 1, 1), generator=generator, device=device) >= config.parts
    matrices = torch.where(one, matrices[:, :1], matrices)
    keep = torch.rand((count, 1, 1, 1), generator=generator, device=device) >= config.recolour
    weights = part_weights(batch.rgba, generator, parts)
    changed = torch.zeros_like(rgb)
    for part in range(parts):
        changed += weights[..., part, None] * torch.einsum("bvhwc,bdc->bvhwd", rgb, matrices[:, part])
    contrast = _uniform((count, 1, 1, 1, 1), config.contrast, generator, device)
    changed = ((changed - 0.5) * contrast + 0.5).clamp(0, 1)
    gamma = _uniform((count, 1, 1, 1, 1), config.gamma, generator, device)
    changed = torch.where(keep[..., None], rgb, changed**gamma)
    return replace(batch, rgba=torch.cat([changed, batch.rgba[..., 3:]], dim=-1))


def colour_matrices(
    count: int, generator: torch.Generator, device: torch.device, config: AugmentConfig
) -> Float[Tensor, "n 3 3"]:
    """Random colour changes as matrices acting on RGB columns: permutation, saturation, hue or tint, brightness."""
    identity = torch.eye(3, device=device)
    luminance = torch.tensor(LUMINANCE, device=device)
    order = torch.rand((count, 3), generator=generator, device=device).argsort(1)
    permuted = torch.rand((count, 1, 1), generator=generator, device=device) < config.permute
    matrix = torch.where(permuted, identity[order], identity)
    saturation = _uniform((count, 1, 1), config.saturation, generator, device)
    matrix = (saturation * identity + (1 - saturation) * luminance.expand(3, 3)) @ matrix
    matrix = hue_rotation(_uniform((count,), (-config.hue, config.hue), generator, device)) @ matrix
    tint = torch.rand((count, 3), generator=generator, device=device)
    tint = tint / tint.amax(1, keepdim=True).clamp_min(1e-3)
    strength = 0.3 + 0.7 * torch.rand((count, 1, 1), generator=generator, device=device)
    tinted = strength * tint[:, :, None] * luminance + (1 - strength) * matrix
    wants_tint = torch.rand((count, 1, 1), generator=generator, device=device) < config.tint
    matrix = torch.where(wants_tint, tinted, matrix)
    return _uniform((count, 1, 1), config.brightness, generator, device) * matrix


def hue_rotation(degrees: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotations of RGB space about the grey axis (Rodrigues' formula); greys stay as they are."""
    angle = torch.deg2rad(degrees)[:, None, None]
    axis = 1 / math.sqrt(3)
    cross = axis * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=degrees.device)
    grey = torch.full((3, 3), 1 / 3, device=degrees.device)
    return angle.cos() * torch.eye(3, device=degrees.device) + angle.sin() * cross + (1 - angle.cos()) * grey


def part_weights(
    rgba: Float[Tensor, "b v h w 4"], generator: torch.Generator, parts: int, sharpness: float = 60.0
) -> Float[Tensor, "b v h w p"]:
    """Soft assignment of pixels to parts by how near their colour lies to that of randomly picked object pixels.

    Chromaticity counts more than luminance, so that a shaded side stays with its lit side.
    """
    count = len(rgba)
    # a coarse grid of the first view gives the anchors
    coarse = rgba[:, 0, ::4, ::4].flatten(1, 2)
    picks = torch.multinomial(coarse[..., 3] + 1e-4, parts, replacement=True, generator=generator)
    anchors = _colour_features(coarse[..., :3].gather(1, picks[..., None].expand(count, parts, 3)))
    features = _colour_features(rgba[..., :3])
    # squared distances up to a pixel's own square, which the softmax does not see
    nearness = 2 * torch.einsum("bvhwf,bpf->bvhwp", features, anchors) - (anchors**2).sum(-1)[:, None, None, None]
    return torch.softmax(sharpness * nearness, dim=-1)


def _colour_features(rgb: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4"]:
    total = rgb.sum(-1, keepdim=True)
    # the offset keeps near-black pixels, whose chromaticity is noise, at the neutral point
    chromaticity = (rgb - total / 3) / (total + 0.2)
    return torch.cat([2 * chromaticity, 0.3 * total], dim=-1)


def _uniform(
    shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator, device: torch.device
) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, device=device)
