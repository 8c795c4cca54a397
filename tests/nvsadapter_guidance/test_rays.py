"""Rays go through the pixels they belong to; embeddings have the stated order, size and precision."""

import math

import pytest
import torch

from nvsadapter_guidance.cameras import PINHOLE, RELEASED, CameraConvention, look_at, relative_to_support
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.rays import RayEmbedding, frequency_encoding, latent_rays, plucker_coordinates

SIZE = (64, 64)


def pixel_of(point: torch.Tensor, azimuth: float, elevation: float) -> tuple[float, float]:
    """(x, y) in pixels of a world point in a true pinhole camera of 90 degrees at distance 2."""
    c2w = look_at(azimuth, elevation, 2.0, PINHOLE)
    x, y, z = (torch.linalg.inv(c2w) @ torch.cat((point, torch.ones(1))))[:3].tolist()
    return 32.0 + 32.0 * x / z, 32.0 + 32.0 * y / z


def distance_to_ray(point: torch.Tensor, rays_o: torch.Tensor, rays_d: torch.Tensor) -> float:
    direction = rays_d / rays_d.norm()
    offset = point - rays_o
    return (offset - (offset @ direction) * direction).norm().item()


@pytest.mark.parametrize("azimuth, elevation", [(0.0, 0.0), (75.0, 30.0), (200.0, -10.0)])
def test_the_ray_of_a_projected_point_meets_the_point(azimuth: float, elevation: float) -> None:
    point = torch.tensor([0.11, -0.23, 0.17])
    x, y = pixel_of(point, azimuth, elevation)
    rays_o, rays_d = latent_rays(look_at(azimuth, elevation, 2.0, PINHOLE), 90.0, SIZE, 1, PINHOLE)
    column, row = math.floor(x), math.floor(y)
    # Half a pixel at distance 2 is 1/32 of a unit wide.
    assert distance_to_ray(point, rays_o[row, column], rays_d[row, column]) < 2.0 / 32.0


def test_released_axes_mirror_x() -> None:
    mirrored = CameraConvention("pinhole", "released")
    pinhole = latent_rays(look_at(40.0, 10.0, 2.0, PINHOLE), 49.1, SIZE, 8, PINHOLE)[1]
    released = latent_rays(look_at(40.0, 10.0, 2.0, mirrored), 49.1, SIZE, 8, mirrored)[1]
    torch.testing.assert_close(released, pinhole.flip(1), atol=1e-5, rtol=0.0)


def test_stride_averages_rays() -> None:
    c2w = look_at(20.0, 10.0, 1.5)
    fine, coarse = (latent_rays(c2w, 49.1, SIZE, stride)[1] for stride in (1, 8))
    pooled = fine.unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean(dim=(1, 3))
    torch.testing.assert_close(coarse, pooled)


def test_central_rays_meet_the_object_in_the_support_frame() -> None:
    poses = relative_to_support(look_at(torch.tensor([0.0, 50.0, 130.0]), torch.tensor([0.0, 30.0, -5.0]), 1.5))
    centre = torch.tensor([0.0, 0.0, 1.5])
    for pose in poses:
        assert distance_to_ray(centre, pose[:3, 3], pose[:3, 2]) < 1e-5


def test_plucker_moment_does_not_depend_on_the_point_of_the_ray() -> None:
    rays_o, rays_d = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 2.0])
    moment, direction = plucker_coordinates(rays_o, rays_d)
    torch.testing.assert_close(moment, torch.tensor([2.0, -1.0, 0.0]))
    torch.testing.assert_close(direction, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(plucker_coordinates(rays_o + 5 * rays_d, rays_d)[0], moment)


def test_frequency_encoding_by_hand() -> None:
    encoded = frequency_encoding(torch.tensor([0.5, 1.0]), 2)
    sines = [math.sin(0.5), math.sin(1.0), math.sin(1.0), math.sin(2.0)]
    cosines = [math.cos(0.5), math.cos(1.0), math.cos(1.0), math.cos(2.0)]
    torch.testing.assert_close(encoded, torch.tensor([0.5, 1.0, *sines, *cosines]))


@pytest.mark.parametrize("kind, channels", [("plucker", 144), ("rayo_rayd", 144), ("extrinsic", 496)])
def test_channel_counts(kind: str, channels: int) -> None:
    embedding = RayEmbedding(kind)  # type: ignore[arg-type]
    poses = look_at(torch.tensor([[0.0, 30.0, 60.0]]), 10.0, 1.5)
    encoded = embedding(poses, 49.1, (64, 48), 8)
    assert embedding.channels == channels
    assert encoded.shape == (1, 3, channels, 8, 6)


def test_embedding_ignores_autocast() -> None:
    poses, embedding = look_at(torch.tensor([0.0, 30.0]), 10.0, 1.5, RELEASED), RayEmbedding()
    plain = embedding(poses, 49.1, SIZE, 8, RELEASED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = embedding(poses, 49.1, SIZE, 8, RELEASED)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_support_view_can_be_given_apart() -> None:
    support, views = look_at(10.0, 5.0, 1.5), look_at(torch.tensor([50.0, 80.0]), 20.0, 1.5)
    embedding = RayEmbedding()
    together = embedding(torch.cat((support[None], views)), 49.1, SIZE)
    torch.testing.assert_close(embedding(views, 49.1, SIZE, support_c2w=support), together[1:])


def test_bad_embedding_options() -> None:
    with pytest.raises(InputError, match="spherical"):
        RayEmbedding("spherical")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="degrees"):
        RayEmbedding(degrees=(3, -1))
