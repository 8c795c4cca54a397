"""Released weights see fresh noise where unconditional samples lack a support view; what stays the same is kept."""

import pytest
import torch
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, SupportConditions, guided_prediction, prepare

SUPPORT = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
GROUPS, VIEWS = 3, 4


@pytest.fixture(scope="module")
def model() -> NVSModel:
    return tiny_nvs_model(unconditional_support="noise")


def conditions_of(model: NVSModel) -> SupportConditions:
    size = model.config.image_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return prepare(model, image, SUPPORT, torch.Generator().manual_seed(0))


def poses() -> Poses:
    azimuth = torch.linspace(-150, 150, GROUPS * VIEWS).view(GROUPS, VIEWS)
    return Poses(azimuth, torch.zeros_like(azimuth), torch.full_like(azimuth, 1.5))


@torch.no_grad()
def predict(model: NVSModel, conditions: SupportConditions, scale: float, seed: int = 5) -> torch.Tensor:
    noisy = torch.randn(GROUPS, VIEWS, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([100, 500, 900])
    generator = torch.Generator().manual_seed(seed)
    return guided_prediction(model, conditions, noisy, timesteps, poses(), scale, generator)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_encoding_the_noise_alone_equals_the_exact_path_with_the_same_noise(model: NVSModel, scale: float) -> None:
    conditions = conditions_of(model)
    assert conditions.conditional is not None and conditions.unconditional is None
    lean = predict(model, conditions, scale)
    conditions.conditional = None
    torch.testing.assert_close(lean, predict(model, conditions, scale), atol=1e-5, rtol=1e-5)


def test_noise_is_drawn_anew_at_every_call_for_every_group(model: NVSModel) -> None:
    conditions = conditions_of(model)
    assert (predict(model, conditions, 3.0, 5) - predict(model, conditions, 3.0, 6)).abs().max() > 1e-4
    drawn = model.unconditional_support_latents(torch.zeros(2, 1, 4, 8, 8), torch.Generator().manual_seed(0))
    assert not torch.equal(drawn[0], drawn[1])


def test_only_the_noise_is_encoded_again(model: NVSModel) -> None:
    conditions, rows = conditions_of(model), []
    hook = model.network.unet.time_embedding.register_forward_hook(
        lambda module, inputs, output: rows.append(len(inputs[0]))
    )
    predict(model, conditions, 3.0)
    predict(model, conditions, 1.0)
    hook.remove()
    assert rows == [GROUPS + 2 * GROUPS * VIEWS, GROUPS * VIEWS]


def test_a_seed_gives_the_same_noise_in_every_precision(model: NVSModel) -> None:
    drawn = [
        model.unconditional_support_latents(
            torch.zeros(1, 1, 4, 8, 8, dtype=dtype), torch.Generator().manual_seed(0)
        ).float()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    torch.testing.assert_close(drawn[0], drawn[1], atol=0.02, rtol=0.01)


def test_score_distillation_is_the_same_with_and_without_the_kept_support(model: NVSModel) -> None:
    gradients = []
    images = torch.rand(VIEWS, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for keep in (True, False):
        guidance = ScoreDistillation(model)
        guidance.conditions = conditions_of(model)
        if not keep:
            guidance.conditions.conditional = None
        views = images.clone().requires_grad_()
        around = poses()[0]
        guidance(views, around, (0.5, 0.5), torch.Generator().manual_seed(4)).loss.backward()
        assert views.grad is not None
        gradients.append(views.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)
