"""The two Stable Diffusions that the adapter was released for, and where their weights are looked for."""

from dataclasses import dataclass
from typing import Any, Dict, Tuple

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints.ldm_vae import vae_options_from_ldm
from nvsadapter_guidance.conversion import unet_options_from_ldm
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model_config import NVSModelConfig
from nvsadapter_guidance.weight_files import WEIGHT_FILES, WEIGHT_SETS

_LDM_UNET: Dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": 1,
}
LDM_VAE: Dict[str, Any] = {
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
    "resolution": 256,
}
SCALING_FACTOR = 0.18215
"""Latents are samples of the autoencoder's posterior times this."""
SCHEDULE: Dict[str, Any] = {"kind": "scaled_linear", "shift": 1.0, "prediction_type": "epsilon"}

_OPENCLIP_VIT_H_14: Dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
"""Image encoder of both families."""


@dataclass(frozen=True)
class Family:
    """A Stable Diffusion model that an adapter joins."""

    name: str
    """"sd21" or "sd15", as in `full_size.full_size_config`."""
    title: str
    ldm_unet: Dict[str, Any]
    """Options of its UNet in LDM's names."""
    files: Tuple[str, ...]
    """Names of its published checkpoints in LDM layout."""
    hub_ids: Tuple[str, ...]
    """Repositories that hold it in diffusers layout, the one to prefer first."""

    @property
    def unet(self) -> Dict[str, Any]:
        """Arguments of `UNet2DConditionModel`; the latents' side that it names is that of 256 pixels."""
        return unet_options_from_ldm(self.ldm_unet, sample_size=32)


def _hub_ids(name: str) -> Tuple[str, ...]:
    return next(file.hubs for file in WEIGHT_FILES if file.name == WEIGHT_SETS[name][0])


FAMILIES: Dict[str, Family] = {
    "sd21": Family(
        "sd21",
        "Stable Diffusion 2.1 base (512 px)",
        {**_LDM_UNET, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024},
        ("v2-1_512-ema-pruned.safetensors", "v2-1_512-ema-pruned.ckpt"),
        (*_hub_ids("sd21"), "stabilityai/stable-diffusion-2-1-base"),
    ),
    "sd15": Family(
        "sd15",
        "Stable Diffusion 1.5",
        {**_LDM_UNET, "num_heads": 8, "context_dim": 768},
        ("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors"),
        (*_hub_ids("sd15"), "runwayml/stable-diffusion-v1-5"),
    ),
}
IMAGE_ENCODER_IDS = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",)
"""Where OpenCLIP ViT-H/14, the image encoder of every released adapter, is published."""
IMAGE_ENCODER_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of its file in OpenCLIP's layout."""


def family_of_width(width: int) -> str | None:
    """The family whose text tokens have so many channels."""
    return next((name for name, family in FAMILIES.items() if family.ldm_unet["context_dim"] == width), None)


def full_size_config(family: str, **adapter_options: Any) -> NVSModelConfig:
    """The configuration of a released model, without its text encoder: only the empty prompt's tokens are needed.

    Args:
        family: ``sd21`` or ``sd15``.
        adapter_options: fields of `NVSAdapterConfig` that differ from the released base model.

    Raises:
        InputError: an unknown family or adapter option.
    """
    if family not in FAMILIES:
        raise InputError(f"model family '{family}' is unknown; use one of {', '.join(FAMILIES)}")
    adapter = NVSAdapterConfig.from_dict(adapter_options, "adapter options")
    return NVSModelConfig(
        name=f"nvs-adapter-{family}",
        image_size=256,
        unet=FAMILIES[family].unet,
        vae={**vae_options_from_ldm(LDM_VAE), "scaling_factor": SCALING_FACTOR},
        image_encoder=dict(_OPENCLIP_VIT_H_14),
        image_preprocessing="clip",
        adapter=adapter.to_dict(),
        schedule=dict(SCHEDULE),
        text_tokens=77,
        unconditional_support="noise",
    )
