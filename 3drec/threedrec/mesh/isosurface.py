"""From density samples to a closed surface: cut, smooth, keep what is solid, march the cubes. Without PyTorch."""

import logging
import math
from dataclasses import dataclass

import mcubes
import numpy as np
from jaxtyping import Float
from scipy import ndimage

from threedrec.errors import InputError
from threedrec.mesh.threshold import automatic_threshold
from threedrec.mesh.types import Mesh

logger = logging.getLogger(__name__)

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
class Samples:
    """A field's density around its solid."""

    grid: Grid
    density: Float[np.ndarray, "X Y Z"]
    """0 where it was not asked for, far from the solid."""
    radius: float
    """Of the sphere about the origin that cuts the field off, world units."""
    reaches_sphere: bool
    """Whether anything comes near that sphere; most objects stay away from it."""


@dataclass(frozen=True)
class Isosurface:
    """A surface and how it was cut."""

    mesh: Mesh
    threshold: float
    rough: bool
    """Whether the field had to be made coarser, since its surface is mostly noise."""


def surface_of(
    samples: Samples, threshold: float | None = None, smoothing: float = 1.5, keep_components: float = 0.05
) -> Isosurface:
    """Closed surface of a sampled field; see :func:`threedrec.mesh.sampling.extract_isosurface`.

    Raises:
        InputError: nothing of the field is above the threshold.
    """
    grid, density = samples.grid, samples.density
    distances = grid.distances() if samples.reaches_sphere else None
    cut = threshold
    if cut is None:
        inside = density if distances is None else np.where(distances < samples.radius, density, 0.0)
        cut = automatic_threshold(inside, grid.spacing)
    field = _level((density - cut) / max(abs(cut), 1e-12))
    if distances is not None:
        field = np.minimum(field, _level((samples.radius - distances) / grid.spacing))
    if not (field > 0).any():
        raise _empty(f"its largest density, {density.max():.4g}, does not pass the threshold {cut:.4g}")
    if smoothing > 0:
        field = ndimage.gaussian_filter(field, smoothing, mode="nearest", truncate=3.0)
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


def keep_solid(field: Float[np.ndarray, "X Y Z"], keep_components: float) -> Float[np.ndarray, "X Y Z"]:
    """Drop small solid parts (``field`` > 0) and fill cavities that do not reach the border, which must be empty.

    Args:
        keep_components: parts with fewer voxels than this fraction of the largest part's are dropped.
    """
    labels, count = ndimage.label(field > 0)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        small = sizes < max(keep_components * sizes.max(), 1.0)
        small[0] = False
        field = np.where(small[labels], -np.abs(field), field)
    labels, count = ndimage.label(field <= 0)
    if count == 1:
        return field
    hidden = np.arange(count + 1) != labels[0, 0, 0]
    hidden[0] = False
    return np.where(hidden[labels], np.abs(field) + 1e-3, field)


def _level(values: np.ndarray) -> np.ndarray:
    """Positive inside; bounded, so that an enormous density does not pull the interpolated surface onto a voxel."""
    level: np.ndarray = np.clip(values, -1.0, 1.0, out=values)
    # Exactly zero would put a vertex on a grid point, shared by up to six coincident ones.
    level[np.abs(level) < 1e-6] = 1e-6
    return level.astype(np.float32, copy=False)


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
