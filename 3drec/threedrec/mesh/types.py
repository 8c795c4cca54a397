"""A triangle mesh, and the small geometry that every step needs."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Mesh:
    """Triangles in world coordinates (z up, front +x), counter-clockwise seen from outside."""

    vertices: Float[np.ndarray, "V 3"]
    faces: Int[np.ndarray, "F 3"]

    @property
    def triangles(self) -> Float[np.ndarray, "F 3 3"]:
        """Corner positions of every face."""
        return self.vertices[self.faces]

    @property
    def area(self) -> float:
        """Area of all faces."""
        a, b, c = np.moveaxis(self.triangles, 1, 0)
        return float(0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1).sum())

    @property
    def volume(self) -> float:
        """Signed enclosed volume; positive when the faces look outwards."""
        a, b, c = np.moveaxis(self.triangles, 1, 0)
        return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6.0)


def edge_counts(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, " E"]:
    """How many faces meet at each edge of the mesh; 2 everywhere on a closed surface."""
    corners = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1).astype(np.int64)
    keys = corners[:, 0] * (int(faces.max(initial=0)) + 1) + corners[:, 1]
    return np.unique(keys, return_counts=True)[1]


def is_watertight(faces: Int[np.ndarray, "F 3"]) -> bool:
    """Whether exactly two faces meet at every edge, and there is at least one face."""
    return len(faces) > 0 and bool((edge_counts(faces) == 2).all())


def vertex_normals(mesh: Mesh) -> Float[np.ndarray, "V 3"]:
    """Unit outward normals, face normals averaged with the angle of each face at the vertex (Thürmer & Wüthrich 1998).

    A vertex whose faces have no area gets the upward normal, so that every normal is of unit length.
    """
    triangles = mesh.triangles
    face_normals = _unit(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]))
    normals = np.zeros_like(mesh.vertices)
    for corner in range(3):
        ahead = _unit(triangles[:, (corner + 1) % 3] - triangles[:, corner])
        behind = _unit(triangles[:, (corner + 2) % 3] - triangles[:, corner])
        angles = np.arccos(np.clip((ahead * behind).sum(axis=1), -1.0, 1.0))
        weighted = face_normals * angles[:, None]
        for axis in range(3):
            normals[:, axis] += np.bincount(mesh.faces[:, corner], weighted[:, axis], minlength=len(normals))
    normals = _unit(normals)
    normals[(normals == 0).all(axis=1)] = (0.0, 0.0, 1.0)
    return normals


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-20)
