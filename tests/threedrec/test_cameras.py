"""Camera axes, rays and orbits: the conventions that everything else leans on."""

import math

import pytest
import torch

from threedrec.cameras import Cameras, RandomCameraConfig, look_at, orbit_cameras, turntable


def test_azimuth_zero_stands_on_x_and_sees_y_on_its_right():
    camera = orbit_cameras(0.0, 0.0, 1.5, 49.1, 5, 5)
    right, up, back = camera.c2w[0, :3, :3].unbind(-1)
    torch.testing.assert_close(camera.positions[0], torch.tensor([1.5, 0.0, 0.0]))
    torch.testing.assert_close(right, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(up, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(back, torch.tensor([1.0, 0.0, 0.0]))
    _, directions = camera.rays()
    assert directions[0, 2, 4, 1] > 0, "the right of the image looks towards +y"
    assert directions[0, 0, 2, 2] > 0, "the top of the image looks towards +z"


def test_azimuth_grows_counter_clockwise_and_elevation_upwards():
    cameras = orbit_cameras([0.0, 30.0], [90.0, 0.0], 2.0, 49.1, 4, 4)
    expected = torch.tensor([[0.0, 2.0, 0.0], [2.0 * math.cos(math.pi / 6), 0.0, 1.0]])
    torch.testing.assert_close(cameras.positions, expected, atol=1e-6, rtol=0)


def test_central_ray_hits_the_origin_from_everywhere():
    cameras = orbit_cameras([-80.0, 0.0, 45.0, 89.0], [0.0, 100.0, 200.0, 300.0], [1.0, 1.5, 2.0, 3.0], 40.0, 5, 7)
    origins, directions = cameras.rays()
    centre = origins[:, 2, 3] + cameras.distance[:, None] * directions[:, 2, 3]
    torch.testing.assert_close(centre, torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4, 5, 7))


def test_poses_are_rotations_even_straight_above():
    cameras = orbit_cameras([0.0, 90.0, -90.0, 33.0], [10.0, 0.0, 0.0, 250.0], 1.5, 49.1, 4, 4)
    rotation = cameras.c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(4, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(4))


def test_image_border_spans_the_field_of_view():
    height = 400
    directions = orbit_cameras(0.0, 0.0, 1.5, 60.0, height, 2).rays()[1]
    # The border lies half a pixel outside the first centre; tan is linear along the image plane.
    tangent = (directions[0, 0, 0, 2] / -directions[0, 0, 0, 0]).item() / (1.0 - 1.0 / height)
    assert math.degrees(math.atan(tangent)) == pytest.approx(30.0, abs=1e-3)


def test_focal_length_is_a_true_pinhole():
    cameras = orbit_cameras(0.0, 0.0, 1.5, [49.1, 90.0], 256, 256)
    assert cameras.focal()[0].item() == pytest.approx(280.222, abs=1e-2)
    assert cameras.focal()[1].item() == pytest.approx(128.0, abs=1e-3)


def test_halving_the_tangent_zooms_by_two():
    wide = orbit_cameras(0.0, 0.0, 1.5, 60.0, 8, 8)
    half = math.degrees(2 * math.atan(math.tan(math.radians(30.0)) / 2))
    narrow = orbit_cameras(0.0, 0.0, 1.5, half, 4, 4)
    # The narrow view's pixels are the middle of the wide one, twice as large on the sensor of half the size.
    torch.testing.assert_close(narrow.rays()[1], wide.rays()[1][:, 2:6, 2:6], atol=1e-6, rtol=0)


def test_resized_keeps_the_view():
    cameras = orbit_cameras(10.0, 20.0, 1.5, 49.1, 64, 64)
    small = cameras.resized(16, 32)
    assert (small.height, small.width) == (16, 32)
    assert small.rays()[0].shape == (1, 16, 32, 3)
    corner = torch.nn.functional.avg_pool2d(cameras.rays()[1].permute(0, 3, 1, 2), 4)[0, :, 0, 0]
    torch.testing.assert_close(
        torch.nn.functional.normalize(corner, dim=0), cameras.resized(16, 16).rays()[1][0, 0, 0], atol=1e-3, rtol=0
    )


def test_indexing_and_joining_are_inverse():
    cameras = orbit_cameras([0.0, 10.0, 20.0], [0.0, 90.0, 180.0], 1.5, 49.1, 4, 4)
    assert len(cameras) == 3
    assert len(cameras[1]) == 1
    assert cameras[1].azimuth.item() == 90.0
    assert cameras[torch.tensor([2, 0])].elevation.tolist() == [20.0, 0.0]
    joined = Cameras.cat([cameras[:1], cameras[1:]])
    torch.testing.assert_close(joined.c2w, cameras.c2w)
    assert joined.light_positions is not None
    torch.testing.assert_close(joined.light_positions, cameras.positions)


def test_ray_noise_is_one_offset_per_call_and_seeded():
    camera = orbit_cameras(0.0, 0.0, 1.5, 49.1, 3, 3)
    origins, directions = camera.rays(0.01, torch.Generator().manual_seed(3))
    again, _ = camera.rays(0.01, torch.Generator().manual_seed(3))
    torch.testing.assert_close(origins, again)
    shift = origins - camera.rays()[0]
    torch.testing.assert_close(shift, shift[:1, :1, :1].expand_as(shift))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(1, 3, 3))


def test_turntable_starts_at_the_front_and_never_repeats():
    config = RandomCameraConfig(eval_elevation_deg=15.0, eval_fovy_deg=49.1)
    cameras = turntable(config, 4, 8, 8)
    assert cameras.azimuth.tolist() == [0.0, 90.0, 180.0, 270.0]
    assert cameras.elevation.tolist() == [15.0] * 4


def test_look_at_centres_another_point():
    centre = torch.tensor([[0.2, -0.3, 0.1]])
    c2w = look_at(torch.tensor([[1.0, 1.0, 1.0]]), centre, torch.tensor([[0.0, 0.0, 1.0]]))
    inside = torch.linalg.inv(c2w)[0] @ torch.cat([centre[0], torch.ones(1)])
    torch.testing.assert_close(inside[:2], torch.zeros(2), atol=1e-6, rtol=0)
    assert inside[2] < 0, "OpenGL cameras look along -z"
