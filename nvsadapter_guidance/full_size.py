"""The released models at full size without their files: configurations, and random weights to measure with."""

import torch
from torch import nn

from nvsadapter_guidance.checkpoints.families import full_size_config
from nvsadapter_guidance.model import NVSModel, NVSModelConfig
from nvsadapter_guidance.schedule import NoiseSchedule

__all__ = ["full_size_config", "random_model"]


@torch.no_grad()
def random_model(config: NVSModelConfig, device: str | torch.device = "cpu", seed: int = 0) -> NVSModel:
    """A model of random weights, made on ``device`` in float32; every layer counts, also those that training zeroes.

    Matrices and kernels are scaled by one over the root of their inputs, so that activations stay of order one, as
    half precision needs; norms are the identity, biases small.
    """
    model = NVSModel.blank(config).to_empty(device=device)
    model.schedule = NoiseSchedule(**config.schedule).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        is_norm = isinstance(module, (nn.GroupNorm, nn.LayerNorm))
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(0.0, 0.02, generator=generator)
            elif is_norm:
                parameter.fill_(1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(0.0, 1.0, generator=generator)
    _number_positions(model)
    return model.eval().requires_grad_(False)


def _number_positions(model: NVSModel) -> None:
    """Refill the tables that are no parameters, which an empty model lacks."""
    for name, buffer in list(model.image_encoder.named_buffers()):
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
