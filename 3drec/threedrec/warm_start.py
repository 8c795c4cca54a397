"""The warm start: which views a guidance is asked to imagine around the object, and their silhouettes."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from threedrec.cameras import Cameras, orbit_cameras
from threedrec.config_schema import limited
from threedrec.errors import InputError

SILHOUETTE_RANGE = (0.04, 0.14)
"""Distance from white (largest over the channels) at which a pixel begins to be, and is, part of the object. An
autoencoder leaves noise of about 0.02 in a white background."""


@dataclass
class WarmStartConfig:
    """Sample views around the object and fit the field to them before score distillation begins."""

    enabled: bool = True
    """Whether to do it; needs a guidance that can sample views."""
    num_views: int = limited(24, ge=1)
    """Views to sample, the reference not counted."""
    elevations: list[float] = field(default_factory=lambda: [0.0, 30.0])
    """Degrees; one ring of views each. Higher rings are shorter and get fewer views."""
    num_inference_steps: int = limited(20, ge=1)
    """Denoising steps."""
    guidance_scale: float = limited(2.0, ge=0)
    """Classifier-free guidance of the samples."""
    fit_steps: int = limited(400, ge=0)
    """Optimisation steps of the fit. They are the first of `trainer.max_steps`; what is left of those is distillation,
    whose schedules and milestones count from its own beginning."""
    rays_per_step: int = limited(2048, ge=2)
    """Rays a step, over the views and the reference."""
    reference_share: float = limited(0.25, ge=0, le=1)
    """Share of the rays that belong to the reference."""
    foreground_share: float = limited(0.7, ge=0, le=1)
    """Share of a view's rays drawn from around its silhouette, the rest from the whole frame."""
    lr: float = limited(0.03, gt=0)
    """Learning rate at the first step; falls to a tenth by a cosine."""
    lambda_rgb: float = limited(1.0, ge=0)
    """Weight of the colour of sampled views."""
    lambda_mask: float = limited(0.5, ge=0)
    """Weight of their silhouettes."""
    lambda_reference: float = limited(2.0, ge=0)
    """Weight of the reference's colour and mask beside theirs."""
    lambda_opaque: float = limited(0.02, ge=0)
    """Weight of the entropy of the opacity, from the middle of the fit on."""
    lambda_normal_smooth: float = limited(0.1, ge=0)
    """Weight of the change of normals between neighbouring points of the surface."""
    tolerance: float = limited(2.0, gt=0)
    """Residual at which a part counts a quarter, in units of the median residual."""
    back_weight: float = limited(0.4, ge=0, le=1)
    """Weight of the view from behind; the view from the front counts 1."""
    keep_weight: float = limited(0.0, ge=0)
    """Weight of the fit's losses during the distillation that follows, beside `lambda_rgb` = 500 and the like there;
    0 lets the views go."""


@dataclass
class ViewSet:
    """Sampled views, and how they are seen."""

    rgb: Float[Tensor, "V H W 3"]
    mask: Float[Tensor, "V H W 1"]
    cameras: Cameras
    prior: Float[Tensor, " V"]
    """Weight of each view before anything is known about its agreement with the others."""

    def to(self, device: str | torch.device) -> "ViewSet":
        """Return the same views on ``device``."""
        return ViewSet(self.rgb.to(device), self.mask.to(device), self.cameras.to(device), self.prior.to(device))


def view_ring(config: WarmStartConfig, support: Cameras, size: int) -> Cameras:
    """Cameras of the views to sample, ring by ring and around each ring, at the reference's distance and fov.

    Rings get views in proportion to their circumference, at least one each. A ring at the reference's height leaves out
    the place of the reference itself.

    Raises:
        InputError: fewer views than rings, or no ring.
    """
    elevations = list(config.elevations)
    if not elevations or config.num_views < len(elevations):
        raise InputError(
            f"system.guidance.warm_start.num_views: {config.num_views} views cannot fill {len(elevations)} rings of "
            "`elevations`; name at least one elevation and give each at least one view"
        )
    reference_elevation, reference_azimuth = float(support.elevation[0]), float(support.azimuth[0])
    all_elevations: list[float] = []
    all_azimuths: list[float] = []
    for elevation, count in zip(elevations, _shares(config.num_views, elevations), strict=True):
        level = abs(elevation - reference_elevation) < 5.0
        places = (np.arange(1, count + 1) / (count + 1)) if level else (np.arange(count) / count)
        all_azimuths += [reference_azimuth + 360.0 * float(place) for place in places]
        all_elevations += [float(elevation)] * count
    distance, fovy = float(support.distance[0]), float(support.fovy[0])
    return orbit_cameras(all_elevations, all_azimuths, distance, fovy, size, size)


def _shares(total: int, elevations: list[float]) -> list[int]:
    """Split ``total`` in proportion to the cosines of ``elevations``, at least 1 each (largest remainders first)."""
    cosines = np.maximum(np.cos(np.radians(elevations)), 1e-3)
    spare = (total - len(elevations)) * cosines / cosines.sum()
    counts = 1 + np.floor(spare).astype(int)
    for index in np.argsort(-(spare % 1), kind="stable")[: total - int(counts.sum())]:
        counts[index] += 1
    return [int(count) for count in counts]


def silhouettes(rgb: Float[Tensor, "V H W 3"]) -> Float[Tensor, "V H W 1"]:
    """Soft masks of objects seen on white: distance from white, holes filled, specks removed.

    A hole is a white region that the object encloses; it is taken for a white part of the object. A speck is a region
    of less than a twentieth of the largest one.
    """
    low, high = SILHOUETTE_RANGE
    soft = ((1.0 - rgb).amax(dim=-1, keepdim=True) - low).div(high - low).clamp(0.0, 1.0)
    masks = []
    for view in soft[..., 0].cpu().numpy():
        solid = ndimage.binary_fill_holes(view > 0.5)
        labels, count = ndimage.label(solid)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        areas[0] = 0
        kept = (areas >= 0.05 * areas.max()) & (areas > 0)
        near = ndimage.binary_dilation(kept[labels], iterations=2)
        masks.append(np.where(kept[labels] & ~(view > 0.5), 1.0, view * near))
    return torch.as_tensor(np.stack(masks), dtype=rgb.dtype, device=rgb.device)[..., None]


def build_view_set(rgb: Float[Tensor, "V H W 3"], cameras: Cameras, support: Cameras, back_weight: float) -> ViewSet:
    """Views with their silhouettes and their prior weights: 1 beside the reference, ``back_weight`` behind it."""
    front = torch.nn.functional.normalize(support.positions, dim=-1)
    cosine = torch.nn.functional.normalize(cameras.positions, dim=-1).to(front) @ front[0]
    prior = back_weight + (1.0 - back_weight) * 0.5 * (1.0 + cosine)
    return ViewSet(rgb, silhouettes(rgb), cameras, prior.to(rgb))
