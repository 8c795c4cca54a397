"""Tiny checkpoints in the real layouts, made of random tensors of a tiny model."""

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nvsadapter_guidance.checkpoints.parts import ADAPTER, Blueprint
from nvsadapter_guidance.checkpoints.released import adapter_slots, frozen_slots
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX, released_config
from nvsadapter_guidance.checkpoints.slots import Slot, give
from nvsadapter_guidance.model import NVSModelConfig

CONTEXT = 64
LDM_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "transformer_depth": 1,
    "num_head_channels": 16,
    "use_linear_in_transformer": True,
    "context_dim": CONTEXT,
}
LDM_VAE: dict[str, Any] = {
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
    "resolution": 64,
}
SETTINGS: dict[str, Any] = {
    "model": {
        "params": {
            "network_config": {
                "params": {
                    "sd_config": {"params": LDM_UNET},
                    "image_attn_mode": "query_only",
                    "view_attn_mode": "support_sattn_mq",
                    "query_composer_mode": "learnable_emb",
                    "num_query": 2,
                    "image_context_dim": 48,
                    "latent_resolution": 8,
                    "posemb_dim": 144,
                    "max_timesteps": 1000,
                }
            },
            "first_stage_config": {"params": {"ddconfig": LDM_VAE}},
        }
    }
}


class TrainingState:
    """Stands for the objects of a training framework in its checkpoints."""

    def __init__(self) -> None:
        self.best = 0.5


def openclip_text(width: int, layers: int, vocabulary: int = 100, length: int = 7) -> dict[str, list[int]]:
    """Shapes of an OpenCLIP text tower."""
    return {
        "positional_embedding": [length, width],
        "text_projection": [width, width],
        "logit_scale": [],
        "token_embedding.weight": [vocabulary, width],
        "ln_final.weight": [width],
        "ln_final.bias": [width],
        **_resblocks("transformer.resblocks.", width, layers),
    }


def openclip_vision(width: int, layers: int, out: int, patch: int = 14, side: int = 2) -> dict[str, list[int]]:
    """Shapes of an OpenCLIP image tower, with the remains of the text tower."""
    return {
        **openclip_text(32, 0),
        "visual.class_embedding": [width],
        "visual.positional_embedding": [side * side + 1, width],
        "visual.proj": [width, out],
        "visual.conv1.weight": [width, 3, patch, patch],
        **{f"visual.{norm}.{kind}": [width] for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **_resblocks("visual.transformer.resblocks.", width, layers),
    }


def huggingface_text(width: int, layers: int, vocabulary: int = 100, length: int = 7) -> dict[str, list[int]]:
    """Shapes of a Hugging Face text tower."""
    shapes: dict[str, list[int]] = {
        "embeddings.position_ids": [1, length],
        "embeddings.token_embedding.weight": [vocabulary, width],
        "embeddings.position_embedding.weight": [length, width],
        "final_layer_norm.weight": [width],
        "final_layer_norm.bias": [width],
    }
    for layer in range(layers):
        start = f"encoder.layers.{layer}."
        for name, (rows, columns) in {
            **{f"self_attn.{kind}_proj": (width, width) for kind in ("q", "k", "v", "out")},
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes |= {f"{start}{name}.weight": [rows, columns], f"{start}{name}.bias": [rows]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{start}{norm}.weight": [width], f"{start}{norm}.bias": [width]}
    return {f"text_model.{key}": shape for key, shape in shapes.items()}


def draw(shapes: dict[str, list[int]], prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; position tables count."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        if key.endswith("position_ids"):
            tensors[prefix + key] = torch.arange(shape[-1]).view(shape)
        else:
            tensors[prefix + key] = 0.2 * torch.randn(shape, generator=generator)
    return tensors


def released_tensors(text: str = "openclip") -> dict[str, Tensor]:
    """All tensors of a tiny released checkpoint, in the names of the manifests."""
    if text == "openclip":
        tensors = draw(openclip_text(CONTEXT, 3), f"{TEXT_PREFIX}model.", 1)
    else:
        tensors = draw(huggingface_text(CONTEXT, 2), f"{TEXT_PREFIX}transformer.", 1)
    tensors |= draw(openclip_vision(64, 2, 48), IMAGE_PREFIX, 2)
    blueprint = Blueprint(released_tiny_config(tensors))
    slots = {**frozen_slots(blueprint, tensors), **adapter_slots(blueprint, False)}
    missing = {name: slot for name, slot in slots.items() if slot.key not in tensors}
    tensors |= _fresh(blueprint, missing, 3)
    tensors |= _fresh(blueprint, adapter_slots(blueprint, True), 4)
    tensors |= {"denoiser.sigmas": torch.linspace(0.03, 14.6, 1000)}
    tensors |= {"model_ema.decay": torch.tensor(0.9995), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return tensors


def released_tiny_config(tensors: dict[str, Tensor]) -> NVSModelConfig:
    """The configuration that the tiny YAML file leads to."""

    with tempfile.TemporaryDirectory() as folder:
        path = write_settings(Path(folder) / "tiny.yaml")
        shown = {f"{UNET_PREFIX}pe_blocks.0.weight": torch.zeros(32, 144, 1, 1), **tensors}
        return released_config(shown, "tiny", path)


def write_settings(path: Path) -> Path:
    """The YAML file of the tiny checkpoint."""
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def write_released(folder: Path, tensors: dict[str, Tensor] | None = None, name: str = "tiny_step_10.ckpt") -> Path:
    """A checkpoint as a training framework writes it, and its YAML file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder / "tiny.yaml")
    state: OrderedDict[str, Any] = OrderedDict(released_tensors() if tensors is None else tensors)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(
        {
            "epoch": 1,
            "global_step": 10,
            "callbacks": {TrainingState: {"best_model_score": torch.tensor(0.5), "state": TrainingState()}},
            "optimizer_states": [],
            "state_dict": state,
            "device": torch.device("cpu"),
            "dtype": torch.float16,
        },
        folder / name,
    )
    return folder / name


def ldm_tensors(text: str = "openclip") -> dict[str, Tensor]:
    """A tiny Stable Diffusion checkpoint in LDM layout, with its schedule's tables."""
    renamed = {}
    for key, value in released_tensors(text).items():
        if key.startswith("model.diffusion_model.unet.") and not _is_adapter(key):
            renamed[key.replace("diffusion_model.unet.", "diffusion_model.")] = value
        elif key.startswith("first_stage_model."):
            renamed[key] = value
        elif key.startswith(TEXT_PREFIX):
            renamed["cond_stage_model." + key.removeprefix(TEXT_PREFIX)] = value
    return {**renamed, "betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}


def _is_adapter(key: str) -> bool:
    return any(part in key for part in ("support_emb", "_attn_module", "support_query_attn", "query_out_attn"))


def _fresh(blueprint: Blueprint, slots: dict[str, Slot], seed: int) -> dict[str, Tensor]:
    own = blueprint.state_dict()
    generator = torch.Generator().manual_seed(seed)

    def values(name: str) -> Tensor:
        scale = 0.05 if name.startswith(ADAPTER) else 0.1
        noise = scale * torch.randn(own[name].shape, generator=generator)
        return noise + 1.0 if "norm" in name and name.endswith("weight") else noise

    return give({name: values(name) for name in slots}, slots)


def _resblocks(prefix: str, width: int, layers: int) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for layer in range(layers):
        start = f"{prefix}{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{start}{norm}.weight": [width], f"{start}{norm}.bias": [width]}
        shapes |= {f"{start}attn.in_proj_weight": [3 * width, width], f"{start}attn.in_proj_bias": [3 * width]}
        shapes |= {f"{start}attn.out_proj.weight": [width, width], f"{start}attn.out_proj.bias": [width]}
        shapes |= {f"{start}mlp.c_fc.weight": [4 * width, width], f"{start}mlp.c_fc.bias": [4 * width]}
        shapes |= {f"{start}mlp.c_proj.weight": [width, 4 * width], f"{start}mlp.c_proj.bias": [width]}
    return shapes
