"""Tiny random networks for tests of the adapter."""

from typing import Any, Dict

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.unet import MultiViewUNet

TEXT_DIM, IMAGE_DIM = 12, 10


def tiny_unet(**options: Any) -> UNet2DConditionModel:
    """Two levels on an 8x8 grid, three latent channels, transformer blocks on the coarse level only."""
    torch.manual_seed(0)
    defaults: Dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**defaults, **options}).eval()


def tiny_config(**options: Any) -> NVSAdapterConfig:
    """Adapter options with few learned tokens and short embeddings."""
    defaults = {"latent_resolution": 8, "image_context_dim": IMAGE_DIM, "ray_degrees": (2, 1)}
    return NVSAdapterConfig(**{**defaults, **options})


def tiny_model(randomise: bool = True, unet: UNet2DConditionModel | None = None, **options: Any) -> MultiViewUNet:
    """An adapted network; `randomise` gives the zero output layers values, so that every layer counts."""
    unet = tiny_unet() if unet is None else unet
    adapter = NVSAdapter.inject(unet, tiny_config(**options))
    if randomise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return MultiViewUNet(unet, adapter).eval()


def tiny_inputs(
    model: MultiViewUNet, batch: int = 2, num_query: int = 3, text_tokens: int = 4, seed: int = 2
) -> Dict[str, Tensor]:
    """Random arguments of a `MultiViewUNet` call."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels = model.adapter.config.posemb_dim
    return {
        "query_latents": draw(batch, num_query, 3, 8, 8),
        "timesteps": torch.arange(1, batch + 1) * 300,
        "text_context": draw(batch, text_tokens, TEXT_DIM),
        "image_context": draw(batch, 1, IMAGE_DIM),
        "ray_embedding": draw(batch, 1 + num_query, channels, 8, 8),
        "support_latents": draw(batch, 1, 3, 8, 8),
    }
