import numpy as np
import pytest
import torch
import trimesh

from threedrec.mesh.sampling import extract_isosurface
from threedrec.mesh.simplify import keep_large_parts, make_manifold, simplify
from threedrec.mesh.types import Mesh, edge_counts, is_watertight, vertex_normals


def box(offset: float = 0.0) -> Mesh:
    mesh = trimesh.creation.box()
    return Mesh(np.asarray(mesh.vertices) + offset, np.asarray(mesh.faces))


def ball() -> Mesh:
    return extract_isosurface(lambda p: 200 * torch.sigmoid(200 * (0.4 - p.norm(dim=-1, keepdim=True))), 48, 50.0).mesh


def joined(first: Mesh, second: Mesh) -> Mesh:
    vertices = np.concatenate([first.vertices, second.vertices])
    return Mesh(vertices, np.concatenate([first.faces, second.faces + len(first.vertices)]))


def test_a_sphere_stays_round_closed_and_within_the_budget() -> None:
    mesh = simplify(ball(), 3000)
    assert 2000 < len(mesh.faces) <= 3000
    assert is_watertight(mesh.faces)
    radii = np.linalg.norm(mesh.vertices, axis=1)
    assert radii.std() < 5e-4
    cosines = (vertex_normals(mesh) * mesh.vertices).sum(axis=1) / radii
    assert np.degrees(np.arccos(cosines.clip(-1, 1))).max() < 10.0


def test_slivers_are_collapsed_even_within_the_budget_and_small_meshes_left() -> None:
    mesh = ball()
    assert len(simplify(mesh, 10**6).faces) <= len(mesh.faces) // 2
    assert len(simplify(box(), 10**6).faces) == 12


def test_normals_of_a_box_point_along_its_diagonals() -> None:
    normals = vertex_normals(box())
    np.testing.assert_allclose(normals, np.sign(box().vertices) / np.sqrt(3), atol=1e-6)


def test_two_boxes_that_share_an_edge_are_pulled_apart() -> None:
    first, second = box(), box()
    # The second stands diagonally beside the first: its edge (-x, -y) is the first's edge (+x, +y).
    second = Mesh(second.vertices + [1.0, 1.0, 0.0], second.faces)
    both = joined(first, second)
    merged = trimesh.Trimesh(both.vertices, both.faces, process=True)
    touching = Mesh(np.asarray(merged.vertices), np.asarray(merged.faces))
    assert edge_counts(touching.faces).max() == 4
    mesh = make_manifold(touching)
    assert is_watertight(mesh.faces)
    assert len(mesh.vertices) == 16
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=True).is_watertight  # also once merged by position


def test_degenerate_and_doubled_faces_go() -> None:
    mesh = box()
    flap = (
        [[0, 1, 2], [2, 1, 0]] if not (np.sort(mesh.faces, axis=1) == [0, 1, 2]).all(axis=1).any() else [[0, 1, 7]] * 2
    )
    dirty = Mesh(mesh.vertices, np.concatenate([mesh.faces, flap, [[3, 3, 4]]]))
    clean = make_manifold(dirty)
    assert len(clean.faces) == 12 and is_watertight(clean.faces)


def test_parts_are_kept_by_their_size() -> None:
    big = simplify(ball(), 1000)
    small = Mesh(box().vertices + 5.0, box().faces)
    both = joined(big, small)
    assert len(keep_large_parts(both, 0.05).faces) == len(big.faces)
    assert len(keep_large_parts(both, 0.001).faces) == len(both.faces)


@pytest.mark.parametrize("faces", [np.zeros((0, 3), dtype=int), np.array([[0, 1, 2]])])
def test_open_meshes_are_not_watertight(faces: np.ndarray) -> None:
    assert not is_watertight(faces)
