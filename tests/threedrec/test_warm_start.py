"""The warm start: where views are taken from, their silhouettes, whom to believe, and the fit itself."""

import math

import pytest
import torch
from spheres import SphereGuidance, render_spheres

from threedrec.cameras import orbit_cameras
from threedrec.checkpoint import step_generator
from threedrec.confidence import Confidence, RaySampler
from threedrec.config_schema import SystemConfig
from threedrec.errors import InputError
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, SolidBackground
from threedrec.image import SupportView
from threedrec.metrics import mask_iou, psnr
from threedrec.rendering import DiffusePointLight, VolumeRenderer
from threedrec.scene import Scene
from threedrec.steps import ViewFit
from threedrec.warm_start import ViewSet, WarmStartConfig, build_view_set, silhouettes, view_ring

REFERENCE = orbit_cameras(0.0, 0.0, 1.5, 49.1, 64, 64)


def test_rings_share_views_by_circumference_and_leave_out_the_reference():
    cameras = view_ring(WarmStartConfig(num_views=9, elevations=[0.0, 60.0]), REFERENCE, 32)
    # cos 60° = 1/2: one view each, and of the remaining seven two thirds and one third.
    assert cameras.elevation.tolist() == [0.0] * 6 + [60.0] * 3
    torch.testing.assert_close(cameras.azimuth[:6], torch.arange(1, 7) * 360.0 / 7)
    torch.testing.assert_close(cameras.azimuth[6:], torch.tensor([0.0, 120.0, 240.0]))
    assert (cameras.height, cameras.width) == (32, 32)
    torch.testing.assert_close(cameras.distance, torch.full((9,), 1.5))


def test_too_few_views_are_refused():
    with pytest.raises(InputError, match="1 views cannot fill 2 rings"):
        view_ring(WarmStartConfig(num_views=1, elevations=[0.0, 30.0]), REFERENCE, 32)


def test_silhouettes_fill_holes_and_drop_specks():
    rgb = torch.ones(1, 40, 40, 3)
    rgb[0, 5:25, 5:25] = 0.4  # an object
    rgb[0, 12:16, 12:16] = 1.0  # with a white patch
    rgb[0, 35:37, 35:37] = 0.0  # and a speck far away
    rgb[0, 30, 3] = 0.97  # and noise
    expected = torch.zeros(1, 40, 40, 1)
    expected[0, 5:25, 5:25] = 1.0
    torch.testing.assert_close(silhouettes(rgb), expected)


def test_prior_weights_fall_towards_the_back():
    cameras = orbit_cameras(0.0, [0.0, 90.0, 180.0], 1.5, 49.1, 8, 8)
    views = build_view_set(torch.ones(3, 8, 8, 3), cameras, REFERENCE, back_weight=0.4)
    torch.testing.assert_close(views.prior, torch.tensor([1.0, 0.7, 0.4]))


def test_confidence_by_hand():
    views = ViewSet(torch.zeros(3, 4, 4, 3), torch.ones(3, 4, 4, 1), REFERENCE, torch.ones(3))
    confidence = Confidence(views, tolerance=1.0, cells=1)
    assert confidence.weights().flatten().tolist() == [1.0, 1.0, 1.0]
    zero = torch.zeros(6, dtype=torch.long)
    confidence.update(torch.tensor([0, 0, 1, 1, 2, 2]), zero, zero, torch.tensor([0.1, 0.3, 0.2, 0.2, 0.6, 1.0]))
    # Residuals 0.2, 0.2, 0.8, median 0.2: (1 / (1 + 1))² = 1/4 and (1 / (1 + 16))², once as a part and once as a view.
    expected = torch.tensor([1 / 16, 1 / 16, 1 / 17**4])
    torch.testing.assert_close(confidence.weights().flatten(), expected)
    torch.testing.assert_close(confidence.weight(torch.tensor([2]), zero[:1], zero[:1]), expected[2:])
    # The running mean keeps nine tenths.
    confidence.update(torch.tensor([2]), zero[:1], zero[:1], torch.tensor([0.0]))
    torch.testing.assert_close(confidence.residual.flatten(), torch.tensor([0.2, 0.2, 0.72]))


def test_confidence_survives_a_checkpoint():
    views = ViewSet(torch.zeros(2, 8, 8, 3), torch.ones(2, 8, 8, 1), REFERENCE, torch.ones(2))
    first, second = Confidence(views, 2.0), Confidence(views, 2.0)
    at = torch.tensor([0, 1, 1]), torch.tensor([3, 7, 0]), torch.tensor([1, 2, 6])
    first.update(*at, torch.tensor([0.1, 0.5, 0.2]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weights(), second.weights())


def test_rays_are_drawn_where_the_object_is():
    mask = torch.zeros(2, 64, 64, 1)
    mask[1, 30:34, 30:34] = 1.0
    view, y, x = RaySampler(mask, foreground_share=0.75)(400, torch.Generator().manual_seed(0))
    near = (view == 1) & (y >= 26) & (y < 38) & (x >= 26) & (x < 38)
    assert 300 <= int(near.sum()) <= 320
    empty = RaySampler(torch.zeros(2, 64, 64, 1), 0.75)(10, torch.Generator().manual_seed(0))
    assert all(len(part) == 10 for part in empty)


def small_scene() -> Scene:
    encoding = EncodingConfig(n_levels=6, log2_hashmap_size=12, base_resolution=8, per_level_scale=1.45)
    system = SystemConfig(
        geometry=ImplicitVolume.Config(
            normal_type="analytic",
            pos_encoding_config=encoding,
            mlp_network_config=MLPConfig(n_neurons=16, n_hidden_layers=1),
        ),
        material=DiffusePointLight.Config(ambient_only_steps=10**6),
        background=SolidBackground.Config(),
        renderer=VolumeRenderer.Config(num_samples_per_ray=64, occupancy_resolution=32, occupancy_warmup_steps=32),
    )
    return Scene(system, 0)


def fitted(guidance: SphereGuidance, steps: int = 60) -> tuple[Scene, Confidence]:
    config = WarmStartConfig(num_views=12, rays_per_step=768, lr=0.05)
    scene, cameras = small_scene(), view_ring(config, REFERENCE, 64)
    rgb, mask = render_spheres(REFERENCE)
    support = SupportView(rgb[0], mask[0], None, None, REFERENCE, "spheres.png")
    sampled = guidance.sample_views(cameras, torch.Generator().manual_seed(0), 1, 1.0)
    views = build_view_set(sampled, cameras.resized(*sampled.shape[1:3]), REFERENCE, config.back_weight)
    confidence = Confidence(views, config.tolerance)
    fit = ViewFit(scene, support, views, confidence, config)
    optimizer = torch.optim.Adam(scene.parameters(), lr=config.lr, eps=1e-15)
    for step in range(steps):
        generator = step_generator(0, "fit", step, "cpu")
        scene.renderer.update(step, generator)
        result = fit((step + 1) / steps, generator)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    return scene, confidence


@pytest.mark.parametrize(("wrong", "noise"), [(0, 0.0), (2, 0.03)])
def test_the_fit_recovers_the_object_even_from_views_of_which_some_are_wrong(wrong, noise):
    scene, confidence = fitted(SphereGuidance(SphereGuidance.Config(wrong_views=wrong, noise=noise)))
    held_out = orbit_cameras(15.0, [10.0, 100.0, 190.0, 280.0], 1.5, 49.1, 48, 48)
    seen, (rgb, mask) = scene.views(held_out, normals=False), render_spheres(held_out)
    assert float(psnr(seen["rgb"], rgb)) > 20.0
    assert float(mask_iou(seen["opacity"], mask)) > 0.85
    trust = confidence.weights().mean(dim=(1, 2))
    wrong_ones = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:wrong]
    assert all(float(trust[index]) < 0.3 * float(trust.median()) for index in wrong_ones)
    assert math.isfinite(float(trust.min()))
