"""A whole model of tiny random networks: autoencoder, image encoder, adapted UNet."""

from typing import Any

import torch

from nvsadapter_guidance.model import NVSModel, NVSModelConfig


def tiny_nvs_config(**options: Any) -> NVSModelConfig:
    """32-pixel images, 8x8 latents."""
    values: dict[str, Any] = {
        "name": "tiny",
        "image_size": 32,
        "unet": {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [8, 8, 8],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
            "mid_block_add_attention": False,
        },
        "image_encoder": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "projection_dim": 12,
        },
        "adapter": {
            "image_attn_mode": "support_query",
            "query_composer_mode": "all_to_all_attention",
            "latent_resolution": 8,
            "image_context_dim": 12,
            "ray_degrees": [2, 1],
            "camera_convention": "pinhole",
            "zero_init": False,
        },
        "text_tokens": 1,
    }
    return NVSModelConfig(**{**values, **options})


def tiny_nvs_model(**options: Any) -> NVSModel:
    """Random weights, the same ones at every call."""
    torch.manual_seed(0)
    return NVSModel(tiny_nvs_config(**options)).eval().requires_grad_(False)
