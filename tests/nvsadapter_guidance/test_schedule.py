"""The schedule of a model: terminal noise, inverses, spacing."""

import math

import pytest
import torch

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.schedule import NoiseSchedule


def test_cosine_ends_in_pure_noise_and_shift_multiplies_the_ratio() -> None:
    plain, shifted = NoiseSchedule(shift=1.0).alphas_cumprod, NoiseSchedule(shift=0.5).alphas_cumprod
    assert plain[-1] == 0.0 and shifted[-1] == 0.0
    assert plain[499] == pytest.approx(math.cos(0.25 * math.pi) ** 2, abs=1e-6)
    # Where almost no noise is left, float32 has few digits of 1 - alphas_cumprod.
    ratio = (shifted / (1 - shifted) / (plain / (1 - plain)))[20:-1]
    assert torch.allclose(ratio, torch.full_like(ratio, 0.25), rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_split_inverts_the_target(prediction_type: str) -> None:
    schedule = NoiseSchedule("scaled_linear", 1.0, prediction_type)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 2, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 400, 900])
    noisy = schedule.add_noise(clean, noise, timesteps)
    found, found_noise = schedule.split(noisy, schedule.target(clean, noise, timesteps), timesteps)
    assert torch.allclose(found, clean, atol=1e-4) and torch.allclose(found_noise, noise, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "scaled_linear"])
def test_betas_multiply_up_to_the_table(kind: str) -> None:
    schedule = NoiseSchedule(kind, 0.5)
    rebuilt = torch.cumprod(1.0 - schedule.betas(), dim=0)
    assert torch.allclose(rebuilt.float(), schedule.alphas_cumprod, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("key", ["kind", "prediction_type"])
def test_unknown_choices_are_named(key: str) -> None:
    with pytest.raises(InputError, match=f"schedule.{key}: 'linear'"):
        NoiseSchedule(**{key: "linear"})
