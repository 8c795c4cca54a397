"""Sampling: overlapping groups, cached against exact conditions, determinism, batches of any length."""

import pytest
import torch
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, guided_prediction, predict_clean, prepare
from nvsadapter_guidance.sampling import sample, view_groups

SUPPORT = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))


@pytest.fixture(scope="module")
def model() -> NVSModel:
    return tiny_nvs_model()


def ring(count: int) -> Poses:
    return Poses(360 * torch.arange(count) / count, torch.zeros(count), torch.full((count,), 1.5))


def image(model: NVSModel) -> torch.Tensor:
    size = model.config.image_size
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize("count", [4, 8, 12, 24])
def test_every_step_uses_every_view_once(count: int, rotating: bool) -> None:
    for step in range(6):
        assert sorted(view_groups(count, 4, step, rotating).flatten().tolist()) == list(range(count))


def test_groups_connect_all_views_within_three_steps() -> None:
    linked = {0}
    for _ in range(3):
        for step in range(3):
            for group in view_groups(24, 4, step, rotating=True).tolist():
                if linked & set(group):
                    linked |= set(group)
    assert linked == set(range(24))


def test_cached_conditions_equal_exact_ones(model: NVSModel) -> None:
    conditions = prepare(model, image(model), SUPPORT, torch.Generator().manual_seed(0))
    noisy = torch.randn(2, 4, *conditions.latents.shape[2:], generator=torch.Generator().manual_seed(1))
    timesteps, poses = torch.tensor([300, 700]), ring(8)[torch.arange(8).view(2, 4)]
    with torch.no_grad():
        cached = guided_prediction(model, conditions, noisy, timesteps, poses, 2.0, torch.Generator())
        conditions.conditional = conditions.unconditional = None
        exact = guided_prediction(model, conditions, noisy, timesteps, poses, 2.0, torch.Generator())
    assert torch.allclose(cached, exact, atol=1e-5)


def test_guidance_scale_one_is_the_conditional_prediction(model: NVSModel) -> None:
    conditions = prepare(model, image(model), SUPPORT, torch.Generator().manual_seed(0))
    noisy = torch.randn(1, 4, *conditions.latents.shape[2:], generator=torch.Generator().manual_seed(1))
    arguments = (model, conditions, noisy, torch.tensor([300]), ring(4)[torch.arange(4).view(1, 4)])
    with torch.no_grad():
        one = guided_prediction(*arguments, 1.0, torch.Generator())
        near_one = guided_prediction(*arguments, 1.0 + 1e-6, torch.Generator())
    assert torch.allclose(one, near_one, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_any_number_of_views_is_sampled_deterministically(model: NVSModel, count: int) -> None:
    steps: list[int] = []
    views = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        conditions = prepare(model, image(model), SUPPORT, generator)
        views.append(sample(model, conditions, ring(count), generator, 2, on_step=steps.append))
    size = model.config.image_size
    assert views[0].shape == (count, 3, size, size) and views[0].abs().max() <= 1
    assert torch.equal(views[0], views[1])
    assert steps == [1, 2, 1, 2]


def test_one_step_denoising_at_no_noise_returns_the_autoencoded_image(model: NVSModel) -> None:
    generator = torch.Generator().manual_seed(0)
    conditions = prepare(model, image(model), SUPPORT, generator)
    images = image(model).expand(4, -1, -1, -1)
    clean = predict_clean(model, conditions, images, ring(4), 1e-4, generator, 2.0)
    with torch.no_grad():
        expected = model.decode(model.encode(images))
    assert (clean - expected).abs().mean() < 0.05


def test_no_views_is_an_error(model: NVSModel) -> None:
    conditions = prepare(model, image(model), SUPPORT, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="at least one view"):
        sample(model, conditions, ring(4)[:0], torch.Generator(), 2)
