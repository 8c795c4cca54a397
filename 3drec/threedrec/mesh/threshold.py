"""The density at which a soft field is cut into a solid.

A trained field has no surface of its own; what people see of it is where rays become opaque. So the threshold is the
one whose solid looks most like the rendered field along the six directions of the axes: its silhouette should be where
the accumulated opacity (Max 1995, eq. 8) ends above one half, and its surface at the depth where the opacity passes one
half. No property of the density's histogram is assumed: the same rule holds for hard fields of enormous density, for
soft blobs and for fog around an object.
"""

import numpy as np
from jaxtyping import Float

from threedrec.errors import InputError

_CANDIDATES = 40
_DEPTH_WEIGHT = 1.0
"""Loss of silhouette IoU that a mean depth error of one world unit is worth. On soft fields the two disagree (a surface
at the right depth may lose a third of the silhouette), and a wrong silhouette is what people see."""
_MAX_SIDE = 96
"""Samples per axis that the comparison looks at; finer grids are strided."""
_EMPTY_OPACITY = 0.05
"""A field through which no axis ray becomes more opaque than this is empty."""


def automatic_threshold(density: Float[np.ndarray, "X Y Z"], spacing: float) -> float:
    """Density whose isosurface looks most like the field along the axes.

    A field too faint for half opacity is judged at half of the largest opacity that it reaches.

    Args:
        density: samples on a regular grid, per world unit.
        spacing: distance between samples, world units.

    Raises:
        InputError: the field is empty.
    """
    stride = -(-max(density.shape) // _MAX_SIDE)
    density, spacing = density[::stride, ::stride, ::stride], spacing * stride
    rays = [
        np.ascontiguousarray(np.moveaxis(density, axis, 2)[:, :, ::direction]).reshape(-1, density.shape[axis])
        for axis in range(3)
        for direction in (1, -1)
    ]
    largest = max(float(1.0 - np.exp(-ray.sum(axis=1, dtype=np.float64).max() * spacing)) for ray in rays)
    if largest < _EMPTY_OPACITY:
        raise InputError(
            f"the field is empty: no view of it is more opaque than {largest:.1%}, so there is no mesh to export; "
            "train it longer, or set system.exporter.isosurface_threshold to a density"
        )
    target = min(0.5, 0.5 * largest)
    lowest = -np.log(1.0 - target) / (spacing * max(density.shape))
    candidates = np.geomspace(min(lowest, 0.5 * density.max()), 0.95 * density.max(), _CANDIDATES)
    seen, both, errors = np.sum([_agreement(ray, spacing, target, candidates) for ray in rays], axis=0)
    iou = both / np.maximum(seen, 1)
    return _middle_of_plateau(candidates, 1.0 - iou + _DEPTH_WEIGHT * errors / np.maximum(both, 1))


def _agreement(rays: np.ndarray, spacing: float, target: float, candidates: np.ndarray) -> np.ndarray:
    """For every threshold, (3, candidates): rays seen or hit, rays seen and hit, and the depth errors of the latter.

    ``rays`` is (rays, samples). A ray is seen when it becomes opaque, and hit when the density passes the threshold.
    """
    optical = np.cumsum(rays, axis=1, dtype=np.float64) * spacing
    needed = -np.log(1.0 - target)
    seen = optical[:, -1] >= needed
    depth_seen = (optical < needed).sum(axis=1)
    reached = np.maximum.accumulate(rays, axis=1)
    sums = []
    for candidate in candidates:
        depth_hit = (reached < candidate).sum(axis=1)
        hit = depth_hit < rays.shape[1]
        errors = np.abs(depth_hit - depth_seen)[seen & hit].sum() * spacing
        sums.append([(seen | hit).sum(), (seen & hit).sum(), errors])
    return np.asarray(sums, dtype=np.float64).T


def _middle_of_plateau(candidates: np.ndarray, costs: np.ndarray) -> float:
    """Geometric middle of the run of thresholds about as good as the best; a hard field accepts a wide range."""
    best = int(costs.argmin())
    good = costs <= 1.02 * costs[best] + 1e-6
    first = last = best
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(costs) - 1 and good[last + 1]:
        last += 1
    return float(np.sqrt(candidates[first] * candidates[last]))
