"""A density field on a grid: where it is solid, and its samples around that."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh.isosurface import Grid, Isosurface, Samples, keep_solid, surface_of
from threedrec.mesh.threshold import automatic_threshold

DensityFunction = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 1"]]

_COARSE = 64
_MARGIN = 2
"""Coarse voxels around the solid in which the fine grid looks for its surface."""


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

    Solid parts smaller than ``keep_components`` of the largest are dropped and hidden cavities are filled. What reaches
    the sphere is cut off there, and closed.

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
    samples = sample_solid(density_fn, resolution, threshold, radius, keep_components, device, chunk)
    return surface_of(samples, threshold, smoothing, keep_components)


@torch.no_grad()
def sample_solid(
    density_fn: DensityFunction,
    resolution: int,
    threshold: float | None = None,
    radius: float = 1.0,
    keep_components: float = 0.05,
    device: torch.device | str = "cpu",
    chunk: int = 262_144,
) -> Samples:
    """Density around the field's solid parts, see :func:`extract_isosurface` for the arguments.

    A coarse grid finds where the solid is; the fine grid of ``resolution`` voxels covers the box around it, and the
    field is asked only near it (:data:`_MARGIN`).

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
    # Where the solid stays away from the sphere, it cuts nothing off: nothing is solid where nothing was asked for.
    reach = float(from_origin[near].max()) + math.sqrt(3.0) * coarse.spacing
    return Samples(grid, density, radius, reach > radius - grid.spacing)


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
