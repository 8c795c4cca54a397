"""How well a model imagines views of objects it has never seen."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.evaluation.image_metrics import silhouette
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, predict_clean, prepare
from nvsadapter_guidance.sampling import sample
from nvsadapter_guidance.training.views import ViewBank, composite


@dataclass
class ViewScores:
    """Means over objects and views; PSNR in dB, IoU and accuracy in [0, 1]."""

    psnr: float
    mask_iou: float
    psnr_elevation_0: float
    psnr_elevation_30: float
    copy_psnr: float
    """The same PSNR when every view is answered with a copy of the reference."""
    one_step_psnr: float
    """PSNR of one-step denoising at half of the noise schedule."""
    turns_right: float
    """Share of objects whose view from azimuth 90 is nearer to the truth at 90 than at 270, among those that differ."""


def psnr(prediction: Float[Tensor, "B 3 H W"], target: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in [0, 1], dB."""
    return -10.0 * (prediction - target).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


@torch.no_grad()
def imagine(
    model: NVSModel, rgb: Float[Tensor, "V 3 H W"], poses: Poses, steps: int, guidance_scale: float, seed: int
) -> tuple[Float[Tensor, "V 3 H W"], Float[Tensor, "V 3 H W"]]:
    """Sample all views of one object from its first, and denoise them once; both in [0, 1]."""
    generator = torch.Generator(model.device).manual_seed(seed)
    conditions = prepare(model, rgb[:1] * 2.0 - 1.0, poses[:1], generator)
    sampled = sample(model, conditions, poses, generator, steps, guidance_scale)
    once = predict_clean(model, conditions, rgb * 2.0 - 1.0, poses, 0.5, generator, guidance_scale)
    return (sampled + 1.0) / 2.0, (once + 1.0) / 2.0


def validate_views(
    model: NVSModel, bank: ViewBank, steps: int = 20, guidance_scale: float = 1.0, seed: int = 0
) -> tuple[ViewScores, Float[Tensor, "N V 3 H W"]]:
    """Score a bank of validation views whose first view (azimuth 0, elevation 0) is the reference.

    Targets are all views but those at azimuth 0. Returns the scores and every sampled view in [0, 1].
    """
    rows: dict[str, list[Tensor]] = {k: [] for k in ("psnr", "iou", "low", "high", "copy", "once", "right")}
    pictures = []
    for index in range(len(bank)):
        truth = composite(bank.rgba[index].float() / 255).permute(0, 3, 1, 2)
        mask = bank.rgba[index, ..., 3] > 127
        poses = Poses(bank.azimuth[index], bank.elevation[index], bank.distance[index])
        views, once = imagine(model, truth, poses, steps, guidance_scale, seed + index)
        pictures.append(views)
        targets = (poses.azimuth % 360).abs() > 1.0
        score = psnr(views, truth)
        rows["psnr"].append(score[targets])
        rows["low"].append(score[targets & (poses.elevation < 15)])
        rows["high"].append(score[targets & (poses.elevation >= 15)])
        rows["copy"].append(psnr(truth[:1].expand_as(truth), truth)[targets])
        rows["once"].append(psnr(once, truth)[targets])
        predicted = silhouette(views)
        union = (predicted | mask).sum(dim=(1, 2)).clamp_min(1)
        rows["iou"].append(((predicted & mask).sum(dim=(1, 2)) / union)[targets])
        rows["right"].append(_turns_right(views, truth, poses))
    mean = {key: float(torch.cat(values).float().mean()) for key, values in rows.items()}
    scores = ViewScores(mean["psnr"], mean["iou"], mean["low"], mean["high"], mean["copy"], mean["once"], mean["right"])
    return scores, torch.stack(pictures)


def _turns_right(views: Tensor, truth: Tensor, poses: Poses) -> Float[Tensor, " n"]:
    """Whether azimuth 90 at elevation 0 came out as itself and not as 270; empty where both look alike."""
    level = poses.elevation.abs() < 1.0
    left, right = (int(((poses.azimuth - a).abs() < 1.0).logical_and(level).nonzero()[0]) for a in (90.0, 270.0))
    pair = torch.tensor([left, right], device=views.device)
    if psnr(truth[pair][:1], truth[pair][1:])[0] > 22.0:
        return torch.zeros(0, device=views.device)
    same = psnr(views[pair], truth[pair]).sum()
    swapped = psnr(views[pair], truth[pair.flip(0)]).sum()
    return (same > swapped).float()[None]
