"""Names of released checkpoints: lossless both ways, strict, and equal to the full-size manifests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from golden_files import GOLDEN, golden
from tiny_models import tiny_config, tiny_unet

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.controlnet import build_controlnet
from nvsadapter_guidance.conversion import ema_name, from_released, to_released, unet_options_from_ldm
from nvsadapter_guidance.errors import InputError

MANIFESTS = GOLDEN.parent

LDM_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": 1,
}
LDM_OPTIONS: dict[str, dict[str, Any]] = {
    "base": {**LDM_COMMON, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024},
    "sd15": {**LDM_COMMON, "num_heads": 8, "context_dim": 768},
}


def manifest(name: str) -> dict[str, Any]:
    path: Path = MANIFESTS / f"manifest_{name}.json"
    if not path.is_file():
        pytest.skip(f"the manifest of the released checkpoint is not at {path}")
    return json.loads(path.read_text())


def full_size(name: str) -> tuple[UNet2DConditionModel, NVSAdapter]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_options_from_ldm(LDM_OPTIONS[name]))
        return unet, NVSAdapter(NVSAdapterConfig(), unet)


def shapes(entries: dict[str, Any]) -> dict[str, list[int]]:
    return {key.removeprefix("model.diffusion_model."): value["shape"] for key, value in entries.items()}


@golden
@pytest.mark.parametrize("name", LDM_OPTIONS)
def test_full_size_names_and_shapes_equal_the_manifest(name: str) -> None:
    expected = manifest(name)
    unet, adapter = full_size(name)
    tensors = to_released(unet, adapter)
    assert {key: list(value.shape) for key, value in tensors.items()} == shapes(expected["diffusion_model"])
    groups = {"adapter": adapter, "pretrained": unet}
    for group, module in groups.items():
        assert len(module.state_dict()) == expected["counts"][f"{group}_keys"]
        assert sum(value.numel() for value in module.parameters()) == expected["counts"][f"{group}_params"]


@golden
def test_full_size_control_names_equal_the_manifest() -> None:
    expected = manifest("controlnet")
    unet, adapter = full_size("sd15")
    with torch.device("meta"):
        controlnet = build_controlnet(unet)
    tensors = to_released(unet, adapter, controlnet)
    control = {key: list(value.shape) for key, value in tensors.items() if key.startswith("control_model.")}
    assert control == shapes(expected["control_model"])


@golden
def test_names_of_moving_averages() -> None:
    for key, name in manifest("base")["ema"]["examples"].items():
        assert ema_name(key.removeprefix("model.diffusion_model.")) == name


UNETS: dict[str, dict[str, Any]] = {
    "coarse level only": {},
    "three levels, uneven depth": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": (2, 1, 1),
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("composer", ["learnable_emb", "all_to_all", None])
def test_round_trip_is_lossless(options: dict[str, Any], composer: str | None) -> None:
    unet = tiny_unet(**options)
    adapter = NVSAdapter.inject(unet, tiny_config(query_composer_mode=composer))
    released = to_released(unet, adapter)
    assert len(released) == len(unet.state_dict()) + len(adapter.state_dict())
    parts = from_released(released, unet, adapter)
    for module, tensors in ((unet, parts.unet), (adapter, parts.adapter)):
        own = module.state_dict()
        assert own.keys() == tensors.keys()
        assert all(torch.equal(own[key], tensors[key]) for key in own)


def test_wrong_checkpoints_are_named() -> None:
    unet = tiny_unet()
    adapter = NVSAdapter.inject(unet, tiny_config())
    released = to_released(unet, adapter)
    key = "pe_blocks.1.weight"
    cases = {
        f"model.ckpt.*{key}.*missing": {name: value for name, value in released.items() if name != key},
        "model.ckpt.*surplus.*not known": {**released, "surplus": torch.zeros(1)},
        f"model.ckpt.*{key}.*shape": {**released, key: torch.zeros(2)},
    }
    for message, tensors in cases.items():
        with pytest.raises(InputError, match=message):
            from_released(tensors, unet, adapter, source="model.ckpt")


def test_ldm_options_need_heads() -> None:
    with pytest.raises(InputError, match="num_heads"):
        unet_options_from_ldm({**LDM_COMMON, "context_dim": 8})
