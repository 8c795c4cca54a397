"""Random cameras: stages, ranges, distributions, lights, seeds and refused configurations."""

import pytest
import torch
from torch.nn import functional

from threedrec.camera_sampling import RandomCameraConfig, progressive_ranges, sample_elevations, sample_lights
from threedrec.cameras import RandomCameraSampler
from threedrec.errors import InputError

STILL = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_size_follows_the_milestones():
    config = RandomCameraConfig(
        height=[64, 96, 256], width=[64, 80, 256], batch_size=[16, 12, 8], resolution_milestones=[2000, 5000]
    )
    sampler = RandomCameraSampler(config)
    assert sampler.size_at(0) == (64, 64, 16)
    assert sampler.size_at(1999) == (64, 64, 16)
    assert sampler.size_at(2000) == (96, 80, 12)
    assert sampler.size_at(9999) == (256, 256, 8)
    assert len(sampler(2000, seeded())) == 12


def test_same_seed_same_cameras():
    sampler = RandomCameraSampler(RandomCameraConfig(batch_size=5))
    first, second = sampler(7, seeded(1)), sampler(7, seeded(1))
    torch.testing.assert_close(first.c2w, second.c2w)
    torch.testing.assert_close(first.light_positions, second.light_positions)
    assert not torch.equal(first.c2w, sampler(7, seeded(2)).c2w)


def test_ranges_hold_for_many_draws():
    config = RandomCameraConfig(
        batch_size=400,
        elevation_range=(-10.0, 80.0),
        azimuth_range=(-30.0, 90.0),
        camera_distance_range=(1.2, 1.4),
        fovy_range=(40.0, 45.0),
        **STILL,
    )
    sampler, generator = RandomCameraSampler(config), seeded()
    for step in range(1, 5):
        cameras = sampler(step, generator)
        assert -10.0 <= cameras.elevation.min() <= cameras.elevation.max() <= 80.0
        assert -30.0 <= cameras.azimuth.min() <= cameras.azimuth.max() <= 90.0
        assert 1.2 <= cameras.distance.min() <= cameras.distance.max() <= 1.4
        assert 40.0 <= cameras.fovy.min() <= cameras.fovy.max() <= 45.0
        torch.testing.assert_close(cameras.positions.norm(dim=-1), cameras.distance)


def test_elevation_mixes_uniform_angle_and_uniform_sphere():
    # Seeds decide the coin; over the full range the two laws differ in the mean of sin^2: 1/2 against 1/3.
    means = {round(sample_elevations(20000, (-90.0, 90.0), seeded(seed)).deg2rad().sin().square().mean().item(), 1)
             for seed in range(12)}  # fmt: skip
    assert means == {0.5, 0.3}


def test_stratified_azimuths_fill_every_part():
    config = RandomCameraConfig(batch_size=8, batch_uniform_azimuth=True, azimuth_range=(-180.0, 180.0))
    azimuth = RandomCameraSampler(config)(1, seeded()).azimuth
    assert ((azimuth + 180.0) / 45.0).floor().tolist() == list(range(8))


def test_progressive_ranges_grow_from_the_evaluation_view():
    config = RandomCameraConfig(elevation_range=(-10.0, 80.0), eval_elevation_deg=15.0, progressive_until=99)
    assert progressive_ranges(config, 0) == ((15.0, 15.0), (0.0, 0.0))
    elevation, azimuth = progressive_ranges(config, 50)
    assert elevation == pytest.approx((2.5, 47.5))
    assert azimuth == pytest.approx((-90.0, 90.0))
    assert progressive_ranges(config, 100) == ((-10.0, 80.0), (-180.0, 180.0))


def test_without_progression_only_step_zero_looks_from_the_evaluation_view():
    config = RandomCameraConfig(batch_size=4, eval_elevation_deg=15.0, **STILL)
    cameras = RandomCameraSampler(config)(0, seeded())
    torch.testing.assert_close(cameras.azimuth, torch.zeros(4))
    assert progressive_ranges(config, 1) == (config.elevation_range, config.azimuth_range)


def test_perturbations_have_the_asked_size():
    config = RandomCameraConfig(batch_size=2000, camera_perturb=0.1, center_perturb=0.0, up_perturb=0.0)
    cameras = RandomCameraSampler(config)(1, seeded())
    ideal = RandomCameraSampler(RandomCameraConfig(batch_size=2000, **STILL))(1, seeded())
    offset = cameras.positions - ideal.positions
    assert offset.abs().max() <= 0.1
    assert offset.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("strategy", ["dreamfusion", "magic3d", "headlight"])
def test_lights_stay_at_their_distance_and_near_the_camera(strategy: str):
    config = RandomCameraConfig(
        light_sample_strategy=strategy, light_distance_range=(7.5, 10.0), light_position_perturb=0.1
    )
    positions = functional.normalize(torch.randn(500, 3, generator=seeded(5)), dim=-1) * 1.5
    lights = sample_lights(positions, config, seeded())
    assert 7.5 - 1e-4 <= lights.norm(dim=-1).min() <= lights.norm(dim=-1).max() <= 10.0 + 1e-4
    cosine = functional.cosine_similarity(lights, positions, dim=-1)
    assert cosine.min() >= {"dreamfusion": 0.85, "magic3d": 0.5 - 1e-4, "headlight": 1.0 - 1e-5}[strategy]


def test_a_single_number_stands_for_all_stages():
    config = RandomCameraConfig(height=[64, 128], width=[64, 128], batch_size=4, resolution_milestones=[5])
    assert config.sizes() == ([64, 128], [64, 128], [4, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": [64, 128], "width": [64, 128, 256], "resolution_milestones": [5, 9]}, "one length"),
        ({"height": [8, 8], "width": [8, 8], "batch_size": [1, 1]}, "resolution_milestones"),
        ({"light_sample_strategy": "sun"}, "light_sample_strategy"),
        ({"elevation_range": (50.0, 10.0)}, "elevation_range"),
        ({"fovy_range": (0.0, 40.0)}, "fovy_range"),
        ({"height": 0}, "at least 1"),
    ],
)
def test_impossible_configurations_name_their_key(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        RandomCameraConfig(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("lights", ["dreamfusion", "magic3d", "headlight"])
def test_to_draw_cameras_never_waits_for_the_device(lights):
    sampler = RandomCameraSampler(RandomCameraConfig(batch_size=4, light_sample_strategy=lights))
    generator = torch.Generator("cuda").manual_seed(0)
    sampler(0, generator).rays()  # what is loaded at its first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        cameras = sampler(1, generator)
        rays = cameras.rays()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cameras.c2w.is_cuda and rays[1].isfinite().all()
