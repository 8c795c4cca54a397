"""The encoder of score distillation against the model's own, in value and gradient."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_nvs import tiny_nvs_model
from torch import Tensor
from torch.nn import functional

from nvsadapter_guidance import frozen_encoder
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.frozen_encoder import LIMIT, FrozenEncoder
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import MemoryPlan
from nvsadapter_guidance.pipeline import Poses

PIXELS = 32 * 32


def images(count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("pixels", [None, 2 * PIXELS, 1])
def test_moments_and_gradients_are_those_of_the_model(pixels: int | None) -> None:
    vae = tiny_nvs_model().vae.double()
    views = images(dtype=torch.float64).requires_grad_()
    expected = vae.encode(views).latent_dist.parameters
    found = FrozenEncoder(vae, torch.float64, pixels)(views)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(moments.square().sum(), views)[0] for moments in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_half_precision_is_a_copy_that_keeps_the_direction_of_the_gradient() -> None:
    vae = tiny_nvs_model().vae
    encoder = FrozenEncoder(vae, torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    views = images().requires_grad_()
    found, expected = encoder(views), vae.encode(views).latent_dist.parameters
    assert found.dtype == torch.float32
    gradients = [torch.autograd.grad(moments.square().sum(), views)[0].flatten() for moments in (found, expected)]
    assert float(functional.cosine_similarity(*gradients, dim=0)) > 0.999


def test_the_models_own_encoder_is_frozen_and_one_that_is_copied_from_is_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vae = tiny_nvs_model().vae.requires_grad_(True).train()
        encoder = FrozenEncoder(vae, dtype)
        assert not encoder.encoder.training and not any(p.requires_grad for p in encoder.parameters())
        shared = dtype == torch.float32
        assert (encoder.encoder is vae.encoder) == shared
        assert all(p.requires_grad != shared for p in vae.encoder.parameters()) and vae.encoder.training != shared
        assert all(p.requires_grad for p in vae.decoder.parameters())


class FakeGraphs:
    """Stands for `GraphedMoments`, which need a GPU."""

    made: list[int] = []

    def __init__(self, encoder: FrozenEncoder, images: Tensor) -> None:
        self.weights, self.encoder = self, encoder
        self.made.append(len(images))

    def unchanged(self, modules: Any) -> bool:
        return True

    def forward(self, images: Tensor, owner: object) -> Tensor:
        return self.encoder.moments(images).detach()


def test_activations_of_few_batch_sizes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_encoder, "graphs_possible", lambda *_: True)
    monkeypatch.setattr(frozen_encoder, "GraphedMoments", FakeGraphs)
    monkeypatch.setattr(FakeGraphs, "made", [])
    encoder = FrozenEncoder(tiny_nvs_model().vae, torch.float32)
    for count in (3, 3, 2, 2, 3, 1, 1, 3):
        encoder(images(count).requires_grad_())
        assert len(encoder._captured) <= LIMIT
    assert FakeGraphs.made == [3, 2, 1], "two views were not seen for longest, so they made room"


def test_offloaded_weights_are_refused_at_once() -> None:
    model = tiny_nvs_model()
    guidance = ScoreDistillation(model)
    add_hook_to_module(model.vae, ModelHook())
    front = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
    for use in (
        lambda: ScoreDistillation(model),
        lambda: guidance.prepare(images(1), front, torch.Generator().manual_seed(0)),
    ):
        with pytest.raises(InputError, match="offloaded") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_score_distillation_through_it_keeps_latents_in_float32() -> None:
    model = tiny_nvs_model()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        guidance = ScoreDistillation(model, num_query=5, memory=MemoryPlan(), encoder_dtype=dtype)
        front = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
        guidance.prepare(images(1), front, torch.Generator().manual_seed(0))
        views, angle = images().requires_grad_(), torch.linspace(0, 180, 5)
        ring = Poses(angle, 0 * angle, torch.full_like(angle, 1.5))
        result = guidance(views, ring, (0.5, 0.5), torch.Generator().manual_seed(1))
        assert result.gradient.dtype == torch.float32
        found[dtype] = torch.autograd.grad(result.loss, views)[0].flatten()
    assert float(functional.cosine_similarity(*found.values(), dim=0)) > 0.999


def test_frozen_noise_is_drawn_once_and_fresh_noise_at_every_call() -> None:
    for frozen in (True, False):
        guidance = ScoreDistillation(tiny_nvs_model(unconditional_support="noise"), frozen_unconditional=frozen)
        front = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
        guidance.prepare(images(1), front, torch.Generator().manual_seed(0))
        assert guidance.conditions is not None
        assert (guidance.conditions.unconditional is not None) == frozen
