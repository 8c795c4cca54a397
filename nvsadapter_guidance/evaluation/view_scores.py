"""Evaluation of imagined views: every object imagined once, then scored beside baselines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.baselines import (
    COPY,
    MEAN,
    NEAREST,
    MeanImage,
    NearestTrainingObject,
    TrainingViews,
    copied_reference,
)
from nvsadapter_guidance.evaluation.image_metrics import Lpips, image_psnr, image_ssim, mask_iou, silhouette
from nvsadapter_guidance.evaluation.imagine import Imagine
from nvsadapter_guidance.evaluation.object_folder import EvaluatedObject, read_object, write_object
from nvsadapter_guidance.evaluation.truth import TruthRenderer, target_views
from nvsadapter_guidance.training.mesh_dataset import ViewSet

Scores = dict[str, Tensor]
"""Scores of views by name, one each."""


@dataclass
class Evaluation:
    """Which objects are imagined, and which could not be."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Of `object_folder`, by name."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Name and reason."""


def imagine_objects(
    meshes: Mapping[str, Path], render: TruthRenderer, imagine: Imagine, output: Path, result: Evaluation
) -> Iterator[str]:
    """Render and imagine objects that ``output`` does not hold yet, and enter all of them into ``result``.

    Meshes that cannot be read are entered as skipped.

    Yields:
        every name, when its object is done.
    """
    for name, path in meshes.items():
        folder = output / name
        if not folder.exists():
            try:
                truth = render(name, path)
            except InputError as error:
                result.skipped.append({"name": name, "reason": str(error)})
                yield name
                continue
            write_object(folder, truth, imagine(name, truth.rgb, render.views))
        result.folders[name] = folder
        yield name


def score_views(
    predicted: Float[Tensor, "v 3 h w"],
    truth: Float[Tensor, "v 3 h w"],
    mask: Bool[Tensor, "v h w"],
    lpips: Lpips | None = None,
) -> Scores:
    """PSNR (dB), SSIM, silhouette IoU and, with a backbone, LPIPS of each view."""
    scores = {
        "psnr": image_psnr(predicted, truth),
        "ssim": image_ssim(predicted, truth),
        "mask_iou": mask_iou(silhouette(predicted), mask),
    }
    return scores if lpips is None else {**scores, "lpips": lpips(predicted, truth)}


def score_objects(
    folders: Mapping[str, Path],
    views: ViewSet,
    lpips: Lpips | None = None,
    training: TrainingViews | None = None,
    on_object: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score imagined objects and baselines over all views but those at the reference's azimuth.

    Args:
        folders: of `object_folder`, by name.
        training: adds the baseline that is made of them.
        on_object: called after every object.

    Returns:
        ``mean``: of all objects, each of which is the mean of its views; ``baselines``: the same of views that nobody
        imagined, by name, ``None`` where there is no such baseline; ``objects``: a row of each with its views.

    Raises:
        InputError: no object, or a file of one cannot be read.
    """
    if not folders:
        raise InputError("evaluation: not one object could be imagined")
    targets = target_views(views)
    mean_image, nearest = MeanImage(), None if training is None else NearestTrainingObject(training)
    for folder in folders.values():
        mean_image.add(read_object(folder).truth.rgb)
    rows = []
    for name, folder in folders.items():
        found = read_object(folder)
        truth = found.truth.rgb
        rivals: dict[str, Tensor | None] = {COPY: copied_reference(truth), MEAN: mean_image.without(truth)}
        if nearest is not None:
            rivals[NEAREST] = nearest(truth[0], views)
        rows.append(_row(name, found, rivals, views, targets, lpips))
        if on_object is not None:
            on_object()
    names = rows[0]["baselines"]
    return {
        "mean": _mean_of(rows),
        "baselines": {name: _mean_of([row["baselines"][name] for row in rows]) for name in names},
        "objects": rows,
    }


def _row(
    name: str,
    found: EvaluatedObject,
    rivals: Mapping[str, Tensor | None],
    views: ViewSet,
    targets: Bool[Tensor, " v"],
    lpips: Lpips | None,
) -> dict[str, Any]:
    """Scores of one object: means over its targets, those of baselines, and every target alone."""
    truth, mask = found.truth.rgb[targets], found.truth.mask[targets]
    scores = score_views(found.predicted[targets], truth, mask, lpips)
    if found.one_step_psnr is not None:
        scores["one_step_psnr"] = torch.tensor(found.one_step_psnr)[targets]
    baselines = {
        rival: None if rgb is None else _mean(score_views(rgb[targets], truth, mask, lpips))
        for rival, rgb in rivals.items()
    }
    angles = [(a, e) for a, e, used in zip(views.azimuth, views.elevation, targets.tolist()) if used]
    each = [
        {"azimuth": a, "elevation": e, **{key: round(float(values[i]), 5) for key, values in scores.items()}}
        for i, (a, e) in enumerate(angles)
    ]
    return {"name": name, **_mean(scores), "baselines": baselines, "views": each}


def _mean(scores: Scores) -> dict[str, float]:
    return {key: round(float(values.double().mean()), 5) for key, values in scores.items()}


def _mean_of(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None]:
    """Means of the numbers that all rows have; of baselines that some object lacks, nothing."""
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return {"psnr": None, "ssim": None, "mask_iou": None}
    keys = [key for key, value in known[0].items() if isinstance(value, float)]
    return {key: round(sum(row[key] for row in known) / len(known), 5) for key in keys}
