"""The similarity transform that lays one mesh onto another, to tell a wrong shape from a right one that lies wrong."""

from typing import Any

import numpy as np
from jaxtyping import Float

from nvsadapter_guidance.evaluation.mesh_metrics import chamfer, nearest_distances, surface_points

TURNS = 24
"""Starts of the search: turns about the vertical axis."""
_REFINED = 3
_POINTS = 3000
_GAIN = 0.95
"""Share of the distance as it lies that alignment has to beat: less is the noise of the sample."""


def align(prediction: Any, truth: Any, seed: int = 0) -> Float[np.ndarray, "4 4"]:
    """Rotation, translation and scale (no reflection) of ``prediction`` that make the Chamfer distance small.

    The best of 24 turns about the vertical (y) axis are refined by iterative closest points (Besl & McKay 1992) with
    and without scale. Where that gains less than a twentieth, meshes stay as they lie.

    Args:
        prediction, truth: ``trimesh.Trimesh`` of about the same size.
    """
    from trimesh.registration import icp
    from trimesh.transformations import rotation_matrix

    moving, fixed = surface_points(prediction, _POINTS, seed), surface_points(truth, _POINTS, seed + 1)
    turns = [rotation_matrix(angle, (0.0, 1.0, 0.0)) for angle in 2.0 * np.pi * np.arange(TURNS) / TURNS]
    ranked = sorted(turns, key=lambda turn: _distance(moved(moving, turn), fixed))
    candidates = list(ranked[:_REFINED])
    for start in ranked[:_REFINED]:
        for scale in (False, True):
            options = {"reflection": False, "scale": scale}
            candidates.append(icp(moving, fixed, initial=start, threshold=1e-6, max_iterations=40, **options)[0])
    best = min(candidates, key=lambda transform: _distance(moved(moving, transform), fixed))
    gained = _distance(moved(moving, best), fixed) < _GAIN * _distance(moving, fixed)
    return best if gained else np.eye(4)


def moved(points: Float[np.ndarray, "n 3"], transform: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "n 3"]:
    """Points under a transform."""
    return points @ transform[:3, :3].T + transform[:3, 3]


def _distance(first: Float[np.ndarray, "n 3"], second: Float[np.ndarray, "m 3"]) -> float:
    return chamfer(*nearest_distances(first, second))
