"""Points in parts: the same values and gradients as in one call, without keeping a part's graph."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from threedrec.errors import InputError
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig
from threedrec.field.tape import Tape, remembered
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


class Slow:
    """A layer that counts how often it makes what it remembers."""

    def __init__(self) -> None:
        self.weight, self.made = torch.nn.Parameter(torch.tensor([1.5])), 0

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return ((self.weight * remembered(lambda: self.make(x))).tanh(),)

    def make(self, x: torch.Tensor) -> torch.Tensor:
        self.made += 1
        return (x * x).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("kept", "made"), [(0, 10), (1, 9), (2 * 40, 8), (10**6, 5)])
def test_parts_remember_as_much_as_there_is_memory_for(kept: int, made: int):
    slow, x = Slow(), points().float()
    whole = torch.autograd.grad(slow(x)[0].sum(), slow.weight)
    slow.made = 0
    (out,) = in_parts(slow, x, 10, [slow.weight], kept)  # ten numbers of four bytes a part
    torch.testing.assert_close(torch.autograd.grad(out.sum(), slow.weight, retain_graph=True), whole)
    assert slow.made == made
    torch.testing.assert_close(torch.autograd.grad(out.sum(), slow.weight), whole)  # what was kept is gone
    assert slow.made == made + 5


def test_a_second_run_that_differs_from_the_first_is_noticed():
    tape, value = Tape(), torch.ones(1)
    with tape.recording():
        remembered(lambda: value)
    with pytest.raises(RuntimeError, match="remembered less"), tape.replaying():
        pass
    with tape.replaying():
        assert remembered(torch.Tensor) is value
        with pytest.raises(RuntimeError, match="remembered more"):
            remembered(torch.Tensor)
    assert remembered(lambda: value) is value, "outside of a tape it is made"


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
