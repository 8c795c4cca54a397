import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh.bake import bake_texture, colors_at, fill_uncovered
from threedrec.mesh.rasterize import rasterize
from threedrec.mesh.types import Mesh
from threedrec.mesh.unwrap import Atlas, unwrap


def icosphere() -> Mesh:
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    return Mesh(np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces))


def position_color(points: Tensor) -> Tensor:
    return points + 0.5


def brute_force(triangle: Tensor, size: int) -> Tensor:
    a, b, c = triangle.tolist()
    inside = torch.zeros(size, size, dtype=torch.bool)
    for y in range(size):
        for x in range(size):
            p = (x + 0.5, y + 0.5)
            sides = [(q[0] - o[0]) * (p[1] - o[1]) - (q[1] - o[1]) * (p[0] - o[0]) for o, q in ((a, b), (b, c), (c, a))]
            inside[y, x] = all(s >= 0 for s in sides) or all(s <= 0 for s in sides)
    return inside


def test_coverage_agrees_with_testing_every_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        triangle = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 20 - 2
        assert torch.equal(rasterize(triangle[None], 16, 16).face >= 0, brute_force(triangle, 16))


def test_barycentric_coordinates_give_the_pixel_centre() -> None:
    triangles = torch.tensor([[[1.0, 1.0], [14.0, 3.0], [5.0, 15.0]]], dtype=torch.float64)
    coverage = rasterize(triangles, 16, 16)
    rows, columns = torch.nonzero(coverage.face >= 0, as_tuple=True)
    points = coverage.barycentric[rows, columns] @ triangles[0]
    torch.testing.assert_close(points, torch.stack([columns, rows], dim=1).double() + 0.5)


def test_the_nearest_triangle_wins_also_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threedrec.mesh.rasterize._CHUNK", 10)
    square = torch.tensor([[[0.0, 0.0], [16.0, 0.0], [0.0, 16.0]]], dtype=torch.float64)
    triangles = square.repeat(3, 1, 1)
    coverage = rasterize(triangles, 8, 8, depth=torch.tensor([[2.0] * 3, [1.0] * 3, [3.0] * 3], dtype=torch.float64))
    assert (coverage.face == 1).all()
    empty = torch.full((1, 3, 2), torch.nan, dtype=torch.float64)
    assert (rasterize(torch.cat([empty, triangles[:, :1].expand(-1, 3, -1)]), 8, 8).face == -1).all()


def test_the_atlas_keeps_the_faces_and_does_not_overlap() -> None:
    mesh = icosphere()
    atlas = unwrap(mesh, 256)
    np.testing.assert_array_equal(atlas.original[atlas.faces], mesh.faces)
    assert atlas.uv.min() >= 0.0 and atlas.uv.max() <= 1.0
    a, b, c = np.moveaxis(atlas.uv[atlas.faces], 1, 0)
    areas = 0.5 * np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    assert (areas > 0).all()
    covered = (rasterize(torch.from_numpy(atlas.uv[atlas.faces] * 1024), 1024, 1024).face >= 0).float().mean().item()
    assert areas.sum() == pytest.approx(covered, rel=0.02)  # overlapping charts would cover less than their areas


@pytest.mark.parametrize(
    ("chart", "pack", "message"),
    [
        (
            {"max_iteration": 3},
            {},
            r"xatlas_chart_options\.max_iteration: unknown option; xatlas knows .*max_iterations",
        ),
        ({}, {"padding": "two"}, r"xatlas_pack_options\.padding: 'two' is of the wrong type; give a value of type int"),
    ],
)
def test_wrong_options_are_named(chart: dict, pack: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unwrap(icosphere(), 64, chart, pack)


def test_the_texture_holds_the_colour_of_the_surface() -> None:
    mesh = icosphere()
    atlas = unwrap(mesh, 256)
    texture = bake_texture(mesh, atlas, position_color, 256, chunk=1000)
    assert texture.shape == (256, 256, 3)
    generator = np.random.default_rng(0)
    weights = generator.dirichlet([1.0, 1.0, 1.0], size=len(mesh.faces))[:, :, None]
    points = (mesh.triangles * weights).sum(axis=1)
    uv = (atlas.uv[atlas.faces] * weights).sum(axis=1)
    rows, columns = ((1 - uv[:, 1]) * 256).astype(int).clip(0, 255), (uv[:, 0] * 256).astype(int).clip(0, 255)
    # A texel is about 0.012 wide here; two of them, plus rounding to bytes.
    np.testing.assert_allclose(texture[rows, columns] / 255.0, points + 0.5, atol=0.03)


def test_seams_are_filled_from_the_nearest_texel() -> None:
    atlas = Atlas(np.arange(3), np.array([[0, 1, 2]]), np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]]))
    mesh = Mesh(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]))
    texture = bake_texture(mesh, atlas, lambda p: torch.ones_like(p), 16)
    assert (texture == 255).all()  # nothing of the background is left
    image = np.array([[[0.2], [0.0], [0.0], [0.8]]])
    filled = fill_uncovered(image, np.array([[True, False, False, True]]))
    np.testing.assert_allclose(filled.reshape(-1), [0.2, 0.2, 0.8, 0.8])


def test_the_lower_left_corner_of_the_image_is_the_origin_of_uv() -> None:
    atlas = Atlas(np.arange(3), np.array([[0, 1, 2]]), np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    mesh = Mesh(np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]))
    texture = bake_texture(mesh, atlas, lambda p: p, 32) / 255.0
    np.testing.assert_allclose(texture[31, 0, :2], [0.5 / 32, 0.5 / 32], atol=0.005)
    np.testing.assert_allclose(texture[31, 31, :2], [1 - 0.5 / 32, 0.5 / 32], atol=0.005)
    np.testing.assert_allclose(texture[0, 0, :2], [0.5 / 32, 1 - 0.5 / 32], atol=0.005)


def test_colours_out_of_range_are_clamped() -> None:
    values = torch.tensor([[-1.0, 2.0, float("nan")]])
    np.testing.assert_array_equal(colors_at(lambda p: values, torch.zeros(1, 3)), [[0.0, 1.0, 0.0]])
