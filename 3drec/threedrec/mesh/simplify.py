"""Fewer triangles, and still a closed surface."""

import logging

import fast_simplification
import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from threedrec.mesh.types import Mesh, edge_counts, is_watertight

logger = logging.getLogger(__name__)

_ATTEMPTS = (1.0, 0.97, 0.94)
"""Fractions of the budget tried until the result is watertight."""
_FEW = 2000
"""A mesh of fewer faces is simplified only where the budget demands it."""
_EXTENT = 1000.0
"""Size at which fast-simplification sees the mesh. Its error thresholds are absolute: on a sphere, a mesh of extent 1
loses any order of collapses and ends with slivers (normals off by up to 35°), one of extent 1000 does not (5°)."""


def simplify(mesh: Mesh, face_budget: int) -> Mesh:
    """Collapse edges (Garland & Heckbert 1997) until at most ``face_budget`` faces are left, then repair.

    Marching cubes leave many slivers, whose normals are unreliable; collapsing half of the faces removes them, so that
    much is done even within the budget. A collapse can fold two sheets onto each other; :func:`make_manifold` opens
    such places again. Where that does not help, a slightly smaller budget is tried: the order of collapses differs.
    """
    budget = min(face_budget, max(len(mesh.faces) // 2, _FEW))
    tried = []
    for attempt in _ATTEMPTS:
        target = int(budget * attempt)
        tried.append(make_manifold(_collapse(mesh, target) if len(mesh.faces) > target else mesh))
        if is_watertight(tried[-1].faces):
            return tried[-1]
    best = min(tried, key=_open_edges)
    logger.warning("The simplified mesh is not watertight: %d edges do not have two faces.", _open_edges(best))
    return best


def make_manifold(mesh: Mesh) -> Mesh:
    """Remove degenerate and doubled faces, split vertices where sheets merely touch, drop unused vertices.

    Corners of faces that meet at an ordinary edge (one of two faces) share their vertices there; corners joined by no
    chain of such edges get vertices of their own, moved apart by a hundredth of an edge so that merging by position,
    as readers of mesh files do, does not undo it.
    """
    faces = _without_doubles(mesh.faces[_distinct(mesh.faces)])
    if len(faces) == 0:
        return Mesh(mesh.vertices[:0], faces)
    labels, count = _split_corners(faces)
    original = np.zeros(count, dtype=np.int64)
    original[labels] = faces.reshape(-1)
    vertices, split = mesh.vertices[original], labels.reshape(-1, 3)
    copied = np.bincount(original, minlength=len(mesh.vertices))[original] > 1
    if copied.any():
        centres = np.repeat(vertices[split].mean(axis=1), 3, axis=0)
        sums = np.stack([np.bincount(labels, centres[:, axis], minlength=count) for axis in range(3)], axis=1)
        towards = sums / np.bincount(labels, minlength=count)[:, None] - vertices
        vertices = np.where(copied[:, None], vertices + 0.01 * towards, vertices)
    return Mesh(vertices, split)


def keep_large_parts(mesh: Mesh, fraction: float) -> Mesh:
    """Drop connected parts that have fewer faces than ``fraction`` of the largest part's."""
    first, second = mesh.faces[:, 0], mesh.faces[:, 1:]
    ones = np.ones(2 * len(first), dtype=bool)
    links = coo_matrix((ones, (np.tile(first, 2), second.T.reshape(-1))), shape=(len(mesh.vertices),) * 2)
    count, labels = connected_components(links, directed=False)
    sizes = np.bincount(labels[first], minlength=count)
    keep = sizes[labels[first]] >= fraction * sizes.max()
    used, faces = np.unique(mesh.faces[keep], return_inverse=True)
    return Mesh(mesh.vertices[used], faces.reshape(-1, 3))


def _collapse(mesh: Mesh, target: int) -> Mesh:
    centre = mesh.vertices.mean(axis=0)
    scale = _EXTENT / float(np.ptp(mesh.vertices, axis=0).max())
    vertices, faces = fast_simplification.simplify(
        ((mesh.vertices - centre) * scale).astype(np.float32), mesh.faces.astype(np.int32), target_count=target
    )
    return Mesh(np.asarray(vertices, dtype=np.float64) / scale + centre, np.asarray(faces, dtype=np.int64))


def _open_edges(mesh: Mesh) -> int:
    return int((edge_counts(mesh.faces) != 2).sum()) if len(mesh.faces) else 1


def _distinct(faces: Int[np.ndarray, "F 3"]) -> np.ndarray:
    a, b, c = faces.T
    return (a != b) & (b != c) & (c != a)


def _without_doubles(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "F 3"]:
    """Of faces on the same three vertices keep one, or none where they come in pairs (a flap folded onto itself)."""
    _, first, inverse, counts = np.unique(
        np.sort(faces, axis=1), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    keep = np.zeros(len(faces), dtype=bool)
    keep[first] = True
    return faces[keep & (counts[inverse.reshape(-1)] % 2 == 1)]


def _split_corners(faces: Int[np.ndarray, "F 3"]) -> tuple[np.ndarray, int]:
    """New vertex of every corner (3F), and how many there are."""
    corners = np.arange(3 * len(faces)).reshape(-1, 3)
    sides = np.concatenate([np.stack([faces[:, i], faces[:, (i + 1) % 3]], axis=1) for i in range(3)])
    at = np.concatenate([np.stack([corners[:, i], corners[:, (i + 1) % 3]], axis=1) for i in range(3)])
    swap = sides[:, 0] > sides[:, 1]
    sides[swap], at[swap] = sides[swap, ::-1], at[swap, ::-1]
    keys = sides[:, 0] * (int(faces.max()) + 1) + sides[:, 1]
    order = np.argsort(keys, kind="stable")
    keys, at = keys[order], at[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    pairs = starts[np.diff(np.append(starts, len(keys))) == 2]
    ends = np.concatenate([at[pairs], at[pairs + 1]], axis=1).reshape(-1, 2, 2)  # (edge, face, end)
    one, other = ends[:, 0].reshape(-1), ends[:, 1].reshape(-1)
    links = coo_matrix((np.ones(len(one), dtype=bool), (one, other)), shape=(3 * len(faces),) * 2)
    count, labels = connected_components(links, directed=False)
    return labels, int(count)
