"""What the network of support and query views may and may not depend on, and the support cache."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.support_cache import SupportCache
from nvsadapter_guidance.unet import MultiViewUNet

CACHED_MODES = ["support_skip", "support_sattn", "support_sattn_mq"]
COMPOSERS = ["learnable_emb", "all_to_all_attention", "all_to_all", None]


def support_arguments(inputs: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    named = {key: value for key, value in inputs.items() if key not in ("query_latents", "timesteps")}
    return {**named, **changes}


def reorder(inputs: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    rays = inputs["ray_embedding"]
    return {
        **inputs,
        "query_latents": inputs["query_latents"][:, order],
        "ray_embedding": torch.cat((rays[:, :1], rays[:, 1:][:, order]), dim=1),
    }


@pytest.mark.parametrize("composer", COMPOSERS)
@torch.no_grad()
def test_reordering_query_views_reorders_the_output(composer: str | None) -> None:
    model = tiny_model(query_composer_mode=composer)
    inputs, order = tiny_inputs(model), [2, 0, 1]
    torch.testing.assert_close(model(**reorder(inputs, order)), model(**inputs)[:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("composer", COMPOSERS)
@torch.no_grad()
def test_views_see_each_other_only_through_the_composer(composer: str | None) -> None:
    model = tiny_model(query_composer_mode=composer)
    inputs = tiny_inputs(model)
    changed = {**inputs, "query_latents": inputs["query_latents"].clone()}
    changed["query_latents"][:, 2] += 1.0
    moved = (model(**changed)[:, 0] - model(**inputs)[:, 0]).abs().max().item()
    assert (moved > 1e-3) == (composer in ("learnable_emb", "all_to_all_attention"))


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    alone = {key: value[1:] for key, value in inputs.items()}
    torch.testing.assert_close(model(**inputs)[1:], model(**alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("view_mode", CACHED_MODES)
@pytest.mark.parametrize("image_mode", ["query_only", "support_query", None])
@torch.no_grad()
def test_cached_support_equals_the_exact_path(view_mode: str, image_mode: str | None) -> None:
    model = tiny_model(view_attn_mode=view_mode, image_attn_mode=image_mode).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny_inputs(model).items()}
    inputs["ucg_mask"] = torch.tensor([True, False])
    inputs["unconditional_support_latents"] = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    cache = model.encode_support(**support_arguments(inputs))
    cached = model(**{**inputs, "support_latents": None}, support_cache=cache)
    torch.testing.assert_close(cached, model(**inputs), atol=1e-9, rtol=0.0)


@torch.no_grad()
def test_one_cache_serves_any_number_of_views_and_any_timestep() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model, num_query=5)
    cache = model.encode_support(**support_arguments(inputs, ray_embedding=inputs["ray_embedding"][:, :1]))
    inputs["timesteps"] = torch.tensor([17, 980])
    cached = model(**{**inputs, "support_latents": None}, support_cache=cache)
    torch.testing.assert_close(cached, model(**inputs), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_join_repeat_and_split() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    one, two = (
        model.encode_support(**{key: value[i : i + 1] for key, value in support_arguments(inputs).items()})
        for i in (0, 1)
    )
    joined = SupportCache.cat((one, two))
    path = next(iter(joined.entries))
    assert joined.batch == 2 and one.expand(3).batch == 3
    order = joined.expand(2).select(torch.tensor([0, 2])).entries[path][0]
    assert torch.equal(order, joined.entries[path][0])
    assert one.to(torch.float16).entries[path][1].dtype == torch.float16
    with pytest.raises(InputError, match="support caches"):
        SupportCache.cat(())


@torch.no_grad()
def test_support_stream_does_not_see_the_queries() -> None:
    """The keys that query views attend to are the same whatever the queries are (recorded on the exact path)."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    cache = model.encode_support(**support_arguments(inputs))
    first, attention = next(iter(cache.entries)), {}
    layer = model.adapter.get_submodule(f"{first}.view_attn.to_k")
    layer.register_forward_hook(lambda module, args, output: attention.update(keys=output))
    for shift in (0.0, 3.0):
        model(**{**inputs, "query_latents": inputs["query_latents"] + shift})
        torch.testing.assert_close(attention["keys"], cache.entries[first][0], atol=1e-5, rtol=1e-5)


def test_cross_attending_support_cannot_be_cached() -> None:
    model = tiny_model(view_attn_mode="support_xattn")
    inputs = tiny_inputs(model)
    assert model(**inputs).shape == inputs["query_latents"].shape
    with pytest.raises(InputError, match="support_xattn"):
        model.encode_support(**support_arguments(inputs))


@torch.no_grad()
def test_unconditional_samples_ignore_image_rays_and_support() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    fixed = {"ucg_mask": torch.tensor([True, True]), "unconditional_support_latents": torch.randn(2, 1, 3, 8, 8)}
    expected = model(**inputs, **fixed)
    for name in ("image_context", "ray_embedding", "support_latents"):
        before = inputs[name].clone()
        assert torch.equal(model(**{**inputs, name: inputs[name] + 1.0}, **fixed), expected)
        assert torch.equal(inputs[name], before)
    assert not torch.equal(model(**{**inputs, "text_context": inputs["text_context"] + 1.0}, **fixed), expected)


@torch.no_grad()
def test_unconditional_support_noise_comes_from_the_generator() -> None:
    model = tiny_model()
    inputs = {**tiny_inputs(model), "ucg_mask": torch.tensor([True, False])}
    first, again, other = (model(**inputs, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        model.train()
        inputs = tiny_inputs(model)
        latents = inputs["query_latents"].requires_grad_(True)
        model(**inputs).square().sum().backward()
        gradients.append([latents.grad, *(parameter.grad for parameter in model.adapter.trainable_parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_compiles_without_graph_breaks() -> None:
    model = tiny_model()
    inputs: dict[str, Any] = {
        **tiny_inputs(model),
        "ucg_mask": torch.tensor([True, False]),
        "unconditional_support_latents": torch.randn(2, 1, 3, 8, 8),
    }
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), model(**inputs))


@torch.no_grad()
def test_a_copy_is_independent() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    other: MultiViewUNet = copy.deepcopy(model)
    for parameter in other.adapter.parameters():
        parameter.zero_()
    assert torch.equal(model(**inputs), expected)
    assert not torch.allclose(other(**inputs), expected)


@torch.no_grad()
def test_a_single_text_token_needs_no_queries() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model, text_tokens=1)
    with torch.enable_grad():
        exact = model(**inputs)
    torch.testing.assert_close(model(**inputs), exact.detach(), atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_named() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("support_latents: missing", {"support_latents": None}),
        ("support_latents: hold 2", {"support_latents": inputs["support_latents"].repeat(1, 2, 1, 1, 1)}),
        ("ray_embedding", {"ray_embedding": inputs["ray_embedding"][:, 1:]}),
        ("grid", {"ray_embedding": inputs["ray_embedding"][..., :4]}),
        ("control_images", {"control_images": torch.zeros(2, 4, 3, 64, 64)}),
    ]
    for message, change in cases:
        with pytest.raises(InputError, match=message):
            model(**{**inputs, **change})
    cache = model.encode_support(**{key: value[:1] for key, value in support_arguments(inputs).items()})
    with pytest.raises(InputError, match="support_cache"):
        model(**inputs, support_cache=cache)
