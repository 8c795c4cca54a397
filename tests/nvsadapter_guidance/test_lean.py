"""Lean layers against diffusers' own, in value and gradient, in float64."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from tiny_nvs import tiny_nvs_config, tiny_nvs_model
from torch import nn

from nvsadapter_guidance import lean_encoder, lean_layers, lean_unet


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("out_channels", [8, 16])
@pytest.mark.parametrize("time_channels", [None, 6])
def test_a_residual_block_is_that_of_diffusers(out_channels: int, time_channels: int | None) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=8, out_channels=out_channels, temb_channels=time_channels, groups=4, eps=1e-5
    )  # fmt: skip
    block = block.double().eval().requires_grad_(False)
    assert lean_layers.is_lean(block)
    x = draw(2, 8, 6, 5).requires_grad_()
    time = None if time_channels is None else draw(2, time_channels, seed=1)
    expected = block(x, time)
    offset = None if time is None else lean_layers.offset_of(block, nn.functional.silu(time))
    found = lean_layers.residual_block(block, x, offset)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = draw(*expected.shape, seed=2)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("out_channels", [8, 16])
@pytest.mark.parametrize("border", [True, False])
def test_what_a_block_s_input_owes_is_paid(out_channels: int, border: bool) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=None, groups=4)
    block = block.double().eval().requires_grad_(False)
    x, owed = draw(2, 8, 6, 5).requires_grad_(), draw(8, seed=1)
    expected = lean_layers.residual_block(block, x + owed[:, None, None])
    expected = nn.functional.pad(expected, (0, 1, 0, 1)) if border else expected
    found = lean_layers.residual_block(block, x, owed=owed, border=border)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = draw(*expected.shape, seed=2)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_the_time_is_one_product_of_plain_layers() -> None:
    unet: Any = tiny_nvs_model().double().network.unet
    time = draw(3, unet.time_embedding.linear_2.out_features)
    apart = list(lean_unet._offsets(unet, time))
    lean_unet.merge_time(unet)
    together = list(lean_unet._offsets(unet, time))
    assert len(together) == len(apart) and all(part._base is together[0]._base for part in together)
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)

    class Other(nn.Linear):
        pass

    layer = unet.mid_block.resnets[0].time_emb_proj
    unet.mid_block.resnets[0].time_emb_proj = Other(layer.in_features, layer.out_features).double()
    changed = list(lean_unet._offsets(unet, time))
    assert sum(not torch.allclose(found, expected) for found, expected in zip(changed, apart, strict=True)) == 1
    lean_unet.merge_time(unet)
    assert unet.merged_time_weight is None


@pytest.mark.parametrize("fused_width", [128, 1])
@pytest.mark.parametrize("attention", [True, False])
def test_the_encoder_is_that_of_diffusers(attention: bool, fused_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_encoder, "FUSED_WIDTH", fused_width)
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**tiny_nvs_config().vae | {"mid_block_add_attention": attention})
    encoder = vae.encoder.double().eval().requires_grad_(False)
    assert lean_encoder.can_run_lean(encoder)
    images = draw(2, 3, 32, 24).requires_grad_()
    expected, found = encoder(images), lean_encoder.encode_lean(encoder, images)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    upstream = draw(*expected.shape, seed=2)
    gradients = [torch.autograd.grad(y, images, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-10)


def test_a_convolution_keeps_nothing_but_its_weights() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1).double().requires_grad_(False)
    x, kept = draw(1, 4, 5, 5).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = lean_layers.convolve(x, layer, with_bias=True)
    assert kept == [layer.weight.shape]
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (7, 7)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (3, 2, 1), (1, 1, 0), (3, (1, 2), (0, 1))]
)
def test_the_gradient_of_a_frozen_convolution(kernel: Any, stride: Any, padding: Any, size: tuple[int, int]) -> None:
    layer = nn.Conv2d(4, 6, kernel, stride, padding).double().requires_grad_(False)
    x = draw(2, 4, *size).requires_grad_()
    found, expected = lean_layers.convolve(x, layer, with_bias=True), layer(x)
    torch.testing.assert_close(found, expected)
    upstream = draw(*expected.shape, seed=2)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_unets_of_other_kinds_are_left_alone() -> None:
    unet: Any = tiny_nvs_model().network.unet
    assert lean_unet.can_run_lean(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not lean_unet.can_run_lean(unet)
    unet.disable_freeu()
    unet.mid_block.resnets[0]._hf_hook = object()  # accelerate moves weights to the device when a module is called
    assert not lean_unet.can_run_lean(unet)
    del unet.mid_block.resnets[0]._hf_hook
    unet.mid_block.resnets[0].output_scale_factor = 2.0
    assert not lean_unet.can_run_lean(unet)


def test_channels_filled_up_to_eight_change_nothing() -> None:
    layer = nn.Conv2d(3, 6, 3, padding=1).bfloat16().requires_grad_(False)
    x = draw(2, 3, 5, 7).bfloat16().requires_grad_()
    found, expected = lean_layers.convolve_few_channels(x, layer), layer(x) - layer.bias[:, None, None]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (found, expected)]
    assert gradients[0].shape == x.shape
    torch.testing.assert_close(*gradients, atol=2e-2, rtol=2e-2)
