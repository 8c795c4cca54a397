"""Score distillation in half precision: what stays in float32, and how near the gradient is to that of float32."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_nvs import tiny_nvs_model
from torch.nn import functional

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.full_size import full_size_config, random_model
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import PLANS
from nvsadapter_guidance.model import NVSModel, NVSModelConfig
from nvsadapter_guidance.pipeline import Poses, guided_prediction

HALVES = [torch.bfloat16, torch.float16]


def prepared(
    model: NVSModel, views: int = 4, encoder: torch.dtype = torch.float32
) -> tuple[ScoreDistillation, torch.Tensor, Poses]:
    """Guidance with smooth random views and their poses."""
    device, size = model.device, model.config.image_size
    guidance = ScoreDistillation(model, memory=PLANS["normal"], encoder_dtype=encoder)
    coarse = torch.rand(views, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = functional.interpolate(coarse.to(device), (size, size), mode="bilinear")
    azimuth = torch.linspace(0, 270, views, device=device)
    poses = Poses(azimuth, torch.zeros_like(azimuth), torch.full_like(azimuth, 1.5))
    guidance.prepare(images[:1], poses[:1], torch.Generator(device).manual_seed(0))
    return guidance, images.requires_grad_(), poses


def gradients(
    config: NVSModelConfig,
    device: str,
    dtype: torch.dtype,
    shares: tuple[float, ...],
    encoder: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gradients on images at several noise levels, one row each, on the CPU."""
    guidance, images, poses = prepared(random_model(config, device).to(dtype), encoder=encoder)
    rows = []
    for share in shares:
        result = guidance(images, poses, (share, share), torch.Generator(device).manual_seed(1))
        rows.append(torch.autograd.grad(result.loss, images)[0].flatten().double().cpu())
    return torch.stack(rows)


def narrow_config() -> NVSModelConfig:
    """The released model at full depth, a tenth of its width, with small towers."""
    config = full_size_config("sd21")
    config.image_size = 128
    config.unet |= {"block_out_channels": [32, 64, 128, 128], "attention_head_dim": [1, 2, 4, 4], "norm_num_groups": 16}
    config.vae |= {"block_out_channels": [32] * 4, "sample_size": 128}
    config.adapter |= {"latent_resolution": 16}
    config.image_encoder |= {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 2}
    return config


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 numbers exactly (monkeypatch does not see these attributes: they are made on access)."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    usual = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, usual, strict=True):
            backend.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_a_deep_network_keeps_its_direction(dtype: torch.dtype) -> None:
    exact = gradients(narrow_config(), "cpu", torch.float32, (0.5,))
    cosines = functional.cosine_similarity(exact, gradients(narrow_config(), "cpu", dtype, (0.5,)))
    assert float(cosines.min()) >= (0.999 if dtype is torch.bfloat16 else 0.9999)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd21", "sd15"])
def test_the_gradient_at_full_size_keeps_its_direction(family: str) -> None:
    shares = (0.02, 0.5, 0.98)
    with without_tf32():
        exact = gradients(full_size_config(family), "cuda", torch.float32, shares)
    for dtype in HALVES:
        found = gradients(full_size_config(family), "cuda", dtype, shares, torch.bfloat16)
        cosines = functional.cosine_similarity(exact, found)
        assert math.isfinite(float(cosines.sum())) and float(cosines.min()) >= 0.999, (dtype, cosines)


@pytest.mark.parametrize("dtype", HALVES)
def test_two_predictions_are_combined_in_float32(dtype: torch.dtype) -> None:
    guidance, _, poses = prepared(tiny_nvs_model(unconditional_support="noise").to(dtype))
    model, conditions, raw = guidance.model, guidance.conditions, []
    assert conditions is not None
    model.network.unet.conv_out.register_forward_hook(lambda module, inputs, output: raw.append(output))
    noisy = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        grouped, generator = poses[torch.arange(4)[None]], torch.Generator().manual_seed(2)
        found = guided_prediction(model, conditions, noisy, torch.tensor([500]), grouped, 7.5, generator)
    # The first row is the support view of the unconditional group.
    unconditional, conditional = raw[0][1:].double()[:, None].unflatten(0, (2, 1, 4))[:, :, :, 0]
    assert found.dtype == torch.float32
    # Formed in half precision the difference of near values would have errors of some hundredths.
    expected = diffusion.guide(unconditional, conditional, 7.5)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_everything_around_the_network_is_float32(dtype: torch.dtype) -> None:
    guidance, images, poses = prepared(tiny_nvs_model().to(dtype))
    model = guidance.model
    assert {p.dtype for p in model.network.unet.parameters()} == {dtype}
    assert {p.dtype for p in [*model.vae.parameters(), *model.network.adapter.ray_convs.parameters()]} == {
        torch.float32
    }
    assert model.schedule.alphas_cumprod.dtype == torch.float32
    result = guidance(images, poses, (0.5, 0.5), torch.Generator().manual_seed(0))
    result.loss.backward()
    assert result.gradient.dtype == result.loss.dtype == torch.float32
    assert images.grad is not None and images.grad.dtype == torch.float32
    assert guidance.conditions is not None and guidance.conditions.latents.dtype == torch.float32


def test_values_beyond_float16_are_a_mistake_that_names_the_way_out() -> None:
    found = {}
    for dtype in HALVES:
        model = tiny_nvs_model().to(dtype)
        model.network.unet.conv_out.bias.data.fill_(6e4)
        model.network.unet.conv_out.weight.data.fill_(1e3)
        guidance, images, poses = prepared(model)
        try:
            found[dtype] = guidance(images, poses, (0.5, 0.5), torch.Generator().manual_seed(0)).gradient.isfinite()
        except InputError as error:
            found[dtype] = str(error)
    assert bool(found[torch.bfloat16].all())
    assert "system.guidance.precision" in found[torch.float16] and "use bfloat16" in found[torch.float16]
