"""A larger model that begins where a smaller one is (Net2Net, Chen et al. 2016, arXiv 1511.05641).

Every block of the UNet gets one more layer, a residual block and a transformer that add nothing until they are trained.
"""

import copy
import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn

from nvsadapter_guidance.model import NVSModel

_LAYER = re.compile(
    r"(?P<before>network\.(?:unet|adapter)\.(?P<side>down|up)_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)"
)


def deepen(model: NVSModel) -> NVSModel:
    """A model with one more layer in each block of its UNet that predicts what ``model`` predicts.

    A block of the way down gets its new layer at the end, whose output repeats that of the layer before. A block of the
    way up gets it in second place: there it takes the skip connection of the layer that was repeated, and every old
    layer keeps its own. New layers are drawn with PyTorch's global seed, but for what makes them silent.

    Raises:
        ValueError: the configuration has other numbers of layers in different blocks.
    """
    layers = model.config.unet["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block is {layers}; only models with one number for all blocks can be deepened")
    config = dataclasses.replace(copy.deepcopy(model.config), name=f"{model.config.name}-deeper")
    config.unet["layers_per_block"] = layers + 1
    deeper = NVSModel(config)
    deeper.vae.register_to_config(scaling_factor=model.vae.config.scaling_factor)
    for block in deeper.network.unet.down_blocks:
        _silence(block, layers)
    for block in deeper.network.unet.up_blocks:
        _silence(block, 1)
    state = {_moved(key): tensor for key, tensor in model.state_dict().items()}
    deeper.load_state_dict(deeper.state_dict() | state, strict=True)
    return deeper.to(model.device).eval().requires_grad_(False)


def _moved(key: str) -> str:
    """Name of an old tensor in the deeper model: on the way up all but the first layer move on by one."""
    found = _LAYER.match(key)
    if found is None or found["side"] == "down" or found[3] == "0":
        return key
    return f"{found['before']}{int(found[3]) + 1}{key[found.end() :]}"


@torch.no_grad()
def _silence(block: Any, index: int) -> None:
    """Make layer ``index`` of one of diffusers' UNet blocks pass on its input."""
    resnet = block.resnets[index]
    _zero(resnet.conv2)
    if resnet.conv_shortcut is not None:
        # What comes from below stands before the skip connection.
        _zero(resnet.conv_shortcut)
        weight: Tensor = resnet.conv_shortcut.weight
        weight[:, : len(weight), 0, 0] = torch.eye(len(weight))
    if hasattr(block, "attentions"):
        _zero(block.attentions[index].proj_out)


def _zero(layer: nn.Module) -> None:
    """Take the output of a linear layer or a convolution away."""
    for parameter in layer.parameters():
        parameter.zero_()
