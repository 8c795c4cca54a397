"""What docs/pose-convention.md derives, computed; and on the golden rays where they are present."""

import math
import re
import runpy
from collections.abc import Callable

import pytest
import torch
from golden_files import golden, golden_file, needs_golden
from tiny_nvs import tiny_nvs_config, tiny_nvs_model
from torch import Tensor

from nvsadapter_guidance.cameras import (
    PINHOLE,
    POSE_CONVENTIONS,
    RELEASED,
    RELEASED_SAMPLING,
    CameraConvention,
    look_at,
    relative_to_support,
    with_pose_convention,
)
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.rays import latent_rays, plucker_coordinates

AZIMUTH = torch.tensor([20.0, 50.0, 110.0, 200.0])
ELEVATION = torch.tensor([10.0, -5.0, 60.0, 0.0])
DISTANCE = torch.tensor([1.7, 1.5, 2.1, 1.9])
TOLERANCE = 2e-5


def computed(convention: CameraConvention) -> Tensor:
    return relative_to_support(look_at(AZIMUTH, ELEVATION, DISTANCE, convention))


def recorded(convention: CameraConvention) -> Tensor:
    """Relative poses of the released training code and of its sampling script."""
    return golden_file("rays")["train.rel_c2w" if convention is RELEASED else "sampling_script.rel_c2w"]


SOURCES = [
    pytest.param(computed, lambda: DISTANCE, id="computed"),
    pytest.param(
        recorded, lambda: golden_file("rays")["in.distance"].float(), id="golden", marks=[golden, needs_golden]
    ),
]


@pytest.mark.parametrize(("poses", "distances"), SOURCES)
def test_the_sign_cancels_in_rotations_and_stays_in_translations(
    poses: Callable[[CameraConvention], Tensor], distances: Callable[[], Tensor]
) -> None:
    training, script = poses(RELEASED), poses(RELEASED_SAMPLING)
    torch.testing.assert_close(training[:, :3, :3], script[:, :3, :3], atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(training[:, :3, 3], -script[:, :3, 3], atol=TOLERANCE, rtol=0.0)
    assert training[1:, :3, 3].norm(dim=-1).min() > 0.5


@pytest.mark.parametrize(("poses", "distances"), SOURCES)
def test_central_rays_meet_the_object_in_training_alone(
    poses: Callable[[CameraConvention], Tensor], distances: Callable[[], Tensor]
) -> None:
    radius = distances()
    support = radius[0].item()
    centre = torch.tensor([0.0, 0.0, support])
    training, script = poses(RELEASED), poses(RELEASED_SAMPLING)
    reached = training[:, :3, 3] + radius[:, None] * training[:, :3, 2]
    torch.testing.assert_close(reached, centre.expand_as(reached), atol=TOLERANCE, rtol=0.0)
    to_centre, direction = centre - script[:, :3, 3], script[:, :3, 2]
    miss = (to_centre - (to_centre * direction).sum(-1, keepdim=True) * direction).norm(dim=-1)
    sine = torch.linalg.cross(direction, direction[:1].expand_as(direction)).norm(dim=-1)
    torch.testing.assert_close(miss, 2.0 * support * sine, atol=TOLERANCE, rtol=0.0)


def test_all_moments_change_sign_and_no_direction() -> None:
    rays = [latent_rays(computed(c), 49.1, (32, 32), 8, c) for c in (RELEASED, RELEASED_SAMPLING)]
    (moment, direction), (other_moment, other_direction) = (plucker_coordinates(*pair) for pair in rays)
    torch.testing.assert_close(direction, other_direction, atol=TOLERANCE, rtol=0.0)
    torch.testing.assert_close(moment, -other_moment, atol=1e-4, rtol=0.0)
    assert moment[0].abs().max().item() < 1e-6  # the support view's


def test_the_example_of_the_page() -> None:
    """2.6 units at 60 degrees."""
    script = relative_to_support(look_at(torch.tensor([0.0, 60.0]), 0.0, 1.5, RELEASED_SAMPLING))[1]
    to_centre = torch.tensor([0.0, 0.0, 1.5]) - script[:3, 3]
    miss = torch.linalg.cross(to_centre, script[:3, 2]).norm().item()
    assert miss == pytest.approx(3.0 * math.sin(math.radians(60.0)), abs=1e-5) == pytest.approx(2.6, abs=0.01)


def test_names_lead_to_conventions() -> None:
    assert POSE_CONVENTIONS == ("training", "released-sampling")
    assert with_pose_convention(RELEASED, "training") is RELEASED
    assert with_pose_convention(PINHOLE, "training") is PINHOLE
    assert with_pose_convention(RELEASED, "released-sampling") == RELEASED_SAMPLING


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="'sampling' is unknown; use one of training, released-sampling"):
        with_pose_convention(RELEASED, "sampling")
    with pytest.raises(InputError, match="embedded model knows training alone"):
        with_pose_convention(PINHOLE, "released-sampling")


def test_a_model_s_ray_embedding_follows_its_convention() -> None:
    """The moments, which come first, change sign; the directions after them do not."""
    model = tiny_nvs_model(adapter={**tiny_nvs_config().adapter, "camera_convention": "released"})
    poses = (AZIMUTH[None], ELEVATION[None], DISTANCE[None])
    training = model.ray_embedding(*poses)
    model.convention = with_pose_convention(model.convention, "released-sampling")
    script = model.ray_embedding(*poses)
    torch.testing.assert_close(training[:, :, :3], -script[:, :, :3], atol=1e-4, rtol=0.0)
    directions = slice(3 * (1 + 2 * 2), None)
    torch.testing.assert_close(training[:, :, directions], script[:, :, directions], atol=1e-4, rtol=0.0)


def test_the_picture_is_what_its_script_draws(repository) -> None:
    drawing = runpy.run_path(str(repository / "scripts" / "draw_pose_convention.py"))["drawing"]
    kept = (repository / "docs" / "pictures" / "pose-convention.svg").read_text(encoding="utf-8")
    number = r"-?\d+\.\d"
    assert re.split(number, kept) == re.split(number, drawing())
    # Coordinates have one decimal, and rounding may fall either way.
    found, expected = (torch.tensor([float(n) for n in re.findall(number, text)]) for text in (kept, drawing()))
    torch.testing.assert_close(found, expected, atol=0.11, rtol=0.0)
