"""How alike two meshes are: Chamfer distance, F-score and volume IoU, as SyncDreamer measures reconstructions.

Liu et al. 2023 (arXiv 2309.03453): in a frame where the object's longest side is 1, nothing aligned, the Chamfer
distance is the mean of both directions' mean distances (not squared), and volumes are compared on 64 voxels along each
side of the cube [-1, 1]^3. Differences: points are drawn from the whole surface, where that evaluation takes what 16
depth maps show; a volume is all that cannot be reached from outside, where that takes the sign of a distance field.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

F_SCORE_DISTANCES = (0.01, 0.02, 0.05)
GRID = 64
POINTS = 100_000
"""Points on each surface; two samples of one mesh of size 1 lie 0.002 to 0.003 apart."""
_PORTION = 1_000_000  # points on triangles held at once
_SUBVOXELS = 4  # per voxel and side


@dataclass(frozen=True)
class MeshScores:
    """Scores of one pair; distances in units of the longest side."""

    chamfer: float
    volume_iou: float
    f_score: dict[str, float]
    """In [0, 1], by distance."""


def normalised(mesh: Any) -> Any:
    """A copy of a ``trimesh.Trimesh`` with the centre of its bounding box at the origin and its longest side 1."""
    copy = mesh.copy()
    low, high = copy.bounds
    copy.vertices = (copy.vertices - (low + high) / 2.0) / float((high - low).max())
    return copy


def surface_points(mesh: Any, count: int = POINTS, seed: int = 0) -> Float[np.ndarray, "n 3"]:
    """Points drawn uniformly from the surface of a ``trimesh.Trimesh``."""
    import trimesh

    points, _ = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return np.asarray(points)


def nearest_distances(
    prediction: Float[np.ndarray, "n 3"], truth: Float[np.ndarray, "m 3"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Distance of every point to the nearest of the other set."""
    from scipy.spatial import cKDTree

    return cKDTree(truth).query(prediction)[0], cKDTree(prediction).query(truth)[0]


def chamfer(to_truth: Float[np.ndarray, " n"], to_prediction: Float[np.ndarray, " m"]) -> float:
    """Mean of both directions' mean distances."""
    return float((to_truth.mean() + to_prediction.mean()) / 2.0)


def f_score(to_truth: Float[np.ndarray, " n"], to_prediction: Float[np.ndarray, " m"], distance: float) -> float:
    """Harmonic mean of precision and recall: shares of points that have the other surface within ``distance``.

    Knapitsch et al. 2017 (Tanks and Temples), section 3.3.
    """
    precision, recall = float((to_truth < distance).mean()), float((to_prediction < distance).mean())
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


def solid(mesh: Any, grid: int = GRID) -> Bool[np.ndarray, "g g g"]:
    """Voxels of [-1, 1]^3 that lie by half or more in what the surface of a mesh encloses.

    The surface is drawn on a grid four times as fine, and all that cannot be reached from outside is filled: cavities
    and overlapping parts are solid, whichever way faces are wound, and gaps below 1 / (2 grid) are closed. Fine voxels
    of the surface itself count half. A part of the mesh beyond the cube is cut off.
    """
    from scipy import ndimage

    fine = grid * _SUBVOXELS
    surface = np.zeros((fine,) * 3, dtype=bool)
    for points in dense_points(mesh.triangles, 1.0 / fine):
        # What lies beyond is pressed onto the border, so that the rest stays closed.
        surface[tuple(np.clip((points + 1.0) * (fine / 2.0), 0, fine - 1).astype(np.int64).T)] = True
    # Only where the mesh is, with a rim of empty voxels all around, which is outside.
    sides = (np.flatnonzero(surface.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    box = tuple(slice(side[0], side[-1] + 1) for side in sides)
    regions, _ = ndimage.label(~np.pad(surface[box], 1))
    share = np.zeros(surface.shape, dtype=np.float32)
    share[box] = (regions != regions[0, 0, 0])[1:-1, 1:-1, 1:-1]
    share[surface] = 0.5
    blocks = share.reshape(grid, _SUBVOXELS, grid, _SUBVOXELS, grid, _SUBVOXELS)
    return blocks.mean(axis=(1, 3, 5)) >= 0.5


def dense_points(triangles: Float[np.ndarray, "f 3 3"], spacing: float) -> Iterator[Float[np.ndarray, "n 3"]]:
    """Points on triangles, a triangular lattice on each whose neighbours are at most ``spacing`` apart; in portions."""
    edges = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max(axis=1)
    divisions = np.maximum(np.ceil(edges / spacing), 1).astype(np.int64)
    for count in np.unique(divisions):
        i, j = np.nonzero(np.tri(count + 1, dtype=bool)[::-1])
        weights = np.stack([i, j, count - i - j], axis=1) / count
        chosen = triangles[divisions == count]
        for part in np.array_split(chosen, -(-len(chosen) * len(weights) // _PORTION)):
            yield (weights @ part).reshape(-1, 3)


def volume_iou(first: Bool[np.ndarray, "g g g"], second: Bool[np.ndarray, "g g g"]) -> float:
    """Intersection over union of two volumes; 1 for two empty ones."""
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0


@dataclass(frozen=True)
class MeasuredMesh:
    """What scores are made of, of one mesh."""

    points: Float[np.ndarray, "n 3"]
    volume: Bool[np.ndarray, "g g g"]


def measure(mesh: Any, seed: int, points: int = POINTS) -> MeasuredMesh:
    """Points and volume of a ``trimesh.Trimesh`` as it lies; bring it to size by `normalised` before.

    Two meshes that are compared need two seeds: with one, the points of equal meshes would fall onto each other and
    hide how far apart samples lie.
    """
    return MeasuredMesh(surface_points(mesh, points, seed), solid(mesh))


def compare(prediction: MeasuredMesh, truth: MeasuredMesh) -> MeshScores:
    """Scores of two meshes as they lie."""
    distances = nearest_distances(prediction.points, truth.points)
    return MeshScores(
        chamfer=chamfer(*distances),
        volume_iou=volume_iou(prediction.volume, truth.volume),
        f_score={f"{limit:g}": f_score(*distances, limit) for limit in F_SCORE_DISTANCES},
    )
