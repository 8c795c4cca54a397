"""How many parameters every experiment trains, against the released model's manifest and against formulae.

Stable Diffusion's UNet has 5 transformer blocks of width 320, 5 of 640 and 6 of 1280 (one of them in the middle block,
on the coarsest grid). An attention of width d has 4 d^2 + d parameters (queries, keys, values, output with bias);
image attention has keys and values of 1024 channels. Queries and keys of image attention are not trained: it looks at
one token, so they get no gradient.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nvsadapter_guidance.training.adapter.config_files import load_config
from nvsadapter_guidance.training.adapter.network import blank_model, parameter_groups, stored_names, trainable

WIDTHS = [320] * 5 + [640] * 5 + [1280] * 6
TOKENS = [1024] * 5 + [256] * 5 + [64] * 5 + [16]
"""Learned tokens per block: positions of the block's grid for 32x32 latents."""
ATTENTION = sum(4 * d * d + d for d in WIDTHS)
IMAGE_INERT = sum(d * d + 1024 * d for d in WIDTHS)
IMAGE = sum(2 * d * d + 2 * 1024 * d + d for d in WIDTHS)
LEARNED_TOKENS = sum(n * d for n, d in zip(TOKENS, WIDTHS))
UNET_SD21, UNET_SD15 = 865_910_724, 859_520_964


def ray_convs(channels: int) -> int:
    """One convolution per level, whose kernel has the side of the level's stride, and its bias."""
    return sum(channels * side * side * d + d for side, d in ((1, 320), (2, 640), (4, 1280), (8, 1280)))


WHOLE = 3 * ATTENTION + IMAGE + LEARNED_TOKENS + ray_convs(144)
TRAINED = WHOLE - IMAGE_INERT
EXPECTED = {
    "base": 191_956_160,
    "query_1": TRAINED,
    "query_2": TRAINED,
    "query_6": TRAINED,
    "query_16": TRAINED,
    "emb_scale_0.5": TRAINED - LEARNED_TOKENS // 2,
    "emb_scale_2": TRAINED + LEARNED_TOKENS,
    "no_global_semantic": TRAINED - (IMAGE - IMAGE_INERT),
    "rays_origin_direction": TRAINED,
    "extrinsic": TRAINED - ray_convs(144) + ray_convs(496),
    "all_to_all": TRAINED - 2 * ATTENTION - LEARNED_TOKENS,
    "all_to_all_attention": TRAINED - ATTENTION - LEARNED_TOKENS,
    "full_finetune": TRAINED + UNET_SD21,
    "sd15": TRAINED,
    "controlnet": TRAINED,
}
_DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
REFERENCE = Path(os.environ["THREEDREC_GOLDEN"]).parent if "THREEDREC_GOLDEN" in os.environ else _DEFAULT


@cache
def blank(name: str, repository: Path) -> Any:
    names = ["base", "sd15", name] if name == "controlnet" else dict.fromkeys(["base", name])
    return blank_model(load_config([repository / "configs" / "adapter" / f"{part}.yaml" for part in names]).model)


def manifest(name: str) -> dict[str, Any]:
    path = REFERENCE / f"manifest_{name}.json"
    if not path.is_file():
        pytest.skip(f"the released manifest is not at {path}")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_trained_parameters(name: str, repository: Path) -> None:
    assert TRAINED == EXPECTED["base"]
    model = blank(name, repository)
    assert sum(value.numel() for value in trainable(model).values()) == EXPECTED[name]
    adapter, base = parameter_groups(model)
    assert sum(value.numel() for value in base) == (UNET_SD21 if name == "full_finetune" else 0)
    if name != "full_finetune":
        assert all(key.startswith("adapter.") for key in trainable(model))


@pytest.mark.parametrize("family", ["base", "sd15"])
def test_the_adapter_is_the_manifests_and_all_but_inert_layers_are_trained(family: str, repository: Path) -> None:
    counts = manifest(family)["counts"]
    kinds = counts["adapter_params_by_kind"]
    model = blank(family, repository)
    assert sum(value.numel() for value in model.network.adapter.parameters()) == counts["adapter_params"] == WHOLE
    inert = sum(
        int.__mul__(*entry["shape"])
        for key, entry in manifest(family)["diffusion_model"].items()
        if "image_attn_module.to_q" in key or "image_attn_module.to_k" in key
    )
    trained = sum(value.numel() for value in trainable(model).values())
    assert trained == counts["adapter_params"] - inert == EXPECTED[family]
    assert (kinds["cross_view_attn_module"], kinds["image_attn_module"]) == (ATTENTION, IMAGE)
    assert (kinds["support_emb"], kinds["pe_blocks"]) == (LEARNED_TOKENS, ray_convs(144))
    assert sum(value.numel() for value in model.network.unet.parameters()) == counts["pretrained_params"]


def test_the_control_model_is_frozen_and_the_manifests(repository: Path) -> None:
    control = blank("controlnet", repository).network.controlnet
    assert not any(value.requires_grad for value in control.parameters())
    assert sum(value.numel() for value in control.parameters()) == manifest("controlnet")["control_model_params"]


def test_a_checkpoint_holds_the_adapter_and_what_else_is_trained(repository: Path) -> None:
    assert len(stored_names(blank("base", repository))) == 344
    assert all(name.startswith("adapter.") for name in stored_names(blank("controlnet", repository)))
    assert len(stored_names(blank("full_finetune", repository))) == 344 + 686
