"""One transformer block in every mode against the golden tensors, intermediate results included."""

from typing import Any, Dict

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from golden_files import GOLDEN, GoldenFile, assert_relative, golden, golden_file, needs_golden
from torch import Tensor

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.blocks import CONTEXT_KEY, BlockAdapter, NVSTransformerBlock, ViewContext
from nvsadapter_guidance.conversion import released_block_name

pytestmark = [golden, needs_golden]


def variants() -> list[str]:
    return list(golden_file("block").options["variants"]) if GOLDEN.is_dir() else ["absent"]


def build_block(file: GoldenFile, variant: str) -> tuple[NVSTransformerBlock, BlockAdapter]:
    options = file.options
    weights = {**file.weights(), **file.weights(f"{variant}.")}
    config = NVSAdapterConfig(
        latent_resolution=options["feat_resolution"],
        image_context_dim=weights["image_attn_module.to_k.weight"].shape[1],
        **options["variants"][variant]["overrides"],
    )
    dim, heads, inner = options["dim"], options["n_heads"], options["n_heads"] * options["d_head"]
    base = BasicTransformerBlock(
        dim, heads, options["d_head"], cross_attention_dim=weights["attn2.to_k.weight"].shape[1]
    )
    base.load_state_dict({key: weights[key] for key in base.state_dict()})
    adapter = BlockAdapter(config, "block", 0, dim, heads, inner)
    adapter.load_state_dict({key: weights[released_block_name(key)] for key in adapter.state_dict()})
    return NVSTransformerBlock(base, adapter).eval(), adapter


def block_inputs(file: GoldenFile, variant: str) -> tuple[Tensor, Tensor, Tensor, ViewContext]:
    num_query = file.options["variants"][variant]["num_query"]
    named = {}
    for name in ("x", "text_context", "image_context", "posemb"):
        own = f"{variant}.{name}"
        named[name] = file[own] if own in file else file[f"in.n{num_query}.{name}"]
    rows = file.options["batch"] * file.options["num_support"]
    views = ViewContext(rows, num_query, {0: named["posemb"]}, named["image_context"])
    return named["x"], named["text_context"], named["posemb"], views


@pytest.mark.parametrize("variant", variants())
def test_block_output(variant: str) -> None:
    file = golden_file("block")
    block, _ = build_block(file, variant)
    x, text, _, views = block_inputs(file, variant)
    kwargs: Dict[str, Any] = {"encoder_hidden_states": text, "cross_attention_kwargs": {CONTEXT_KEY: views}}
    with torch.no_grad():
        assert_relative(block(x, **kwargs), file[f"{variant}.out"])
    assert_relative(block(x, **kwargs), file[f"{variant}.out"])


@torch.no_grad()
def intermediate(file: GoldenFile, variant: str) -> Dict[str, Tensor]:
    """The block step by step, with the names of the golden set."""
    block, adapter = build_block(file, variant)
    x, text, positional, views = block_inputs(file, variant)
    rows = views.support_rows
    steps = {}
    x = steps["after_attn1"] = block.attn1(block.norm1(x)) + x

    def delta(support: Tensor | None, query: Tensor | None, like: Tensor) -> Tensor:
        full = torch.zeros_like(like)
        if support is not None:
            full[:rows] = support
        if query is not None:
            full[rows:] = query
        return full

    located = x + positional
    x = x + steps.setdefault("composer_delta", delta(None, adapter.composer_delta(located[rows:], views), x))
    located = x + positional
    x = x + steps.setdefault("view_attn_delta", delta(*adapter.view_deltas(located[:rows], located[rows:], views), x))
    x = x + steps.setdefault("image_attn_delta", delta(*adapter.image_deltas(x[:rows], x[rows:], views), x))
    steps["after_image_attn"] = x
    steps["after_attn2"] = block.attn2(block.norm2(x), encoder_hidden_states=text) + x
    return steps


def test_intermediate_results() -> None:
    file = golden_file("block")
    compared = 0
    for variant in variants():
        names = [name for name in file.tensors if name.startswith(f"{variant}.")]
        steps = intermediate(file, variant) if any("delta" in name or "after" in name for name in names) else {}
        for name in names:
            step = name[len(variant) + 1 :]
            if step in steps:
                assert_relative(steps[step], file[name])
                compared += 1
    assert compared > 0
