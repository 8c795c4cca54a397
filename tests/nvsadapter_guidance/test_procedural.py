"""Procedural objects: distances against closed forms, framing, shading, repeatability."""

import math

import pytest
import torch

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training import sdf
from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.procedural import (
    Tracing,
    object_cameras,
    orbit_views,
    placement,
    render_procedural,
    trace,
)
from nvsadapter_guidance.training.recipes import KINDS, random_parts
from nvsadapter_guidance.training.shapes import Draw


def packed_part(**options) -> torch.Tensor:
    draw = Draw(1, torch.Generator().manual_seed(0))
    options.setdefault("centre", (0.0, 0.0, 0.0))
    draw.part(**options)
    return draw.parts().packed()


def distances(packed: torch.Tensor, points: list[tuple[float, float, float]]) -> list[float]:
    x, y, z = torch.tensor(points).T[:, None]
    return sdf.distance((x, y, z), packed)[0].tolist()


def test_a_box_has_the_distances_of_a_box():
    packed = packed_part(half=(0.3, 0.2, 0.1), rounding=0.0)
    expected = [0.2, 0.3, -0.1, math.hypot(0.3, 0.4)]
    assert distances(packed, [(0.5, 0, 0), (0, 0.5, 0), (0, 0, 0), (0.6, 0.6, 0)]) == pytest.approx(expected, abs=1e-4)


def test_full_rounding_makes_a_ball():
    packed = packed_part(half=(0.3, 0.3, 0.3), round_corner=1.0, rounding=0.2999)
    point = (0.4, 0.3, 0.5)
    assert distances(packed, [point]) == pytest.approx([math.hypot(*point) - 0.3], abs=6e-3)


def test_a_cylinder_along_an_axis():
    packed = packed_part(half=(0.2, 0.2, 0.4), round_corner=1.0, rounding=0.0, axis="y")
    points = [(0.3, 0, 0.4), (0, 0.6, 0), (0, 0, 0)]
    assert distances(packed, points) == pytest.approx([0.3, 0.2, -0.2], abs=1e-4)


def test_a_hollow_part_is_empty_inside():
    packed = packed_part(half=(0.3, 0.3, 0.2), round_corner=1.0, rounding=0.0, wall=0.02)
    assert distances(packed, [(0, 0, 0), (0.28, 0, 0), (0.3, 0, 0)]) == pytest.approx([0.26, -0.02, 0.0], abs=1e-4)


def test_mirrored_parts_are_there_twice():
    packed = packed_part(centre=(0.0, 0.4, 0.0), half=(0.1, 0.1, 0.1), rounding=0.0, mirrored=1.0)
    assert distances(packed, [(0, 0.6, 0), (0, -0.6, 0)]) == pytest.approx([0.1, 0.1], abs=1e-4)


def test_carving_takes_away():
    draw = Draw(1, torch.Generator().manual_seed(0))
    draw.part((0.0, 0.0, 0.0), (0.4, 0.4, 0.4), rounding=0.0)
    draw.part((0.4, 0.0, 0.0), (0.2, 0.2, 0.2), rounding=0.0, carve=1.0)
    assert distances(draw.parts().packed(), [(0.3, 0, 0), (-0.3, 0, 0)]) == pytest.approx([0.1, -0.1], abs=1e-4)


def test_distances_of_every_kind_are_lower_bounds():
    parts, _ = random_parts(24, torch.Generator().manual_seed(0))
    packed = parts.packed()
    generator = torch.Generator().manual_seed(1)
    points = 1.6 * torch.rand((24, 400, 3), generator=generator) - 0.8
    steps = torch.nn.functional.normalize(torch.randn(points.shape, generator=generator), dim=-1) * 0.01
    first, second = (sdf.distance(tuple(p.unbind(-1)), packed) for p in (points, points + steps))
    slope = (first - second).abs() / 0.01
    assert slope.quantile(0.99) <= 1.02
    assert slope.max() <= 1.6, "smooth joints and clamped profiles may exceed one a little"


def test_every_kind_can_be_drawn():
    for recipe, _ in KINDS.values():
        draw = Draw(3, torch.Generator().manual_seed(0))
        recipe(draw)
        packed = draw.parts().packed()
        assert packed.shape[:2] == (3, 8)
        assert torch.isfinite(packed).all()


def test_a_ball_is_seen_with_the_pinhole_radius_and_the_mesh_lights():
    packed = packed_part(half=(0.4, 0.4, 0.4), round_corner=1.0, rounding=0.39, plain=1.0)
    scale = torch.tensor([1.0])
    cameras = object_cameras(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 3), scale)
    view = trace(packed, cameras, scale, Tracing(size=32))[0, 0].float() / 255
    radius = math.tan(math.asin(0.4 / 1.5)) / math.tan(math.radians(49.1 / 2)) * 16
    assert view[..., 3].sum().item() == pytest.approx(math.pi * radius**2, rel=0.06)
    shade = AMBIENT + sum(light.intensity * max(0.0, light.direction[0]) for light in LIGHTS)
    colour = sdf.albedo(tuple(torch.tensor([[value]]) for value in (0.4, 0.0, 0.0)), packed)
    expected = torch.tensor([float(channel) * shade for channel in colour])
    torch.testing.assert_close(view[15:17, 15:17, :3].mean((0, 1)), expected, atol=0.02, rtol=0)


def test_the_camera_goes_round_counter_clockwise():
    packed = packed_part(centre=(0.0, 0.3, 0.0), half=(0.1, 0.1, 0.1))
    scale, azimuth = torch.tensor([1.0]), torch.tensor([[0.0, 90.0, 180.0]])
    cameras = object_cameras(azimuth, torch.zeros(1, 3), torch.zeros(1, 3), scale)
    alpha = trace(packed, cameras, scale, Tracing(size=32))[0, ..., 3].float()
    columns = (alpha.sum(1) * torch.arange(32)).sum(1) / alpha.sum((1, 2))
    assert columns[0] > 20, "world +y is at image right from azimuth 0"
    assert columns[1] == pytest.approx(15.5, abs=0.5)
    assert columns[2] < 11


def test_objects_lie_centred_within_the_radius():
    parts, _ = random_parts(6, torch.Generator().manual_seed(3))
    packed = parts.packed()
    centre, scale = placement(packed, torch.full((6,), 0.5), resolution=32)
    generator = torch.Generator().manual_seed(0)
    world = 1.4 * torch.rand((6, 4000, 3), generator=generator) - 0.7
    points = world / scale[:, None, None] + centre[:, None]
    inside = sdf.distance(tuple(points.unbind(-1)), packed) < 0
    farthest = torch.where(inside, world.norm(dim=-1), 0.0).amax(1)
    assert farthest.max() <= 0.505


def test_a_small_bank():
    bank = render_procedural(3, torch.Generator().manual_seed(0), views=5, size=32)
    again = render_procedural(3, torch.Generator().manual_seed(0), views=5, size=32)
    assert bank.rgba.shape == (3, 5, 32, 32, 4)
    assert torch.equal(bank.rgba, again.rgba)
    covered = (bank.rgba[..., 3] > 127).float().mean((2, 3))
    assert covered.min() > 0.01 and covered.max() < 0.6
    assert (bank.rgba[:, :, 0, :, 3] == 0).all(), "nothing is cut off at the top"
    assert bank.rgba[..., 3].unique().numel() > 2, "edges are antialiased"


def test_orbit_views_hold_rings_and_free_views():
    azimuth, elevation = orbit_views(2, 10, torch.Generator().manual_seed(0))
    assert azimuth.shape == elevation.shape == (2, 10)
    assert (elevation[:, :4] == 0).all() and (elevation[:, 4:6] == 30).all()
    torch.testing.assert_close(torch.remainder(azimuth[:, :4].diff(dim=1), 360), torch.full((2, 3), 90.0))


@pytest.mark.parametrize("options", [{"count": 0}, {"views": 3}, {"size": 30}])
def test_sizes_that_cannot_be_rendered_are_errors(options):
    arguments = {"count": 2, "views": 5, "size": 32, **options}
    with pytest.raises(InputError, match="multiple of 16"):
        render_procedural(arguments.pop("count"), torch.Generator(), **arguments)
