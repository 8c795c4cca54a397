"""What the optimisation asks of rendered views and of the field; pure functions of tensors, definitions as released.

Rendered quantities of R rays (or pixels) are flat, (R, C); only the 2D smoothness needs images. Means run over rays and
channels alike. Weights come from ``LossConfig`` and are applied by the caller.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from threedrec.schedules import Schedule

NON_NEGATIVE = {"ge": 0}


@dataclass
class LossConfig:
    """Weights (``system.loss``); each is a number or a schedule. Defaults are the released recipe's."""

    lambda_sds: Schedule = field(default=0.1, metadata=NON_NEGATIVE)
    lambda_rgb: Schedule = field(default=500.0, metadata=NON_NEGATIVE)
    lambda_mask: Schedule = field(default=50.0, metadata=NON_NEGATIVE)
    lambda_depth: Schedule = field(default=0.0, metadata=NON_NEGATIVE)
    lambda_depth_rel: Schedule = field(default=0.0, metadata=NON_NEGATIVE)
    lambda_normal: Schedule = field(default=0.0, metadata=NON_NEGATIVE)
    lambda_normal_smooth: Schedule = field(default=8.0, metadata=NON_NEGATIVE)
    lambda_3d_normal_smooth: Schedule = field(default=8.0, metadata=NON_NEGATIVE)
    lambda_orient: Schedule = field(default=1.0, metadata=NON_NEGATIVE)
    lambda_sparsity: Schedule = field(default=1.0, metadata=NON_NEGATIVE)
    lambda_opaque: Schedule = field(default=0.1, metadata=NON_NEGATIVE)


def rgb_loss(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of colours in [0, 1], both over the same background."""
    return functional.mse_loss(rgb, target)


def mask_loss(opacity: Float[Tensor, "R 1"], mask: Float[Tensor, "R 1"]) -> Float[Tensor, ""]:
    """Return the mean squared difference between opacity and mask, both in [0, 1]."""
    return functional.mse_loss(opacity, mask)


def depth_loss(
    depth: Float[Tensor, "R 1"], target: Float[Tensor, "R 1"], mask: Bool[Tensor, "R 1"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference to ``target`` after the best scale and shift of the latter.

    The two numbers come from least squares without gradient, so a monocular depth of unknown scale can supervise. An
    empty mask gives 0.
    """
    inside = mask.reshape(-1)
    predicted, wanted = depth[inside], target[inside]
    if len(predicted) == 0:
        return depth.sum() * 0.0
    with torch.no_grad():
        centred = wanted - wanted.mean()
        # Normal equations of the two-parameter fit; a constant target leaves the shift alone.
        scale = (centred * (predicted - predicted.mean())).sum() / centred.square().sum().clamp(min=1e-12)
        aligned = scale * centred + predicted.mean()
    return functional.mse_loss(predicted, aligned)


def depth_rel_loss(
    depth: Float[Tensor, "R 1"], target: Float[Tensor, "R 1"], mask: Bool[Tensor, "R 1"]
) -> Float[Tensor, ""]:
    """Return 1 minus Pearson's correlation of the two depths inside the mask; 0 for fewer than two rays."""
    inside = mask.reshape(-1)
    predicted, wanted = depth[inside, 0], target[inside, 0]
    if len(predicted) < 2:
        return depth.sum() * 0.0
    correlation = functional.cosine_similarity(predicted - predicted.mean(), wanted - wanted.mean(), dim=0)
    return 1.0 - correlation


def normal_loss(
    normal: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], mask: Bool[Tensor, "R 1"]
) -> Float[Tensor, ""]:
    """Return 1 minus the mean cosine between normals in one common frame, inside the mask; an empty mask gives 0."""
    inside = mask.reshape(-1)
    if not inside.any():
        return normal.sum() * 0.0
    return 1.0 - functional.cosine_similarity(normal[inside], target[inside], dim=-1).mean()


def normal_smooth_loss(normal_image: Float[Tensor, "B H W 3"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of neighbouring pixels, down plus across.

    ``normal_image`` holds normals as colours, (n + 1) / 2 times the opacity (``RenderOutput.normal_image``).
    """
    down = normal_image[:, 1:] - normal_image[:, :-1]
    across = normal_image[:, :, 1:] - normal_image[:, :, :-1]
    return down.square().mean() + across.square().mean()


def normal_smooth_3d_loss(normal: Float[Tensor, "N 3"], normal_perturbed: Float[Tensor, "N 3"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference between normals of samples and of their random neighbours."""
    # A batch of rays may see nothing at all; the mean of no samples is 0, not nan.
    return (normal - normal_perturbed).abs().sum() / max(normal.numel(), 1)


def orient_loss(
    weights: Float[Tensor, "N 1"],
    normal: Float[Tensor, "N 3"],
    dirs: Float[Tensor, "N 3"],
    opacity: Float[Tensor, "R 1"],
) -> Float[Tensor, ""]:
    """Return sum w max(0, n . d)^2 over the number of rays that see anything (Ref-NeRF, Verbin et al. 2022, eq. 11).

    It turns normals that are visible away from the viewing direction ``dirs``; ``weights`` get no gradient.
    """
    backwards = (normal * dirs).sum(-1, keepdim=True).clamp(min=0.0)
    return (weights.detach() * backwards.square()).sum() / (opacity > 0).sum().clamp(min=1)


def sparsity_loss(opacity: Float[Tensor, "R 1"]) -> Float[Tensor, ""]:
    """Return the mean of sqrt(opacity^2 + 0.01), which pulls empty rays to zero harder than a square would."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Float[Tensor, "R 1"]) -> Float[Tensor, ""]:
    """Return the mean binary entropy (nats) of the opacity, clamped to [0.001, 0.999]: be solid or be absent."""
    p = opacity.clamp(1e-3, 1.0 - 1e-3)
    return -(p * torch.log(p) + (1.0 - p) * torch.log(1.0 - p)).mean()


def charbonnier(residual: Float[Tensor, "R C"]) -> Float[Tensor, " R"]:
    """Return the mean over channels of sqrt(r^2 + 0.01^2) - 0.01: |r| with a smooth foot (Charbonnier et al. 1994).

    It grows linearly, so that views which disagree cannot outvote those that agree.
    """
    return ((residual.square() + 1e-4).sqrt() - 1e-2).mean(dim=-1)
