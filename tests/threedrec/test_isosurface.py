import math

import numpy as np
import pytest
import torch
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh.isosurface import Grid, keep_solid
from threedrec.mesh.sampling import extract_isosurface, sample_density
from threedrec.mesh.threshold import automatic_threshold
from threedrec.mesh.types import Mesh, is_watertight


def soft(distance: Tensor, sharpness: float = 200.0, peak: float = 200.0) -> Tensor:
    """Density of a solid given by its signed distance."""
    return peak * torch.sigmoid(-distance * sharpness)[:, None]


def sphere(points: Tensor, radius: float = 0.4) -> Tensor:
    return soft(points.norm(dim=-1) - radius)


def torus(points: Tensor) -> Tensor:
    ring = points[:, :2].norm(dim=-1) - 0.35
    return soft(torch.stack([ring, points[:, 2]], dim=-1).norm(dim=-1) - 0.12)


def euler_characteristic(mesh: Mesh) -> int:
    return len(mesh.vertices) - len(mesh.faces) // 2  # V - E + F with 3F = 2E


def test_the_grid_covers_the_box_with_cubic_voxels() -> None:
    grid = Grid.covering(np.array([-1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.1]), 20)
    assert grid.shape == (20, 10, 1) and grid.spacing == pytest.approx(0.1)
    np.testing.assert_allclose(
        grid.points(np.array([[0, 0, 0], [19, 9, 0]])), [[-0.95, 0.05, 0.05], [0.95, 0.95, 0.05]]
    )


def test_samples_stand_at_their_grid_points_whatever_the_chunk() -> None:
    grid = Grid.covering(np.array([-1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.5]), 8)
    density = sample_density(lambda p: p[:, :1] + 10 * p[:, 1:2] + 100 * p[:, 2:], grid, chunk=7)
    x, y, z = grid.points(np.array([[5.0, 2.0, 1.0]]))[0]
    assert density[5, 2, 1] == pytest.approx(x + 10 * y + 100 * z, rel=1e-5)


def test_a_sphere_comes_out_round_closed_and_outward() -> None:
    threshold = 50.0
    surface = extract_isosurface(sphere, 48, threshold)
    radii = np.linalg.norm(surface.mesh.vertices, axis=1)
    expected = 0.4 - math.log(threshold / (200.0 - threshold)) / 200.0
    np.testing.assert_allclose(radii, expected, atol=2e-3)  # a tenth of a voxel
    assert is_watertight(surface.mesh.faces)
    assert surface.mesh.volume == pytest.approx(4 / 3 * math.pi * expected**3, rel=0.02)
    assert euler_characteristic(surface.mesh) == 2


def test_a_torus_keeps_its_hole() -> None:
    surface = extract_isosurface(torus, 48, 100.0, smoothing=0.7)
    assert is_watertight(surface.mesh.faces)
    assert euler_characteristic(surface.mesh) == 0
    assert surface.mesh.volume == pytest.approx(2 * math.pi**2 * 0.35 * 0.12**2, rel=0.03)


def test_small_parts_go_and_large_parts_stay() -> None:
    centre = torch.tensor([0.0, 0.6, 0.0])

    def two(points: Tensor, small: float) -> Tensor:
        return sphere(points, 0.3) + sphere(points - centre, small)

    assert euler_characteristic(extract_isosurface(lambda p: two(p, 0.06), 48).mesh) == 2
    assert euler_characteristic(extract_isosurface(lambda p: two(p, 0.2), 48).mesh) == 4


def test_hidden_cavities_are_filled() -> None:
    def shell(points: Tensor) -> Tensor:
        return sphere(points, 0.4) - sphere(points, 0.2)

    assert euler_characteristic(extract_isosurface(shell, 48).mesh) == 2
    field = np.full((5, 5, 5), -1.0)
    field[1:4, 1:4, 1:4] = 1.0
    field[2, 2, 2] = -1.0
    assert keep_solid(field, 0.05)[2, 2, 2] > 0


def test_smoothing_removes_the_noise_of_a_surface() -> None:
    grid = torch.randn(1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(0))

    def bumpy(points: Tensor) -> Tensor:
        bumps = torch.nn.functional.grid_sample(grid, points[None, None, None], align_corners=True).reshape(-1)
        return soft(points.norm(dim=-1) - 0.4 + 0.02 * bumps, 60.0)

    def deviation(smoothing: float) -> float:
        return float(
            np.linalg.norm(extract_isosurface(bumpy, 64, 100.0, smoothing=smoothing).mesh.vertices, axis=1).std()
        )

    assert deviation(1.5) < 0.6 * deviation(0.0)


def test_only_the_neighbourhood_of_the_solid_is_asked_on_the_fine_grid() -> None:
    asked = []

    def field(points: Tensor) -> Tensor:
        asked.append(len(points))
        return sphere(points)

    extract_isosurface(field, 128, 50.0)
    assert sum(asked) < 64**3 + 0.8 * 128**3


def test_a_field_that_fills_the_box_is_closed_at_the_sphere() -> None:
    surface = extract_isosurface(lambda p: torch.full((len(p), 1), 50.0), 32)
    assert is_watertight(surface.mesh.faces)
    np.testing.assert_allclose(np.linalg.norm(surface.mesh.vertices, axis=1), 1.0, atol=0.02)


def test_noise_is_made_coarser_and_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threedrec.mesh.isosurface._MAX_CROSSINGS", 2_000)
    table = torch.rand(4096, generator=torch.Generator().manual_seed(0))

    def noise(points: Tensor) -> Tensor:
        cell = ((points + 1) * 40).long()
        return 50 * table[(cell * torch.tensor([73, 179, 283])).sum(dim=1) % 4096][:, None]

    surface = extract_isosurface(noise, 48)
    assert surface.rough and len(surface.mesh.vertices) <= 2_000
    assert is_watertight(surface.mesh.faces)
    assert np.abs(surface.mesh.vertices).max() <= 1.1


@pytest.mark.parametrize(("density", "what"), [(0.0, "empty"), (1e-3, "empty"), (float("nan"), "not finite")])
def test_a_field_without_a_surface_is_an_error(density: float, what: str) -> None:
    with pytest.raises(InputError, match=what):
        extract_isosurface(lambda p: torch.full((len(p), 1), density), 32)


def test_a_threshold_above_the_field_is_an_error_that_says_so() -> None:
    with pytest.raises(InputError, match="largest density, 200, does not pass the threshold 300"):
        extract_isosurface(sphere, 32, threshold=300.0)


@pytest.mark.parametrize(("peak", "sharpness"), [(1e4, 300.0), (200.0, 60.0), (40.0, 30.0), (20.0, 15.0)])
@pytest.mark.parametrize("fog", [0.0, 0.1])
def test_the_automatic_threshold_follows_what_rays_see(peak: float, sharpness: float, fog: float) -> None:
    grid = Grid.covering(np.full(3, -1.0), np.full(3, 1.0), 64)
    density = sample_density(lambda p: soft(p.norm(dim=-1) - 0.4, sharpness, peak) + fog, grid)
    threshold = automatic_threshold(density, grid.spacing)
    silhouette = 1 - np.exp(-density.sum(axis=0) * grid.spacing) > 0.5
    solid = (density > threshold).any(axis=0)
    assert (silhouette & solid).sum() / (silhouette | solid).sum() > 0.9
    # Depth along the central ray: where half of the light is gone against where the solid begins.
    ray = density[:, 32, 32]
    seen = (np.cumsum(ray) * grid.spacing < math.log(2)).sum()
    assert abs(seen - (ray > threshold).argmax()) * grid.spacing < 0.2  # the softest has a shell this wide


def test_a_faint_field_still_gets_a_threshold() -> None:
    grid = Grid.covering(np.full(3, -1.0), np.full(3, 1.0), 32)
    density = sample_density(lambda p: soft(p.norm(dim=-1) - 0.4, 60.0, 0.4), grid)
    assert 0.0 < automatic_threshold(density, grid.spacing) < 0.4
