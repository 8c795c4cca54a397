"""Memory modes: less at a time, the same result."""

from types import SimpleNamespace

import pytest
import torch
from tiny_nvs import tiny_nvs_model
from torch.autograd.graph import saved_tensors_hooks

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.guidance import Distillation, ScoreDistillation
from nvsadapter_guidance.memory import PLANS, MemoryPlan, memory_plan
from nvsadapter_guidance.pipeline import Poses

VIEWS = 12
POSES = Poses(torch.arange(VIEWS) * 30.0, torch.full((VIEWS,), 10.0), torch.full((VIEWS,), 1.5))
PIXELS = 32 * 32
LEAN = MemoryPlan(pixels_per_call=PIXELS, groups_per_call=1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def images() -> torch.Tensor:
    return torch.rand(VIEWS, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def distil(plan: MemoryPlan, **options: str) -> tuple[Distillation, torch.Tensor, list[int]]:
    """The result of one call, its gradient on images, and the number of images in every pass through the encoder."""
    guidance = ScoreDistillation(tiny_nvs_model(**options), memory=plan)
    guidance.prepare(images()[:1], POSES[:1], torch.Generator().manual_seed(0))
    passes: list[int] = []
    guidance.model.vae.encoder.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    views = images().requires_grad_()
    result = guidance(views, POSES, (0.1, 0.9), torch.Generator().manual_seed(2))
    result.loss.backward()
    assert views.grad is not None
    return result, views.grad, passes


@pytest.mark.parametrize("unconditional", ["zeros", "noise"])
@pytest.mark.parametrize("plan", [LEAN, MemoryPlan(5 * PIXELS, 2), PLANS["normal"], PLANS["low"]])
def test_every_plan_gives_the_gradient_of_one_big_call(plan: MemoryPlan, unconditional: str) -> None:
    plain, expected, _ = distil(MemoryPlan(), unconditional_support=unconditional)
    lean, found, _ = distil(plan, unconditional_support=unconditional)
    assert torch.equal(plain.timesteps, lean.timesteps)
    torch.testing.assert_close(lean.gradient, plain.gradient, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_images_pass_through_the_encoder_in_parts_and_again_for_the_backward_pass() -> None:
    assert distil(MemoryPlan())[2] == [VIEWS]
    assert distil(MemoryPlan(5 * PIXELS))[2] == [5, 5, 2, 2, 5, 5]
    assert distil(MemoryPlan(1))[2] == [1] * 2 * VIEWS


def test_no_activation_of_the_encoder_is_kept_between_the_parts() -> None:
    kept: dict[bool, int] = {}
    for lean in (True, False):
        model = tiny_nvs_model()
        model.pixels_per_call = PIXELS if lean else None
        sizes: list[int] = []

        def remember(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(remember, lambda tensor: tensor):
            model.encode(images().requires_grad_(), torch.Generator().manual_seed(0))
        kept[lean] = sum(sizes)
    assert kept[True] <= 4 * VIEWS * 3 * PIXELS < kept[False]


def test_decoding_in_parts_gives_the_same_images() -> None:
    model = tiny_nvs_model()
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    passes: list[int] = []
    model.vae.decoder.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    whole = model.decode(latents)
    model.pixels_per_call = 2 * PIXELS
    torch.testing.assert_close(model.decode(latents), whole, atol=1e-5, rtol=1e-5)
    assert passes == [5, 2, 2, 1]


def test_previews_agree_too() -> None:
    shown = []
    for plan in (MemoryPlan(), LEAN):
        guidance = ScoreDistillation(tiny_nvs_model(), memory=plan)
        guidance.prepare(images()[:1], POSES[:1], torch.Generator().manual_seed(0))
        shown.append(guidance.preview(images(), POSES, 0.5, torch.Generator().manual_seed(3)))
    torch.testing.assert_close(shown[0], shown[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gigabytes", "mode"), [(8, "low"), (12, "low"), (16, "normal"), (141, "normal")])
def test_auto_goes_by_the_memory_of_the_device(gigabytes: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert memory_plan("auto", CUDA) == PLANS[mode]
    assert memory_plan("low", CUDA) == PLANS["low"] and memory_plan("normal", CUDA) == PLANS["normal"]
    assert memory_plan("auto", CPU) == PLANS["normal"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="system.guidance.memory: 'tiny' is unknown; use one of auto, normal, low"):
        memory_plan("tiny", CPU)


@pytest.mark.gpu
def test_the_image_encoder_is_on_the_gpu_only_while_a_view_is_prepared() -> None:
    guidance = ScoreDistillation(tiny_nvs_model().to(CUDA), memory=PLANS["normal"])
    poses = Poses(*(value[:1].to(CUDA) for value in (POSES.azimuth, POSES.elevation, POSES.distance)))
    tokens = []
    for _ in range(2):
        guidance.prepare(images()[:1].to(CUDA), poses, torch.Generator(CUDA).manual_seed(0))
        assert guidance.conditions is not None
        tokens.append(guidance.conditions.image_context)
        assert next(guidance.model.image_encoder.parameters()).device.type == "cpu"
    assert tokens[0].is_cuda and torch.equal(*tokens)
