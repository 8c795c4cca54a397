"""Identities of the diffusion arithmetic."""

import pytest
import torch
from released_sampler import denoise, euler_sample, quantise_sigma, sampling_sigmas, sigmas_from_alphas, x0_loss
from torch import Tensor

from nvsadapter_guidance.diffusion import (
    add_noise,
    draw_timesteps,
    guide,
    legacy_alphas_cumprod,
    sampling_timesteps,
    sds_gradient,
    sds_loss,
    shift_schedule,
    split_prediction,
    training_target,
)
from nvsadapter_guidance.errors import InputError

ALPHAS = legacy_alphas_cumprod()
TIMESTEPS = torch.tensor([20, 700])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sampling_timesteps_by_hand() -> None:
    assert sampling_timesteps(5).tolist() == [999, 799, 599, 399, 199]
    assert sampling_timesteps(50)[[0, 1, -1]].tolist() == [999, 979, 19]
    assert sampling_timesteps(1000).tolist() == list(range(999, -1, -1))
    for count in (0, 1001):
        with pytest.raises(InputError, match=str(count)):
            sampling_timesteps(count)


def test_sigma_table_ends() -> None:
    table = sigmas_from_alphas(ALPHAS)
    assert table[[0, -1]].tolist() == pytest.approx([0.0292, 14.6146], abs=1e-4)
    assert sampling_sigmas(ALPHAS, 5)[-1] == 0.0


def test_shift_multiplies_the_signal_to_noise_ratio() -> None:
    shifted = shift_schedule(ALPHAS, 0.5)
    torch.testing.assert_close(shifted / (1 - shifted), 0.25 * ALPHAS / (1 - ALPHAS))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_back_latents_and_noise(kind: str) -> None:
    latents, noise = draw(2, 3, 4, 5, 5), draw(2, 3, 4, 5, 5, seed=1)
    noisy = add_noise(latents, noise, TIMESTEPS, ALPHAS)
    target = training_target(latents, noise, TIMESTEPS, ALPHAS, kind)  # type: ignore[arg-type]
    clean, eps = split_prediction(target, noisy, TIMESTEPS, ALPHAS, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(clean, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eps, noise, atol=1e-5, rtol=1e-5)


def test_quantise_by_hand() -> None:
    level, index = quantise_sigma(torch.tensor([0.9, 2.6]), torch.tensor([0.5, 1.0, 3.0]))
    assert level.tolist() == [1.0, 3.0] and index.tolist() == [1, 2]


def test_guidance_scales() -> None:
    unconditional, conditional = torch.tensor(1.0), torch.tensor(3.0)
    assert [guide(unconditional, conditional, scale).item() for scale in (0.0, 1.0, 3.0)] == [1.0, 3.0, 7.0]


def exact_noise(x: Tensor, index: Tensor, clean: Tensor) -> Tensor:
    """The noise that an exact network finds when every image is `clean`."""
    alphas = ALPHAS[index].float().reshape(-1, 1, 1)
    return (x - alphas.sqrt() * clean) / (1 - alphas).sqrt()


def test_samplers_reach_the_only_image_there_is() -> None:
    clean, noise = draw(2, 3, 3), draw(2, 3, 3, seed=1)
    table, original = sigmas_from_alphas(ALPHAS), noise.clone()
    reached = euler_sample(
        lambda x, sigma: denoise(lambda z, t: exact_noise(z, t, clean), x, sigma, table),
        noise,
        sampling_sigmas(ALPHAS, 4),
    )
    torch.testing.assert_close(reached, clean, atol=1e-4, rtol=0.0)
    assert torch.equal(noise, original)


def test_weighted_error_of_latents_is_the_error_of_the_noise() -> None:
    clean, noise, sigma = draw(2, 3, 4), draw(2, 3, 4, seed=1), torch.tensor([0.5, 4.0])
    wrong = noise + 0.3
    predicted = clean + sigma[:, None, None] * (noise - wrong)
    torch.testing.assert_close(x0_loss(predicted, clean, sigma), torch.full((2,), 0.09))


def test_drawn_timesteps_cover_the_closed_range() -> None:
    drawn = draw_timesteps(500, 3, 6, torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sds_gradient_is_the_weighted_noise_error(kind: str) -> None:
    latents, noise = draw(2, 2, 3, 4, 4), draw(2, 2, 3, 4, 4, seed=1)
    predicted = draw(2, 2, 3, 4, 4, seed=2)
    noisy = add_noise(latents, noise, TIMESTEPS, ALPHAS)
    signal, deviation = (
        value.float()[:, None, None, None, None] for value in (ALPHAS[TIMESTEPS].sqrt(), (1 - ALPHAS[TIMESTEPS]).sqrt())
    )
    output = predicted if kind == "epsilon" else (predicted - deviation * noisy) / signal
    gradient = sds_gradient(latents, noise, TIMESTEPS, output, ALPHAS, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, deviation**2 * (predicted - noise), atol=1e-4, rtol=1e-4)
    clipped = sds_gradient(latents, noise, TIMESTEPS, output, ALPHAS, kind, max_norm=0.1)  # type: ignore[arg-type]
    assert clipped.abs().max().item() == pytest.approx(0.1)


def test_sds_gradient_survives_bad_predictions() -> None:
    latents = draw(2, 3)
    prediction = torch.full((2, 3), torch.nan)
    assert torch.equal(sds_gradient(latents, latents, TIMESTEPS, prediction, ALPHAS), torch.zeros(2, 3))


def test_surrogate_loss_has_the_stated_value_and_gradient() -> None:
    latents, gradient = draw(4, 2, 2).requires_grad_(True), draw(4, 2, 2, seed=1)
    loss = sds_loss(latents, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * gradient.square().sum().item() / 4)
    torch.testing.assert_close(latents.grad, gradient / 4)
