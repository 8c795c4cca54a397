"""Points in parts: the same values and gradients as in one call, without keeping a part's graph."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from threedrec.errors import InputError
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig
from threedrec.rendering import VolumeRenderer
from threedrec.rendering.recompute import in_parts


def field(normal_type: str = "analytic") -> ImplicitVolume:
    torch.manual_seed(0)
    model = ImplicitVolume(
        ImplicitVolume.Config(
            pos_encoding_config=EncodingConfig(n_levels=3, base_resolution=4, log2_hashmap_size=8),
            mlp_network_config=MLPConfig(n_neurons=8),
            normal_type=normal_type,
        )
    )
    with torch.no_grad():
        model.encoding.table.normal_(0.0, 0.3)
    return model


def points(count: int = 50) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(model: ImplicitVolume, size: int) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Outputs and parameter gradients of a loss that uses every column."""
    model.zero_grad()
    outputs = in_parts(lambda part: tuple(model(part, True)), points(), size, model.parameters())
    generator = torch.Generator().manual_seed(2)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    loss.backward()
    return tuple(out.detach() for out in outputs), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("size", [1, 7, 49])
@pytest.mark.parametrize("normal_type", ["analytic", "finite_difference", "pred"])
def test_parts_give_the_values_and_gradients_of_one_call(normal_type, size):
    model = field(normal_type)
    whole, expected = gradients(model, 50)
    parts, found = gradients(model, size)
    # Finite differences divide the rounding of densities by a hundredth.
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert all(grad.abs().sum() > 0 for grad in expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_no_part_keeps_its_graph():
    model = field()
    kept = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        in_parts(lambda part: (model(part).density,), points(), 10, model.parameters())
    assert kept and max(tensor.numel() for tensor in kept) <= 30  # the points of a part


def test_without_gradients_parts_are_only_parts():
    model = field()
    with torch.no_grad():
        (density,) = in_parts(lambda part: (model(part).density,), points(), 7, model.parameters())
        assert torch.allclose(density, model(points()).density, atol=1e-6) and not density.requires_grad
    frozen = model.requires_grad_(False)
    (density,) = in_parts(lambda part: (frozen(part).density,), points(), 7, frozen.parameters())
    assert not density.requires_grad


def test_a_negative_size_is_refused():
    with pytest.raises(InputError, match="renderer.train_chunk_size: must be 0 or more, got -1"):
        VolumeRenderer.Config(train_chunk_size=-1)
