"""Score distillation on images: gradients, grouping, previews."""

import pytest
import torch
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.pipeline import Poses, guided_prediction

POSES = Poses(torch.arange(8) * 45.0, torch.full((8,), 10.0), torch.full((8,), 1.5))


@pytest.fixture(scope="module")
def guidance() -> ScoreDistillation:
    distillation = ScoreDistillation(tiny_nvs_model(), guidance_scale=3.0)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distillation.prepare(image, POSES[:1], torch.Generator().manual_seed(0))
    return distillation


def views(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_gradient_on_images_is_the_sds_gradient_through_the_encoder(guidance: ScoreDistillation) -> None:
    images = views(8).requires_grad_()
    result = guidance(images, POSES, (0.1, 0.9), torch.Generator().manual_seed(2))
    result.loss.backward()

    model, generator = guidance.model, torch.Generator().manual_seed(2)
    again = views(8).requires_grad_()
    latents = model.encode(again, generator).unflatten(0, (2, 4))
    timesteps = diffusion.draw_timesteps(2, 100, 900, generator)
    assert torch.equal(timesteps, result.timesteps)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = model.schedule.add_noise(latents.detach(), noise, timesteps)
    grouped = POSES[torch.arange(8).view(2, 4)]
    with torch.no_grad():
        prediction = guided_prediction(model, guidance.conditions, noisy, timesteps, grouped, 3.0, generator)
    _, predicted = model.schedule.split(noisy, prediction, timesteps)
    weight = (1 - model.schedule.alphas_cumprod[timesteps]).view(2, 1, 1, 1, 1)
    latents.backward(weight * (predicted - noise) / 8)
    assert torch.allclose(images.grad, again.grad, atol=1e-6)


def test_larger_images_are_resized_and_get_a_gradient(guidance: ScoreDistillation) -> None:
    images = torch.nn.functional.interpolate(views(4), scale_factor=2).requires_grad_()
    guidance(images, POSES[:4], (0.5, 0.5), torch.Generator().manual_seed(0)).loss.backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_clipping_bounds_the_gradient(guidance: ScoreDistillation) -> None:
    free = guidance(views(4), POSES[:4], (0.5, 0.5), torch.Generator().manual_seed(0))
    guidance.max_norm = 1e-3
    clipped = guidance(views(4), POSES[:4], (0.5, 0.5), torch.Generator().manual_seed(0))
    guidance.max_norm = None
    assert float(clipped.gradient_norm) <= 1e-3 * (4 * 4 * 8 * 8) ** 0.5 < float(free.gradient_norm)


def test_views_that_do_not_fill_groups_are_refused(guidance: ScoreDistillation) -> None:
    with pytest.raises(InputError, match="batch_size: 6 views.*multiple of 4"):
        guidance(views(6), POSES[:6], (0.1, 0.9), torch.Generator())


def test_previews_have_the_size_of_the_model(guidance: ScoreDistillation) -> None:
    shown = guidance.preview(views(4), POSES[:4], 0.5, torch.Generator().manual_seed(0))
    assert shown.shape == (4, 3, 32, 32) and shown.abs().max() <= 1
