"""From a density field to a closed surface: sample, cut, keep what is solid, march the cubes."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import mcubes
import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh.threshold import automatic_threshold
from threedrec.mesh.types import Mesh

logger = logging.getLogger(__name__)

DensityFunction = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 1"]]

_COARSE = 64
_MARGIN = 2
"""Coarse voxels around the solid in which the fine grid looks for its surface."""
_MAX_CROSSINGS = 1_000_000
"""Vertices that the marching cubes may make; noise would make tens of millions."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of sample points: ``lower + (index + 0.5)·spacing``."""

    lower: Float[np.ndarray, "3"]
    spacing: float
    shape: tuple[int, int, int]

    @classmethod
    def covering(cls, lower: Float[np.ndarray, "3"], upper: Float[np.ndarray, "3"], resolution: int) -> "Grid":
        """Cubic voxels over a box, ``resolution`` of them along its longest side."""
        spacing = float((upper - lower).max()) / resolution
        x, y, z = (max(math.ceil(side / spacing - 1e-6), 1) for side in upper - lower)
        return cls(lower, spacing, (x, y, z))

    def points(self, index: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        """World positions of (fractional) grid indices."""
        return self.lower + (index + 0.5) * self.spacing

    def distances(self) -> Float[np.ndarray, "X Y Z"]:
        """Distance of every point from the origin, world units."""
        axes = zip(self.lower, self.shape, strict=True)
        squares = [np.square(low + (np.arange(n, dtype=np.float32) + 0.5) * self.spacing) for low, n in axes]
        x, y, z = np.ix_(*squares)
        # The first sum is small; one pass over the whole grid is left, and its root.
        total = x + y + z
        return np.sqrt(total, out=total)


@dataclass(frozen=True)
class Isosurface:
    """A surface and how it was cut."""

    mesh: Mesh
    threshold: float
    rough: bool
    """Whether the field had to be made coarser, since its surface is mostly noise."""


@torch.no_grad()
def extract_isosurface(
    density_fn: DensityFunction,
    resolution: int,
    threshold: float | None = None,
    radius: float = 1.0,
    smoothing: float = 1.5,
    keep_components: float = 0.05,
    device: torch.device | str = "cpu",
    chunk: int = 262_144,
) -> Isosurface:
    """Closed surface of the field inside the sphere of ``radius`` about the origin.

    A coarse grid finds where the solid is; the fine grid of ``resolution`` voxels covers the box around it, and the
    field is asked only near it (:data:`_MARGIN`). Solid parts smaller than ``keep_components`` of the largest are
    dropped and hidden cavities are filled. What reaches the sphere is cut off there, and closed.

    Args:
        density_fn: (N, 3) world points to (N, 1) densities.
        resolution: voxels along the longest side of the object's box.
        threshold: density of the surface; None chooses it (:mod:`threedrec.mesh.threshold`).
        radius: of the sphere, world units.
        smoothing: standard deviation, in voxels, of the Gaussian that smooths the cut field. The cut is bounded on both
            sides, so a density of any steepness gives a surface without terraces, and a hash grid's noise goes.
        keep_components: fraction of the largest part's voxels.
        device: where the points for ``density_fn`` are made.
        chunk: points per call.

    Raises:
        InputError: the field is empty, or not finite.
    """
    box = np.full(3, radius)
    coarse = Grid.covering(-box, box, _COARSE)
    from_origin = coarse.distances()
    density = np.where(from_origin < radius, sample_density(density_fn, coarse, device, chunk), 0.0)
    cut = automatic_threshold(density, coarse.spacing) if threshold is None else threshold
    near = _near_solid(density > cut, keep_components)
    grid = Grid.covering(*_bounds(near, coarse), resolution)
    density = sample_density(density_fn, grid, device, chunk, near[np.ix_(*_voxels_of(coarse, grid))])
    # Most objects stay away from the sphere, which then cuts nothing off: nothing is solid where nothing was asked for.
    reach = from_origin[near].max() + math.sqrt(3.0) * coarse.spacing
    distances = grid.distances() if reach > radius - grid.spacing else None
    if threshold is None:
        inside = density if distances is None else np.where(distances < radius, density, 0.0)
        cut = automatic_threshold(inside, grid.spacing)

    field = _level((density - cut) / max(abs(cut), 1e-12))
    if distances is not None:
        field = np.minimum(field, _level((radius - distances) / grid.spacing))
    if not (field > 0).any():
        raise _empty(f"its largest density, {density.max():.4g}, does not pass the threshold {cut:.4g}")
    if smoothing > 0:
        field = smoothed(field, smoothing, torch.device(device))
    field, factor = _limit_crossings(field)
    field = keep_solid(np.pad(field, 1, constant_values=-1.0), keep_components)
    if not (field > 0).any():
        raise _empty(f"what passes the threshold {cut:.4g} is thinner than a voxel")
    index, faces = mcubes.marching_cubes(field.astype(np.float64), 0.0)
    faces = faces.astype(np.int64)
    vertices = grid.points((index - 1.0 + 0.5) * factor - 0.5)  # the padding shifted the indices by one
    mesh = Mesh(vertices, faces)
    return Isosurface(mesh if mesh.volume > 0 else Mesh(vertices, faces[:, ::-1].copy()), cut, factor > 1)


def _empty(reason: str) -> InputError:
    return InputError(
        f"the field is empty: {reason}, so there is no mesh to export; train it longer, or lower "
        "system.exporter.isosurface_threshold"
    )


def sample_density(
    density_fn: DensityFunction,
    grid: Grid,
    device: torch.device | str = "cpu",
    chunk: int = 262_144,
    where: Bool[np.ndarray, "X Y Z"] | None = None,
) -> Float[np.ndarray, "X Y Z"]:
    """Density at the points of the grid (those of ``where``; 0 elsewhere), asked for ``chunk`` points at a time.

    Raises:
        InputError: a density is NaN or infinite.
    """
    _, ny, nz = grid.shape
    total = math.prod(grid.shape)
    if where is None:
        wanted = torch.arange(total, device=device)
    else:
        wanted = torch.from_numpy(np.ascontiguousarray(where)).to(device).view(-1).nonzero()[:, 0]
    density = torch.zeros(total, device=device)
    lower = torch.tensor(grid.lower, dtype=torch.float32, device=device)
    for part in wanted.split(chunk):
        index = torch.stack([part // (ny * nz), part // nz % ny, part % nz], dim=-1)
        density[part] = density_fn(lower + (index + 0.5) * grid.spacing).reshape(-1).float()
    if not bool(density.isfinite().all()):
        raise InputError("the field's density is not finite; the training has diverged, lower its learning rate")
    return density.view(grid.shape).cpu().numpy()


def smoothed(field: Float[np.ndarray, "X Y Z"], sigma: float, device: torch.device) -> Float[np.ndarray, "X Y Z"]:
    """Return the field under a Gaussian of ``sigma`` voxels, cut off at three times that; border values go on."""
    if device.type == "cpu":
        return ndimage.gaussian_filter(field, sigma, mode="nearest", truncate=3.0)
    return smoothed_on(field, sigma, device)


def smoothed_on(field: Float[np.ndarray, "X Y Z"], sigma: float, device: torch.device) -> Float[np.ndarray, "X Y Z"]:
    """`smoothed` by PyTorch, the same to rounding."""
    reach = int(3.0 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    values = torch.from_numpy(field).to(device)
    for axis, side in enumerate(field.shape):
        inside = torch.arange(-reach, side + reach, device=device).clamp(0, side - 1)
        padded = values.double().index_select(axis, inside)
        total = torch.zeros_like(values, dtype=torch.float64)
        for offset, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(padded.narrow(axis, offset, side), alpha=weight)
        values = total.float()
    return values.cpu().numpy()


def keep_solid(field: Float[np.ndarray, "X Y Z"], keep_components: float) -> Float[np.ndarray, "X Y Z"]:
    """Drop small solid parts (``field`` > 0) and fill cavities that do not reach the border, which must be empty.

    Args:
        keep_components: parts with fewer voxels than this fraction of the largest part's are dropped.
    """
    solid = field > 0
    labels, count = ndimage.label(solid)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        keep = sizes >= max(keep_components * sizes.max(), 1.0)
        field = np.where(solid & ~keep[labels], -np.abs(field), field)
    labels, count = ndimage.label(field <= 0)
    if count == 1:
        return field
    return np.where((labels > 0) & (labels != labels[0, 0, 0]), np.abs(field) + 1e-3, field)


def _level(values: np.ndarray) -> np.ndarray:
    """Positive inside; bounded, so that an enormous density does not pull the interpolated surface onto a voxel."""
    level: np.ndarray = np.clip(values, -1.0, 1.0, out=values)
    # Exactly zero would put a vertex on a grid point, shared by up to six coincident ones.
    level[np.abs(level) < 1e-6] = 1e-6
    return level.astype(np.float32, copy=False)


def _near_solid(solid: np.ndarray, keep_components: float) -> np.ndarray:
    """Voxels within the margin of the solid's larger parts; all where the grid sees nothing."""
    if not solid.any():
        return np.ones_like(solid)
    kept = keep_solid(np.pad(np.where(solid, 1.0, -1.0), 1, constant_values=-1.0), keep_components)[1:-1, 1:-1, 1:-1]
    return ndimage.binary_dilation(kept > 0, np.ones((3, 3, 3)), iterations=_MARGIN)


def _bounds(voxels: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the box around the voxels."""
    where = np.argwhere(voxels)
    return grid.lower + where.min(axis=0) * grid.spacing, grid.lower + (where.max(axis=0) + 1) * grid.spacing


def _voxels_of(coarse: Grid, fine: Grid) -> list[np.ndarray]:
    """For every axis, the index of the coarse voxel in which each of the fine grid's points lies."""
    points = [fine.lower[axis] + (np.arange(fine.shape[axis]) + 0.5) * fine.spacing for axis in range(3)]
    return [
        np.clip(np.floor((points[axis] - coarse.lower[axis]) / coarse.spacing), 0, coarse.shape[axis] - 1).astype(int)
        for axis in range(3)
    ]


def _limit_crossings(field: np.ndarray) -> tuple[np.ndarray, int]:
    """Halve the grid until its surface has a size that can be handled; returns the voxels merged along an axis."""
    factor = 1
    while sum(np.count_nonzero(np.diff(field > 0, axis=axis)) for axis in range(3)) > _MAX_CROSSINGS:
        even = np.pad(field, [(0, side % 2) for side in field.shape], constant_values=-1.0)
        x, y, z = (side // 2 for side in even.shape)
        field = even.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5)) - 1e-6  # never exactly on the surface
        factor *= 2
    if factor > 1:
        logger.warning("The field's surface is too rough to be meshed in full; its grid is made %d× coarser.", factor)
    return field, factor
