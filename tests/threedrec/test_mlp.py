"""The small network: its derivative written out, and what the configuration may ask for."""

import pytest
import torch
from torch import Tensor

from threedrec.errors import InputError
from threedrec.field import MLPConfig, VanillaMLP


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["ReLU", "Softplus"])
def test_the_derivative_is_that_of_autograd_and_trains_like_it(kind: str, layers: int):
    torch.manual_seed(layers)
    network = VanillaMLP(5, 1, MLPConfig(activation=kind, n_neurons=7, n_hidden_layers=layers)).double()
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    output, slope = network.with_gradient(x)
    expected = network(x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), x, create_graph=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(slope, expected_slope)

    pull, across = torch.randn_like(output), torch.randn_like(slope)

    def gradients(y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        loss = (y * pull).sum() + (dy * across).sum()
        return torch.autograd.grad(loss, [x, *network.parameters()])

    got = gradients(output, slope)
    for one, other in zip(got, gradients(expected, expected_slope), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        for one, other in zip(network.with_gradient(x), (output, slope), strict=True):
            assert one.grad_fn is None
            torch.testing.assert_close(one, other)


def test_backends_are_named_and_refused_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        InputError, match=r"mlp_network_config\.backend: unknown backend 'cuda'; use one of auto, triton"
    ):
        VanillaMLP(16, 1, MLPConfig(backend="cuda"))
    with pytest.raises(InputError, match="the device is no CUDA GPU; use auto or torch"):
        VanillaMLP(16, 1, MLPConfig(backend="triton"))(torch.zeros(2, 16))
    assert VanillaMLP(16, 1, MLPConfig(backend="auto"))(torch.zeros(2, 16)).shape == (2, 1)
