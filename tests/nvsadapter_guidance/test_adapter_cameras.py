"""Axes, focal lengths and relative poses of the adapter's camera conventions."""

import math

import pytest
import torch

from nvsadapter_guidance.cameras import (
    CONVENTIONS,
    PINHOLE,
    RELEASED,
    RELEASED_SAMPLING,
    CameraConvention,
    camera_convention,
    focal_length,
    from_opengl,
    intrinsic_matrix,
    look_at,
    relative_to_support,
)
from nvsadapter_guidance.errors import InputError

FOV_DEG = 49.1


def test_front_camera_by_hand() -> None:
    """At azimuth 0 the camera stands on +x; image right is +y, up is +z, forward is -x."""
    c2w = look_at(0.0, 0.0, 1.5, PINHOLE)
    expected = torch.tensor([[0.0, 0, -1, 1.5], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(c2w, expected)


def test_position_by_hand() -> None:
    position = look_at(90.0, 30.0, 2.0)[:3, 3]
    torch.testing.assert_close(position, torch.tensor([0.0, 2 * math.cos(math.pi / 6), 1.0]))


def test_opencv_rotations_are_exact_even_at_the_pole() -> None:
    rotation = look_at(torch.tensor([0.0, 77.0, 200.0]), torch.tensor([90.0, -90.0, 12.0]), 1.5)[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(3))


def test_released_rotation_is_minus_the_opengl_rotation() -> None:
    minus, plus = look_at(40.0, 20.0, 1.5, RELEASED), look_at(40.0, 20.0, 1.5, RELEASED_SAMPLING)
    torch.testing.assert_close(minus[:3, :3], -plus[:3, :3])
    torch.testing.assert_close(minus[:3, 3], plus[:3, 3])
    assert torch.linalg.det(minus[:3, :3]).item() == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_from_opengl_agrees_with_look_at(name: str) -> None:
    opengl = look_at(40.0, 20.0, 1.5, RELEASED_SAMPLING)
    torch.testing.assert_close(
        from_opengl(opengl, CONVENTIONS[name]), look_at(40.0, 20.0, 1.5, CONVENTIONS[name]), atol=5e-6, rtol=0.0
    )


def test_support_pose_is_the_identity() -> None:
    relative = relative_to_support(look_at(torch.tensor([30.0, 90.0]), 10.0, 1.5))
    torch.testing.assert_close(relative[0], torch.eye(4))


def test_relative_translation_changes_sign_in_the_sampling_convention() -> None:
    azimuth = torch.tensor([0.0, 60.0])
    ours, theirs = (relative_to_support(look_at(azimuth, 10.0, 1.5, c))[1] for c in (RELEASED, RELEASED_SAMPLING))
    torch.testing.assert_close(ours[:3, :3], theirs[:3, :3], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(ours[:3, 3], -theirs[:3, 3], atol=1e-5, rtol=0.0)


def test_focal_lengths_by_hand() -> None:
    assert focal_length(FOV_DEG, 256, RELEASED) == pytest.approx(110.877, abs=1e-3)
    assert focal_length(FOV_DEG, 256, PINHOLE) == pytest.approx(280.222, abs=1e-3)
    assert intrinsic_matrix(90.0, 20, 10, PINHOLE).tolist()[:2] == [
        pytest.approx([5.0, 0.0, 5.0, 0.0]),
        pytest.approx([0.0, 10.0, 10.0, 0.0]),
    ]


@pytest.mark.parametrize("fields", [{"focal": "fisheye"}, {"axes": "blender"}])
def test_unknown_convention_fields_are_named(fields: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(fields.values()))):
        CameraConvention(**fields)  # type: ignore[arg-type]


def test_unknown_convention_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="pinhole"):
        camera_convention("pinhol")
