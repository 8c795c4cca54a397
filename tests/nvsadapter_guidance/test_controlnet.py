"""The plain ControlNet beside the adapted UNet."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model, tiny_unet
from torch import Tensor

from nvsadapter_guidance.controlnet import build_controlnet
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.unet import MultiViewUNet


def controlled(randomise: bool, scale: float = 1.0) -> tuple[MultiViewUNet, MultiViewUNet]:
    """The same adapted UNet without and with a ControlNet."""
    plain = tiny_model()
    controlnet = build_controlnet(plain.unet).eval()
    if randomise:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in controlnet.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return plain, MultiViewUNet(plain.unet, plain.adapter, controlnet, scale).eval()


def control_images(inputs: dict[str, Tensor]) -> Tensor:
    batch, views = inputs["ray_embedding"].shape[:2]
    return torch.rand(batch, views, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("randomise, scale, equal", [(False, 1.0, True), (True, 0.0, True), (True, 1.0, False)])
@torch.no_grad()
def test_control_counts_only_with_weights_and_scale(randomise: bool, scale: float, equal: bool) -> None:
    plain, model = controlled(randomise, scale)
    inputs = tiny_inputs(plain)
    output = model(**inputs, control_images=control_images(inputs))
    assert torch.allclose(output, plain(**inputs), atol=1e-5) == equal


@torch.no_grad()
def test_cached_support_includes_its_control_image() -> None:
    plain, model = controlled(True)
    inputs = tiny_inputs(plain)
    images = control_images(inputs)
    support = {key: value for key, value in inputs.items() if key not in ("query_latents", "timesteps")}
    cache = model.encode_support(**support, control_images=images[:, :1])
    cached = model(**{**inputs, "support_latents": None}, support_cache=cache, control_images=images)
    exact = model(**inputs, control_images=images)
    torch.testing.assert_close(cached, exact, atol=1e-4 * exact.std().item(), rtol=1e-4)


def test_control_images_and_controlnet_go_together() -> None:
    plain, model = controlled(False)
    with pytest.raises(InputError, match="control_images"):
        model(**tiny_inputs(plain))


def test_uneven_levels_are_refused() -> None:
    with pytest.raises(InputError, match="layers_per_block"):
        build_controlnet(tiny_unet(layers_per_block=(1, 2)))
