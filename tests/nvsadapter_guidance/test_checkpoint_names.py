"""Names of the released files: equal to the full-size manifests in both directions, lossless, without weights."""

import json
from typing import Any

import pytest
import torch
from golden_files import GOLDEN, golden
from torch import Tensor

from nvsadapter_guidance.checkpoints import clip
from nvsadapter_guidance.checkpoints.families import full_size_config
from nvsadapter_guidance.checkpoints.parts import Blueprint
from nvsadapter_guidance.checkpoints.released import released_part
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX, TEXT_PREFIX
from nvsadapter_guidance.checkpoints.slots import Slot, give, take
from nvsadapter_guidance.checkpoints.stable_diffusion import (
    OPENAI_PREFIX,
    OPENCLIP_PREFIX,
    UNET_PREFIX,
    StableDiffusion,
)
from nvsadapter_guidance.conversion import ema_name
from nvsadapter_guidance.errors import InputError

TEXT = {
    "sd21": {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16},
    "sd15": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12},
}  # fmt: skip


def manifest(family: str) -> dict[str, Any]:
    path = GOLDEN.parent / f"manifest_{'base' if family == 'sd21' else family}.json"
    if not path.is_file():
        pytest.skip(f"the manifest of the released checkpoint is not at {path}")
    return json.loads(path.read_text())


def manifest_names(family: str) -> set[str]:
    """Every name in the released file, moving average included."""
    found = manifest(family)
    names = {*found["diffusion_model"], *found["first_stage_model"], *found["conditioner_names"]}
    adapter = [key for key, value in found["diffusion_model"].items() if value["group"] == "adapter"]
    names |= {ema_name(key.removeprefix("model.diffusion_model.")) for key in adapter}
    names |= {"model_ema.decay", "model_ema.num_updates", *found["other_state_dict_entries"]}
    assert len(adapter) + 2 == found["ema"]["num_ema_keys"]
    assert found["state_dict_total_keys"] == len(names)
    return names


def blueprint(family: str) -> Blueprint:
    config = full_size_config(family)
    config.text_encoder = TEXT[family]
    return Blueprint(config)


@golden
@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("family", TEXT)
def test_the_released_names_are_those_of_the_manifest_in_both_directions(family: str, use_ema: bool) -> None:
    names = manifest_names(family)
    part = released_part(dict.fromkeys(names, torch.empty(0)), blueprint(family), "manifest", use_ema)
    places = {slot.key for slot in part.slots.values()}
    assert places.isdisjoint(part.surplus)
    assert names - places - set(part.surplus) == set()
    assert places | set(part.surplus) - {f"{TEXT_PREFIX}transformer.embeddings.position_ids"} == names


@golden
@pytest.mark.parametrize("family", TEXT)
def test_the_released_shapes_are_those_of_the_manifest(family: str) -> None:
    found = manifest(family)
    entries = {**found["diffusion_model"], **found["first_stage_model"]}
    shapes = {key: tuple(value["shape"]) for key, value in entries.items()}
    whole = blueprint(family)
    part = released_part(dict.fromkeys(manifest_names(family), torch.empty(0)), whole, "manifest", False)
    stored = give(whole.state_dict(), part.slots)
    assert {key: tuple(value.shape) for key, value in stored.items() if key in shapes} == shapes
    counts = {entry["name"]: entry["params"] for entry in found["conditioner_embedders"]}
    tower = sum(value.numel() for key, value in stored.items() if key.startswith(IMAGE_PREFIX))
    # The image embedder also holds what is left of the text tower: words, positions, norm, projection, temperature.
    assert tower == counts["image"] - (49408 + 77 + 2 + 1024) * 1024 - 1
    text = sum(value.numel() for key, value in stored.items() if key.startswith(TEXT_PREFIX))
    last_layer = 12 * 1024**2 + 13 * 1024
    # Not used: SD 2's last layer, projection and temperature; SD 1's table of 77 positions.
    assert text == counts["txt"] - (last_layer + 1024**2 + 1 if family == "sd21" else 77)


@golden
@pytest.mark.parametrize("family", TEXT)
def test_plain_stable_diffusion_has_the_same_unet_and_autoencoder(family: str) -> None:
    """A plain file's UNet keys are the released ones without ``unet.``; its autoencoder's are the same."""
    found, whole = manifest(family), blueprint(family)
    base = StableDiffusion.__new__(StableDiffusion)
    prefix = OPENCLIP_PREFIX if family == "sd21" else OPENAI_PREFIX
    text = {key.replace(f"{TEXT_PREFIX}{'model.' if family == 'sd21' else 'transformer.'}", prefix)
            for key in found["conditioner_names"] if key.startswith(TEXT_PREFIX)}  # fmt: skip
    base.unet = dict.fromkeys(text, torch.empty(0))  # type: ignore[assignment]
    base.folder, base.source = False, "plain"
    (part,) = base.parts(whole)
    pretrained = [key for key, value in found["diffusion_model"].items() if value["group"] == "pretrained"]
    unet = {UNET_PREFIX + key.removeprefix("model.diffusion_model.unet.") for key in pretrained}
    places = {slot.key for slot in part.slots.values()}
    assert places - text == unet | set(found["first_stage_model"])
    assert text - places <= set(part.surplus)


def test_fused_projections_are_taken_apart_and_put_together() -> None:
    stored = {"attn.in": torch.arange(24.0).view(6, 4), "proj": torch.randn(4, 3), "conv": torch.randn(2, 2, 1, 1)}
    slots = {**{name: Slot("attn.in", third=index) for index, name in enumerate("qkv")},
             "p": Slot("proj", transpose=True), "c": Slot("conv", pointwise=True)}  # fmt: skip
    wanted = {**{name: torch.empty(2, 4) for name in "qkv"}, "p": torch.empty(3, 4), "c": torch.empty(2, 2)}
    ours = take(stored, slots, wanted, "file")
    assert torch.equal(ours["k"], stored["attn.in"][2:4]) and ours["k"].data_ptr() != stored["attn.in"].data_ptr()
    assert ours["q"].data_ptr() == stored["attn.in"].data_ptr()
    back = give(ours, slots)
    assert back.keys() == stored.keys() and all(torch.equal(back[key], stored[key]) for key in stored)


def _broken() -> dict[str, tuple[dict[str, Tensor], str]]:
    good = {"a": torch.ones(2, 2), "f": torch.ones(6, 2)}
    return {
        "missing": ({"f": good["f"]}, "tensor 'a' is missing"),
        "unknown": ({**good, "z": torch.ones(1)}, "tensor 'z' is not known"),
        "shape": ({**good, "a": torch.ones(3)}, r"tensor 'a' has shape \(3,\), needed is \(2, 2\)"),
        "thirds": ({**good, "f": torch.ones(5, 2)}, "tensor 'f' has shape .*queries"),
        "nan": ({**good, "a": torch.full((2, 2), float("nan"))}, "tensor 'a' holds NaN"),
        "infinity": ({**good, "f": torch.full((6, 2), float("-inf"))}, "tensor 'f' holds NaN or infinite"),
        "integers": ({**good, "a": torch.ones(2, 2, dtype=torch.int64)}, "tensor 'a' holds torch.int64"),
    }


@pytest.mark.parametrize("case", _broken())
def test_what_does_not_fit_is_named(case: str) -> None:
    tensors, message = _broken()[case]
    slots = {"a": Slot("a"), **{name: Slot("f", third=index) for index, name in enumerate("qkv")}}
    wanted = {"a": torch.empty(2, 2), **{name: torch.empty(2, 2) for name in "qkv"}}
    with pytest.raises(InputError, match=f"^file: {message}"):
        take(tensors, slots, wanted, "file")


def test_sizes_of_the_towers_are_read_off_their_tensors() -> None:
    from tiny_checkpoints import huggingface_text, openclip_text, openclip_vision

    def empty(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

    vision = clip.openclip_vision_options(empty(openclip_vision(1280, 32, 1024, 14, 16)), "", "file")
    assert vision == full_size_config("sd21").image_encoder
    text = clip.openclip_text_options(empty(openclip_text(1024, 24, 49408, 77)), "", "file")
    assert text.items() >= TEXT["sd21"].items() and (text["hidden_act"], text["pad_token_id"]) == ("gelu", 0)
    text = clip.huggingface_text_options(empty(huggingface_text(768, 12, 49408, 77)), "", "file")
    assert text.items() >= TEXT["sd15"].items()
    assert (text["hidden_act"], text["bos_token_id"], text["pad_token_id"]) == ("quick_gelu", 49406, 49407)
