"""The lean transformer block against its twin, and the passes and products that it is made of."""

from typing import Any

import pytest
import torch
from test_folded import build, check_against_the_exact_call, conditions_of, predict
from torch import Tensor, nn

from nvsadapter_guidance import lean_unet
from nvsadapter_guidance.lean_block import can_run_lean_block, merge
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.ray_patches import convolve_patches, positional_features
from nvsadapter_guidance.token_ops import normalise, place
from nvsadapter_guidance.triton_support import is_interpreted


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(model: NVSModel) -> list[Any]:
    return [block for block in model.network.unet.modules() if type(block).__name__ == "NVSTransformerBlock"]


@pytest.mark.parametrize("text_tokens", [1, 5])
@pytest.mark.parametrize("unconditional", ["zeros", "noise"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"image_attn_mode": "query_only", "query_composer_mode": "learnable_emb"},
        {"image_attn_mode": "support_query", "query_composer_mode": "all_to_all_attention"},
        {"view_attn_mode": "support_skip", "image_attn_mode": None, "query_composer_mode": "all_to_all"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_block_is_lean_and_equals_its_twin(
    adapter: dict[str, Any], unconditional: str, text_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(text_tokens, unconditional, **adapter)
    conditions, calls = conditions_of(model), []
    real = lean_unet.lean_block
    monkeypatch.setattr(lean_unet, "lean_block", lambda *args: calls.append(args[0]) or real(*args))
    found = predict(model, conditions)
    assert sorted(map(id, calls)) == sorted(map(id, blocks_of(model)))
    monkeypatch.setattr(lean_unet, "can_run_lean_block", lambda block: False)
    tolerance = 1e-5 if is_interpreted() else 1e-9  # kernels compute in float32
    torch.testing.assert_close(found, predict(model, conditions), atol=tolerance, rtol=tolerance)
    assert len(calls) == len(blocks_of(model))


def test_under_autocast_blocks_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(5, "noise").float()
    with torch.autocast("cpu", torch.bfloat16):
        conditions = conditions_of(model)
        found = predict(model, conditions)
        monkeypatch.setattr(lean_unet, "can_run_lean_block", lambda block: False)
        assert torch.equal(found, predict(model, conditions))


def test_merged_weights_are_no_state_and_stay_where_they_lie_while_they_follow_the_weights() -> None:
    model = build(5, "noise")
    names = set(model.network.state_dict())
    conditions_of(model)
    assert set(model.network.state_dict()) == names
    block = blocks_of(model)[0]
    place_before = block.merged_self.data_ptr()
    with torch.no_grad():
        block.attn1.to_k.weight.mul_(-2.0)
    conditions = conditions_of(model)
    assert block.merged_self.data_ptr() == place_before
    assert torch.equal(block.merged_self.chunk(3)[1], block.attn1.to_k.weight)
    check_against_the_exact_call(model, conditions)


def test_weights_merged_in_inference_mode_can_be_brought_up_to_date_outside_of_it() -> None:
    model = build(5, "noise")
    with torch.inference_mode():
        conditions_of(model)
    check_against_the_exact_call(model, conditions_of(model))


@pytest.mark.parametrize("layer", ["to_q", "to_out"])
def test_a_block_with_a_layer_of_another_kind_is_left_alone(layer: str) -> None:
    class Other(nn.Linear):
        pass

    block = blocks_of(build(1, "zeros"))[0]
    assert can_run_lean_block(block)
    assert not can_run_lean_block(block.train())
    block.eval()
    block.block_adapter.view_attn._modules[layer] = Other(4, 4)
    assert not can_run_lean_block(block)
    merge(block)
    assert block.merged_self is None


@pytest.mark.parametrize(("level", "bias"), [(0, True), (1, True), (2, False)])
def test_patches_make_the_convolution(level: int, bias: bool) -> None:
    side = 2**level
    conv = nn.Conv2d(7, 5, side, stride=side, bias=bias).double()
    x = draw(2, 7, 8, 12)
    torch.testing.assert_close(convolve_patches(conv, x), conv(x).flatten(2).transpose(1, 2))


def test_positional_features_in_half_precision_are_those_of_the_convolutions() -> None:
    model = build(1, "zeros").float()
    adapter = model.network.adapter
    rays = draw(3, adapter.config.posemb_dim, 8, 8).float()
    expected = positional_features(adapter, rays, torch.float32)
    for level, features in positional_features(adapter, rays, torch.bfloat16).items():
        assert features.dtype == torch.float16
        error = (features.float() - expected[level]).norm() / expected[level].norm()
        assert 0 < error < 2e-3
    assert set(expected) == set(adapter.levels)


DEVICE = "cpu" if is_interpreted() else "cuda"
needs_kernels = pytest.mark.skipif(False, reason="") if is_interpreted() else pytest.mark.gpu


def norm_of(channels: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels).double().requires_grad_(False)
    norm.weight.copy_(draw(channels, seed=8))
    norm.bias.copy_(draw(channels, seed=9))
    return norm


KINDS: list[dict[str, Any]] = [
    {},
    {"delta": True, "vectors": 2, "split": 1, "bias": True},
    {"vectors": 1, "factor": 2.0},
    {"delta": True, "out": True},
]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [40, 320, 1280])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "norm")
def test_the_kernel_normalises(kind: dict[str, Any], channels: int, dtype: torch.dtype) -> None:
    x, delta = (1.0 + draw(3, 5, channels, seed=seed) for seed in (0, 1))
    options = {
        "delta": delta if kind.get("delta") else None,
        "vectors": draw(kind["vectors"], channels, seed=2) if kind.get("vectors") else None,
        "bias": draw(channels, seed=3) if kind.get("bias") else None,
    }
    norm, rest = norm_of(channels), {"split": kind.get("split", 0), "factor": kind.get("factor", 1.0)}
    ready = {name: None if value is None else value.to(DEVICE, dtype) for name, value in options.items()}
    found_x = x.to(DEVICE, dtype)
    # Where the result goes is full of what would be noticed.
    out = torch.full_like(found_x, float("nan")) if kind.get("out") else None
    if dtype is torch.bfloat16:  # the same numbers for both
        x, options = found_x.cpu().double(), {k: None if v is None else v.cpu().double() for k, v in ready.items()}
    twin = norm_of(channels).to(dtype).double()
    s = x + (0.0 if options["delta"] is None else options["delta"])
    s = s * rest["factor"]
    if options["vectors"] is not None:
        rows = (torch.arange(3) >= rest["split"]).long() if len(options["vectors"]) == 2 else torch.zeros(3).long()
        s = s + options["vectors"][rows][:, None]
    expected = nn.functional.layer_norm(s, (channels,), twin.weight, twin.bias)
    found = normalise(found_x, norm.to(DEVICE, dtype), **ready, **rest, out=out)
    assert out is None or found is out
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    torch.testing.assert_close(found.cpu().double(), expected, **tolerance)
    kept = s if options["bias"] is None else s + options["bias"]
    torch.testing.assert_close(found_x.cpu().double(), kept, **tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [40, 320, 1280])
def test_the_kernel_places(channels: int, dtype: torch.dtype) -> None:
    x, delta, positional = (draw(3, 7, channels, seed=seed).to(DEVICE, dtype) for seed in range(3))
    total = x.double() + delta.double()
    expected = total + positional.double()
    found = place(x, delta, positional)
    assert found.data_ptr() == delta.data_ptr()
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype is torch.float32 else {"atol": 3e-2, "rtol": 1e-2}
    torch.testing.assert_close(x.double(), total, **tolerance)
    torch.testing.assert_close(found.double(), expected, **tolerance)
