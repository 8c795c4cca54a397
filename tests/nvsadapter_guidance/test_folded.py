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


def build(text_tokens: int, unconditional: str, **adapter: Any) -> NVSModel:
    config = tiny_nvs_config()
    return tiny_nvs_model(
        adapter=config.adapter | adapter, text_tokens=text_tokens, unconditional_support=unconditional
    ).double()


def conditions_of(model: NVSModel, seed: int = 3) -> SupportConditions:
    size = model.config.image_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return prepare(model, image, SUPPORT, torch.Generator().manual_seed(0))


@torch.no_grad()
def predict(model: NVSModel, conditions: SupportConditions, scale: float = 3.0) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(GROUPS, VIEWS, 4, 8, 8, generator=draw, dtype=torch.float64)
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
    for scale in (1.0, 3.0):
        lean = predict(model, conditions, scale)
        exact = SupportConditions(
            conditions.pose, conditions.latents, conditions.image_context, conditions.text_context
        )
        # Rays are float32 in both, and made in other batches.
        torch.testing.assert_close(lean, predict(model, exact, scale), atol=1e-6, rtol=1e-6)


def test_constants_hold_no_queries_and_one_text() -> None:
    model = build(5, "zeros")
    folded = conditions_of(model).folded
    assert folded is not None
    names = {name.rsplit(".", 1)[1]: tuple(value.shape[:2]) for name, value in folded.items()}
    assert names == {"keys": (2, 16), "values": (2, 16), "image": (2, 1), "text_keys": (1, 5), "text_values": (1, 5)}


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
