"""What views score that nobody has imagined: the least that a model has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import ViewSet
from nvsadapter_guidance.training.views import ViewBank, composite, load_tar
from nvsadapter_guidance.training.zero123 import VIEWS_PER_OBJECT, camera_angles, stored_folder

COPY, MEAN, NEAREST = "copy-reference", "mean-image", "nearest-training-object"
_MATCH_SIZE = 32  # pixels along a side that reference views are compared at
_LEVEL = 10.0  # degrees of elevation up to which a training view can stand for a reference


def copied_reference(rgb: Float[Tensor, "v 3 h w"]) -> Float[Tensor, "v 3 h w"]:
    """Every view answered with the reference, which is view 0."""
    return rgb[:1].expand_as(rgb)


class MeanImage:
    """Every view answered with the mean of the other evaluated objects seen from the same camera."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, rgb: Float[Tensor, "v 3 h w"]) -> None:
        """Count an object in."""
        self._sum = rgb.double() if self._sum is None else self._sum + rgb
        self._count += 1

    def without(self, rgb: Float[Tensor, "v 3 h w"]) -> Float[Tensor, "v 3 h w"] | None:
        """The mean of all objects but this one, which was counted in; None where there is no other."""
        if self._sum is None or self._count < 2:
            return None
        return ((self._sum - rgb) / (self._count - 1)).float()


@dataclass(frozen=True)
class TrainingViews:
    """Views of training objects, all of them in one row."""

    rgb: UInt8[Tensor, "m 3 h w"]
    """On white."""
    azimuth: Float[Tensor, " m"]
    elevation: Float[Tensor, " m"]
    """Degrees."""
    objects: Int[Tensor, " m"]
    """Index of each view's object."""


def load_training_views(path: Path, size: int) -> TrainingViews:
    """Read training views: a ``.tar`` of scripts/render_training_views.py, or a folder of Zero-1-to-3 renderings.

    Args:
        size: side to which views are resized, in pixels.

    Raises:
        InputError: there is nothing of the kind, or a file is damaged.
    """
    check_training_views(path)
    return _from_folder(path, size) if path.is_dir() else _from_bank(load_tar(path), size)


def check_training_views(path: Path) -> None:
    """Raise where there is nothing to read, before anything else is done.

    Raises:
        InputError: no such file, or a folder without renderings.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a .tar of views or a folder of Zero-1-to-3 renderings")
    if path.is_dir() and not any(path.glob("*/000.png")):
        raise InputError(f"{path}: no folder in it holds a 000.png; make some with: 3drec render MESHES -o DIR")


def _from_bank(bank: ViewBank, size: int) -> TrainingViews:
    count, views = bank.azimuth.shape
    rows = [_resized(composite(rgba.float() / 255.0).permute(0, 3, 1, 2), size) for rgba in bank.rgba]
    objects = torch.arange(count).repeat_interleave(views)
    return TrainingViews(torch.cat(rows), bank.azimuth.flatten(), bank.elevation.flatten(), objects)


def _from_folder(folder: Path, size: int) -> TrainingViews:
    names = sorted(path.parent.name for path in folder.glob("*/000.png"))
    rows, angles = [], []
    for name in names:
        count = min(VIEWS_PER_OBJECT, len(list((folder / name).glob("*.npy"))))
        views = stored_folder(folder / name, name, max(count, 1))
        rgba = np.stack([np.asarray(views.image(index), dtype=np.float32) / 255.0 for index in range(len(views))])
        rows.append(_resized(composite(torch.from_numpy(rgba)).permute(0, 3, 1, 2), size))
        angles.append(camera_angles(np.stack([views.world_to_camera(index) for index in range(len(views))]))[:2])
    objects = torch.cat([torch.full((len(row),), index) for index, row in enumerate(rows)])
    azimuth, elevation = (torch.from_numpy(np.concatenate(values)).float() for values in zip(*angles))
    return TrainingViews(torch.cat(rows), azimuth, elevation, objects)


def _resized(rgb: Float[Tensor, "v 3 h w"], size: int) -> UInt8[Tensor, "v 3 size size"]:
    if rgb.shape[-1] != size:
        rgb = F.interpolate(rgb, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return (rgb.clamp(0.0, 1.0) * 255.0).round().byte()


class NearestTrainingObject:
    """Every view answered with that of the training object that looks most like the reference.

    A level training view whose colours are nearest to the reference's (mean squared error at 32 pixels) takes its
    place; each target is answered with the view of the same object whose direction, counted from that view, is nearest.
    """

    def __init__(self, training: TrainingViews) -> None:
        self._all = training
        level = training.elevation.abs() <= _LEVEL
        # Where no view is level (few views from all around), any can stand for the reference.
        self._candidates = level.nonzero()[:, 0] if bool(level.any()) else torch.arange(len(training.objects))
        self._small = _small(training.rgb[self._candidates])

    def __call__(self, reference: Float[Tensor, "3 h w"], views: ViewSet) -> Float[Tensor, "v 3 h w"]:
        """Views for the cameras of ``views``, in [0, 1]."""
        wanted = _small((reference[None].clamp(0, 1) * 255.0).round().byte())
        best = self._candidates[(self._small - wanted).square().sum(1).argmin()]
        own = (self._all.objects == self._all.objects[best]).nonzero()[:, 0]
        have = _directions(self._all.azimuth[own] - self._all.azimuth[best], self._all.elevation[own])
        want = _directions(torch.tensor(views.azimuth), torch.tensor(views.elevation))
        return self._all.rgb[own[(want @ have.T).argmax(dim=1)]].float() / 255.0


def _small(rgb: UInt8[Tensor, "m 3 h w"]) -> Float[Tensor, "m d"]:
    rows: Sequence[Tensor] = rgb.split(256)
    size = (_MATCH_SIZE, _MATCH_SIZE)
    return torch.cat([F.interpolate(row.float() / 255.0, size, mode="area").flatten(1) for row in rows])


def _directions(azimuth: Float[Tensor, " n"], elevation: Float[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    return torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=1)
