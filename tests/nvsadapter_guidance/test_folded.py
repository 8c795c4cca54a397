"""The folded network call against the exact one, in float64, for every kind of adapter."""

from typing import Any

import pytest
import torch
from tiny_nvs import tiny_nvs_config, tiny_nvs_model
from torch import Tensor

from nvsadapter_guidance.cameras import look_at, relative_to_support
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, SupportConditions, guided_prediction, prepare

SUPPORT = Poses(torch.tensor([10.0]), torch.tensor([5.0]), torch.tensor([1.5]))
GROUPS, VIEWS = 3, 4


def build(text_tokens: int, unconditional: str, unet: dict[str, Any] | None = None, **adapter: Any) -> NVSModel:
    config = tiny_nvs_config()
    return tiny_nvs_model(
        unet=config.unet | (unet or {}),
        adapter=config.adapter | adapter,
        text_tokens=text_tokens,
        unconditional_support=unconditional,
    ).double()


def conditions_of(model: NVSModel, seed: int = 3) -> SupportConditions:
    size = model.config.image_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    image = image.to(model.vae.dtype)
    return prepare(model, image, SUPPORT, torch.Generator().manual_seed(0))


@torch.no_grad()
def predict(model: NVSModel, conditions: SupportConditions, scale: float = 3.0) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(GROUPS, VIEWS, 4, 8, 8, generator=draw, dtype=torch.float64).to(model.vae.dtype)
    azimuth = torch.linspace(-150, 150, GROUPS * VIEWS)
    poses = Poses(azimuth, 0.1 * azimuth, torch.full_like(azimuth, 1.6)).groups(VIEWS)
    timesteps = torch.tensor([100, 500, 900])
    return guided_prediction(model, conditions, noisy, timesteps, poses, scale, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("text_tokens", [1, 5])
@pytest.mark.parametrize("unconditional", ["zeros", "noise"])
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"image_attn_mode": "query_only", "query_composer_mode": "learnable_emb"},
        {"image_attn_mode": None, "query_composer_mode": None},
        {"imgemb_to_text": True, "image_context_dim": 12},
        {"view_attn_mode": "support_skip", "image_attn_mode": "query_only"},
        {"view_attn_mode": "support_xattn"},
        {"ray_embedding": "extrinsic"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_folding_changes_nothing(adapter: dict[str, Any], unconditional: str, text_tokens: int) -> None:
    if adapter.get("imgemb_to_text"):
        config = tiny_nvs_config()
        adapter = {**adapter, "image_context_dim": config.unet["cross_attention_dim"]}
        model = build(text_tokens, unconditional, **adapter)
        model.image_encoder.visual_projection = torch.nn.Linear(16, 8, bias=False).double().requires_grad_(False)
    else:
        model = build(text_tokens, unconditional, **adapter)
    conditions = conditions_of(model)
    assert (conditions.folded is None) == (adapter.get("view_attn_mode") == "support_xattn")
    check_against_the_exact_call(model, conditions)


def check_against_the_exact_call(model: NVSModel, conditions: SupportConditions) -> None:
    exact = SupportConditions(conditions.pose, conditions.latents, conditions.image_context, conditions.text_context)
    for scale in (1.0, 3.0):
        # Rays are float32 in both, and made in other batches.
        expected = predict(model, exact, scale)
        torch.testing.assert_close(predict(model, conditions, scale), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "unet",
    [
        {"use_linear_projection": True, "attention_head_dim": [2, 4]},  # as Stable Diffusion 2 has them
        {"layers_per_block": 2, "transformer_layers_per_block": 2, "mid_block_scale_factor": 2.0},
        {"downsample_padding": 0},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
    ids=lambda options: "-".join(options),
)
def test_folding_changes_nothing_in_unets_of_other_shapes(unet: dict[str, Any]) -> None:
    model = build(5, "noise", unet)
    check_against_the_exact_call(model, conditions_of(model))


@pytest.mark.parametrize("linear", [True, False])
def test_a_lora_takes_part(linear: bool) -> None:
    peft = pytest.importorskip("peft")
    model = build(5, "zeros", {"use_linear_projection": linear})
    before = predict(model, conditions_of(model))
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.2", "time_emb_proj"]
    unet: Any = model.network.unet
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    unet.double()
    conditions = conditions_of(model)
    assert conditions.folded is not None and (predict(model, conditions) - before).abs().max() > 1e-3
    check_against_the_exact_call(model, conditions)


def test_a_compiled_unet_is_called_as_it_is() -> None:
    model = build(1, "noise")
    unet: Any = model.network.unet
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(unet).forward(unet, *args, **kwargs)

    model.network.unet = torch.compile(unet, backend=lambda graph, inputs: graph.forward)
    unet.forward = counted
    with torch.compiler.set_stance("force_eager"):
        conditions = conditions_of(model)
        calls.clear()
        predict(model, conditions)
        assert len(calls) == 1, "the compiled network, not a way around it"
        check_against_the_exact_call(model, conditions)


def test_constants_hold_no_queries_and_one_text() -> None:
    model = build(5, "zeros")
    folded = conditions_of(model).folded
    assert folded is not None
    names = {name.rsplit(".", 1)[1]: tuple(value.shape[:2]) for name, value in folded.items()}
    assert names == {"support": (2, 16), "image": (2, 1), "text_keys": (1, 5), "text_values": (1, 5)}


def test_a_new_support_image_makes_other_constants() -> None:
    model = build(1, "noise")
    first, second = (predict(model, conditions_of(model, seed)) for seed in (3, 4))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("axes", ["released", "pinhole"])
def test_poses_relative_to_the_support_are_those_of_a_matrix_inverse(axes: str) -> None:
    from nvsadapter_guidance.cameras import camera_convention

    angle = torch.linspace(-170, 170, 12)
    c2w = look_at(angle, 0.4 * angle, 1.0 + angle.abs() / 100, camera_convention(axes)).view(3, 4, 4, 4).double()
    expected = torch.linalg.inv(c2w[:, :1]) @ c2w
    torch.testing.assert_close(relative_to_support(c2w), expected, atol=1e-12, rtol=1e-12)
