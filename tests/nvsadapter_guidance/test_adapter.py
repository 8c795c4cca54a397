"""Injection, initial state, files and gradients of the adapter."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_inputs, tiny_model, tiny_unet

from nvsadapter_guidance.adapter import CONFIG_NAME, WEIGHTS_NAME, NVSAdapter, level_of_path
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.unet import MultiViewUNet


def test_injection_leaves_the_base_model_alone() -> None:
    unet = tiny_unet()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    sample, text = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 12)
    expected = unet(sample, 7, text).sample
    NVSAdapter.inject(unet, tiny_config())
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    torch.testing.assert_close(unet(sample, 7, text).sample, expected)


@pytest.mark.parametrize("composer", ["learnable_emb", "all_to_all", "all_to_all_attention", None])
@pytest.mark.parametrize("image", ["query_only", "support_query", None])
def test_a_fresh_adapter_does_not_change_the_output(composer: str | None, image: str | None) -> None:
    unet = tiny_unet()
    model = tiny_model(False, copy.deepcopy(unet), query_composer_mode=composer, image_attn_mode=image)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        base = unet(
            inputs["query_latents"].flatten(0, 1),
            inputs["timesteps"].repeat_interleave(3),
            inputs["text_context"].repeat_interleave(3, dim=0),
        ).sample
        torch.testing.assert_close(model(**inputs).flatten(0, 1), base)


def test_initial_weights_depend_on_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = NVSAdapter.inject(tiny_unet(), tiny_config(), torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(6)
    second = NVSAdapter.inject(tiny_unet(), tiny_config(), torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_saved_adapter_holds_the_adapter_alone_and_loads_again(tmp_path: Path) -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    model.adapter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == {
        *(f"ray_convs.{level}.{name}" for level in (0, 1) for name in ("weight", "bias")),
        *(
            f"{path}.transformer_blocks.0.{layer}"
            for path in (
                "down_blocks.1.attentions.0",
                "mid_block.attentions.0",
                "up_blocks.0.attentions.0",
                "up_blocks.0.attentions.1",
            )
            for layer in (
                "composer.tokens",
                *(
                    f"{attention}.{name}"
                    for attention in ("composer.gather", "composer.spread", "view_attn", "image_attn")
                    for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias")
                ),
            )
        ),
    }
    unet = tiny_unet()
    again = MultiViewUNet(unet, NVSAdapter.from_pretrained(unet, tmp_path)).eval()
    assert again.adapter.config == model.adapter.config
    with torch.no_grad():
        assert torch.equal(again(**inputs), model(**inputs))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.adapter.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS_NAME
    tensors = load_file(weights)
    key = "ray_convs.0.weight"
    cases = {
        "missing": {name: value for name, value in tensors.items() if name != key},
        "not known": {**tensors, "extra.weight": torch.zeros(1)},
        "shape": {**tensors, key: torch.zeros(1)},
        "NaN": {**tensors, key: torch.full_like(tensors[key], torch.nan)},
    }
    for message, changed in cases.items():
        save_file(changed, weights)
        with pytest.raises(InputError, match=f"{WEIGHTS_NAME}.*{message}"):
            NVSAdapter.from_pretrained(tiny_unet(), tmp_path)
    weights.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match=WEIGHTS_NAME):
        NVSAdapter.from_pretrained(tiny_unet(), tmp_path)


def test_bad_config_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_NAME
    with pytest.raises(InputError, match=CONFIG_NAME):
        NVSAdapter.from_pretrained(tiny_unet(), tmp_path)
    for text, message in (("{", "JSON"), ("[]", "object"), ('{"num_querry": 4}', "did you mean 'num_query'")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            NVSAdapter.from_pretrained(tiny_unet(), tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("view_attn_mode", "support"),
        ("image_attn_mode", "all"),
        ("query_composer_mode", "tokens"),
        ("ray_embedding", "rays"),
        ("camera_convention", "blender"),
        ("query_emb_scale", 0.0),
    ],
)
def test_bad_config_values_are_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        NVSAdapterConfig(**{field: value})  # type: ignore[arg-type]


def test_config_survives_json() -> None:
    config = tiny_config(query_emb_scale=0.5, image_attn_mode=None)
    assert NVSAdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.asdict(config) == config.to_dict()


def test_an_adapter_is_injected_only_once_and_only_where_it_fits() -> None:
    unet = tiny_unet()
    NVSAdapter.inject(unet, tiny_config())
    with pytest.raises(InputError, match="already"):
        NVSAdapter.inject(unet, tiny_config())
    plain = tiny_unet(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
    )
    with pytest.raises(InputError, match="no transformer block"):
        NVSAdapter.inject(plain, tiny_config())
    with pytest.raises(InputError, match="does not support"):
        NVSAdapter.inject(tiny_unet(only_cross_attention=(False, True)), tiny_config())


def test_level_of_path() -> None:
    paths = ("down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.1.attentions.0")
    assert [level_of_path(path, 4) for path in paths] == [0, 3, 2]


@pytest.mark.parametrize("composer", ["learnable_emb", "all_to_all", "all_to_all_attention"])
@pytest.mark.parametrize("to_text", [False, True])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(composer: str, to_text: bool) -> None:
    unet = tiny_unet(cross_attention_dim=10)
    model = tiny_model(unet=unet, query_composer_mode=composer, imgemb_to_text=to_text)
    inputs = tiny_inputs(model)
    inputs["text_context"] = inputs["text_context"][..., :10]
    model(**inputs).square().sum().backward()
    trainable = {id(parameter) for parameter in model.adapter.trainable_parameters()}
    for name, parameter in model.adapter.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (id(parameter) in trainable), name
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_token_counts_follow_level_and_scale() -> None:
    full = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    adapter = NVSAdapter.inject(tiny_unet(**full), tiny_config(query_emb_scale=0.5))
    counts = {block.level: block.composer.tokens.shape[1] for block in adapter.block_adapters().values()}
    assert counts == {0: 32, 1: 8}
