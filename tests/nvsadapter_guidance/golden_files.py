"""Access to the golden tensors: folder, headers, and tiny models built from what the headers say."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.controlnet import build_controlnet
from nvsadapter_guidance.conversion import from_released, unet_key_map, unet_options_from_ldm
from nvsadapter_guidance.rays import RayEmbedding
from nvsadapter_guidance.unet import MultiViewUNet

_DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "golden"
GOLDEN = Path(os.environ.get("THREEDREC_GOLDEN", _DEFAULT))

golden = pytest.mark.golden
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"golden tensors are not at {GOLDEN}; set THREEDREC_GOLDEN to their folder"
)


class GoldenFile:
    """One safetensors file of the set: `options` is its header (JSON values decoded), `[name]` a tensor."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as handle:
            self.options: Dict[str, Any] = {k: json.loads(v) for k, v in (handle.metadata() or {}).items()}
            self.tensors: Dict[str, Tensor] = {key: handle.get_tensor(key) for key in handle.keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def weights(self, prefix: str = "") -> Dict[str, Tensor]:
        """Tensors stored under `<prefix>w.`, without it."""
        start = f"{prefix}w."
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}


@cache
def golden_file(name: str) -> GoldenFile:
    """The file, read once per test process."""
    return GoldenFile(name)


def adapter_config(weights: Dict[str, Tensor], options: Dict[str, Any]) -> NVSAdapterConfig:
    """Adapter options from a header where it has them; what it leaves out is read off the weights' shapes."""
    known = {key: value for key, value in options.items() if key in NVSAdapterConfig.__dataclass_fields__}
    if "max_timesteps" in options:
        known["num_train_timesteps"] = options["max_timesteps"]
    channels = weights["pe_blocks.0.weight"].shape[1]
    known["ray_channels"] = None if channels == RayEmbedding().channels else channels
    image_keys = [key for key in weights if key.endswith("image_attn_module.to_k.weight")]
    if image_keys:
        known.setdefault("image_context_dim", weights[image_keys[0]].shape[1])
    tokens = [value.shape[1] for key, value in weights.items() if key.endswith("support_emb")]
    if tokens and "latent_resolution" not in known:
        # The finest level with transformer blocks has side resolution / 2^level.
        scale = known.get("query_emb_scale", 1.0)
        known["latent_resolution"] = round((max(tokens) / scale) ** 0.5) * options["finest_stride"]
    return NVSAdapterConfig(**known)


def build_model(
    weights: Dict[str, Tensor], ldm: Dict[str, Any], adapter: Dict[str, Any], control: Dict[str, Any] | None = None
) -> MultiViewUNet:
    """Our model with released weights (strictly loaded)."""
    options = {"finest_stride": min(ldm["attention_resolutions"]), **adapter}
    config = adapter_config(weights, options)
    unet = UNet2DConditionModel(**unet_options_from_ldm(ldm))
    multi_view = NVSAdapter.inject(unet, config)
    controlnet = None
    if control is not None:
        controlnet = build_controlnet(
            unet, control["hint_channels"], control.get("num_heads"), control.get("use_linear")
        )
    parts = from_released(weights, unet, multi_view, controlnet, "golden weights")
    unet.load_state_dict(parts.unet)
    multi_view.load_state_dict(parts.adapter)
    if controlnet is not None:
        controlnet.load_state_dict(parts.controlnet)
    return MultiViewUNet(unet, multi_view, controlnet).eval()


def scatter_noise(mask: Tensor, noise: Tensor | None, like: Tensor) -> Tensor | None:
    """Noise rows stored in mask order, laid out per sample (zeros where the mask is off)."""
    if noise is None:
        return None
    spread = torch.zeros_like(like)
    spread[mask] = noise
    return spread


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The set's measure: largest error within `tolerance` standard deviations of the expected tensor."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    scale = expected.std().item() if expected.numel() > 1 else expected.abs().item()
    assert error <= tolerance * max(scale, 1e-12), f"error {error:.3e} against std {scale:.3e}"


def stage_modules(unet: UNet2DConditionModel) -> Dict[str, str]:
    """Path of the module whose output is the output of an LDM stage (`input_blocks.3`, `middle_block`, ...)."""
    last: Dict[str, tuple[int, str]] = {}
    for ours, ldm in unet_key_map(unet).items():
        stage, index, position = (*ldm.split("."), "", "")[:3]
        if stage in ("input_blocks", "output_blocks"):
            path = "conv_in" if ours.startswith("conv_in") else ".".join(ours.split(".")[:4])
            name = f"{stage}.{index}"
            last[name] = max(last.get(name, (-1, "")), (int(position), path))
    return {"middle_block": "mid_block", **{name: path for name, (_, path) in last.items()}}


def record_stages(unet: UNet2DConditionModel) -> Dict[str, Tensor]:
    """A dictionary that the next forward pass fills with the output of every LDM stage and the time embeddings."""
    stages = {**stage_modules(unet), "timestep_embedding": "time_proj", "time_embed": "time_embedding"}
    outputs: Dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return keep

    for name, path in stages.items():
        unet.get_submodule(path).register_forward_hook(hook(name))
    return outputs
