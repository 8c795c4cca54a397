"""Models grown by a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_nvs import tiny_nvs_config
from torch import Tensor

from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, predict_clean, prepare
from nvsadapter_guidance.training.growth import deepen


def loud_model(**options: Any) -> NVSModel:
    """A tiny model without zeros, so that no layer is silent by chance."""
    torch.manual_seed(0)
    config = tiny_nvs_config()
    config.unet |= options
    model = NVSModel(config).eval().requires_grad_(False)
    for parameter in model.network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prediction(model: NVSModel, views: int = 4) -> Tensor:
    """Views denoised once, from noise of a seed."""
    generator = torch.Generator().manual_seed(1)
    size = model.config.image_size
    images = torch.rand(1 + views, 3, size, size, generator=generator) * 2 - 1
    angle = torch.arange(1 + views) * 40.0
    poses = Poses(angle, torch.full_like(angle, 10.0), torch.full_like(angle, model.config.distance))
    conditions = prepare(model, images[:1], poses[:1], generator)
    return predict_clean(model, conditions, images[1:], poses[1:], 0.5, generator, 1.0)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_deeper_model_predicts_the_same(layers: int) -> None:
    model = loud_model(layers_per_block=layers)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    deeper = deepen(model)
    assert deeper.config.unet == model.config.unet | {"layers_per_block": layers + 1}
    assert len(list(deeper.parameters())) > len(list(model.parameters()))
    torch.testing.assert_close(prediction(deeper), prediction(model), rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_changed_new_layer_is_heard() -> None:
    model = loud_model()
    deeper = deepen(model)
    deeper.network.unet.up_blocks[0].resnets[1].conv2.weight.add_(0.1)
    assert (prediction(deeper) - prediction(model)).abs().max() > 1e-3


def test_new_layers_learn() -> None:
    deeper = deepen(loud_model())
    unet = deeper.network.unet.requires_grad_(True)
    prediction_of = torch.enable_grad()
    with prediction_of:
        sample = torch.randn(2, 4, 8, 8)
        unet(sample, torch.tensor([3, 3]), torch.randn(2, 1, 8)).sample.square().mean().backward()
    for layer in (unet.down_blocks[1].resnets[1].conv2, unet.up_blocks[0].attentions[1].proj_out):
        assert layer.weight.grad.abs().sum() > 0


def test_blocks_of_different_depth_are_refused() -> None:
    model = loud_model()
    model.config.unet["layers_per_block"] = [1, 2]
    with pytest.raises(ValueError, match="one number"):
        deepen(model)


def test_the_embedded_model_grows(tmp_path: Path) -> None:
    model = NVSModel.load()
    deepen(model).save(tmp_path)
    deeper = NVSModel.load(tmp_path)
    assert deeper.config.name == f"{model.config.name}-deeper"
    torch.testing.assert_close(prediction(deeper), prediction(model), rtol=0, atol=1e-3)
