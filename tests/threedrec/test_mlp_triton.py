"""The network's Triton kernels against their PyTorch twin in float64, in value and gradient.

On a GPU these are the compiled kernels; ``test_kernels_interpreted`` runs this file on the CPU.
"""

import os

import pytest
import torch
from torch import Tensor

from threedrec.errors import InputError
from threedrec.field import MLPConfig, VanillaMLP

REAL = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if REAL else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if not REAL:
    pytestmark = []

COUNT = 2**15 + 37 if REAL else 2 * 128 + 37
"""No multiple of a block, and more blocks than a kernel has programs."""
SIZES = [(1, 1), (1, 2), (3, 1), (3, 2), (16, 2)]
"""Outputs and hidden layers."""
ERRORS = {"float32": 1e-5, "tf32": 3e-3, "float16": 2e-3}
"""Of a block of values, relative to their norm: a few roundings of the products' factors."""


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with what is no number, so that what a kernel leaves out shows; give programs many blocks."""
    from threedrec.field import mlp_triton

    def spoilt(make):
        def wrapper(*args, **kwargs):
            return make(*args, **kwargs).fill_(torch.nan)

        return wrapper

    monkeypatch.setattr(torch, "empty_like", spoilt(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", spoilt(Tensor.new_empty))
    monkeypatch.setattr(mlp_triton, "PROGRAMS_PER_PROCESSOR", dict.fromkeys(mlp_triton.LAUNCH, 1))


def pair(outputs: int, layers: int, precision: str = "float32") -> tuple[VanillaMLP, VanillaMLP]:
    """The same network on Triton and, in float64, on PyTorch."""
    sizes = {"n_neurons": 32, "n_hidden_layers": layers}
    network = VanillaMLP(16, outputs, MLPConfig(**sizes, backend="triton", precision=precision)).to(DEVICE)
    twin = VanillaMLP(16, outputs, MLPConfig(**sizes, backend="torch")).to(DEVICE).double()
    twin.load_state_dict(network.state_dict())
    return network, twin


def inputs(network: VanillaMLP, count: int = COUNT) -> Tensor:
    """Fresh rows whose hidden neurons are all clearly on or off: at a kink the derivative is that of either side."""
    with torch.no_grad():
        first, *second = (weight.double() for weight in network.weights[:-1])
        x = torch.randn(4 * count + 8, first.shape[1], device=DEVICE)
        before = x.double() @ first.T
        clear = before.abs().amin(1) > 4e-3
        for weight in second:
            clear &= (before.relu() @ weight.T).abs().amin(1) > 4e-3
        x = x[clear][:count]
    assert len(x) == count
    return x.clone().requires_grad_(True)


def assert_near(got: Tensor, want: Tensor, error: float) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    assert torch.linalg.vector_norm(got.double() - want) <= error * torch.linalg.vector_norm(want)


def assert_trains_alike(
    network: VanillaMLP, twin: VanillaMLP, x: Tensor, works: tuple[bool, bool], error: float, size: float = 1.0
) -> None:
    """Compare gradients of a loss of the value (``works[0]``) and the slope (``works[1]``)."""
    exact_x = x.detach().double().requires_grad_(True)
    pulls = [size * torch.randn(len(x), width, device=DEVICE) for width in (1, x.shape[1])]
    grads = []
    for net, rows in ((network, x), (twin, exact_x)):
        parts = zip(net.with_gradient(rows), pulls, works, strict=True)
        loss = sum((part * pull.to(part)).sum() for part, pull, used in parts if used)
        grads.append(torch.autograd.grad(loss, [rows, *net.parameters()], allow_unused=True))
    for one, other in zip(*grads, strict=True):
        if other is None:
            # Where the slope alone is used, the inputs have no gradient.
            assert one is None and not works[0]
        else:
            assert_near(one, other, error)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
@pytest.mark.parametrize(("outputs", "layers"), SIZES)
def test_outputs_and_gradients_are_the_twins(outputs: int, layers: int, precision: str):
    network, twin = pair(outputs, layers, precision)
    x = inputs(network)
    exact_x = x.detach().double().requires_grad_(True)
    got, want = network(x), twin(exact_x)
    assert_near(got, want, ERRORS[precision])
    pull = torch.randn_like(want)
    grads = torch.autograd.grad(got, [x, *network.parameters()], pull.float())
    for one, other in zip(grads, torch.autograd.grad(want, [exact_x, *twin.parameters()], pull), strict=True):
        assert_near(one, other, 2 * ERRORS[precision])


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("works", [(True, True), (True, False), (False, True)], ids=["both", "value", "slope"])
def test_value_and_slope_are_the_twins_and_train_alike(layers: int, works: tuple[bool, bool], precision: str):
    network, twin = pair(1, layers, precision)
    x = inputs(network)
    for one, other in zip(network.with_gradient(x), twin.with_gradient(x.double()), strict=True):
        assert_near(one, other, ERRORS[precision])
    assert_trains_alike(network, twin, x, works, 2 * ERRORS[precision])


def test_gpus_with_less_shared_memory_train_alike(monkeypatch: pytest.MonkeyPatch):
    from threedrec.field import mlp_triton

    monkeypatch.setattr(mlp_triton, "has_ample_memory", lambda device: False)
    test_value_and_slope_are_the_twins_and_train_alike(2, (True, True), "tf32")
    test_any_number_of_rows(65)


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_gradients_of_any_size_survive_half_precision(size: float):
    network, twin = pair(1, 2, "float16")
    x = inputs(network)
    assert_trains_alike(network, twin, x, (True, True), 2 * ERRORS["float16"], size)
    y, want = network(x), twin(x.double())
    grads = torch.autograd.grad(size * y.sum(), network.weights)
    for one, other in zip(grads, torch.autograd.grad(size * want.sum(), twin.weights), strict=True):
        assert_near(one, other, 2 * ERRORS["float16"])


@pytest.mark.parametrize(("width", "neurons"), [(32, 64), (16, 16), (64, 32)])
def test_other_widths(width: int, neurons: int):
    sizes = {"n_neurons": neurons, "n_hidden_layers": 2}
    network = VanillaMLP(width, 1, MLPConfig(**sizes, backend="triton", precision="float32")).to(DEVICE)
    twin = VanillaMLP(width, 1, MLPConfig(**sizes, backend="torch")).to(DEVICE).double()
    twin.load_state_dict(network.state_dict())
    x = inputs(network, 150)
    for one, other in zip(network.with_gradient(x), twin.with_gradient(x.double()), strict=True):
        assert_near(one, other, ERRORS["float32"])
    assert_trains_alike(network, twin, x, (True, True), 2 * ERRORS["float32"])


@pytest.mark.parametrize("count", [0, 1, 16, 65])
def test_any_number_of_rows(count: int):
    network, twin = pair(1, 2)
    x = inputs(network, count)
    y, slope = network.with_gradient(x)
    assert y.shape == (count, 1) and slope.shape == x.shape and network(x).shape == (count, 1)
    grads = torch.autograd.grad(y.sum() + slope.square().sum(), network.weights)
    want = twin.with_gradient(x.double())
    expected = torch.autograd.grad(want[0].sum() + want[1].square().sum(), twin.weights)
    for one, other in zip(grads, expected, strict=True):
        assert_near(one, other, 2 * ERRORS["float32"])
    (again,) = torch.autograd.grad(network(x).sum(), network.weights[:1])
    assert_near(again, torch.autograd.grad(twin(x.double()).sum(), twin.weights[:1])[0], 2 * ERRORS["float32"])


def test_layouts_of_inputs_and_gradients_do_not_matter():
    network, twin = pair(1, 2)
    x = inputs(network).detach()
    wide = torch.full((len(x), 20), torch.nan, device=DEVICE)
    wide[:, 3:19] = x
    leaf = wide[:, 3:19].detach().requires_grad_(True)
    y, slope = network.with_gradient(leaf)
    torch.testing.assert_close(y, network.with_gradient(x)[0], rtol=0, atol=0)
    # Sums give gradients without strides.
    grads = torch.autograd.grad(y.sum() + slope.sum(), [leaf, *network.weights])
    exact = x.double().requires_grad_(True)
    want = twin.with_gradient(exact)
    expected = torch.autograd.grad(want[0].sum() + want[1].sum(), [exact, *twin.weights])
    for one, other in zip(grads, expected, strict=True):
        assert_near(one, other, 2 * ERRORS["float32"])


def test_gradients_repeat_themselves():
    network, _ = pair(1, 2, "tf32")
    x = inputs(network)

    def gradients() -> tuple[Tensor, ...]:
        y, slope = network.with_gradient(x)
        return torch.autograd.grad(y.square().sum() + slope.square().sum() + network(x).sum(), network.weights)

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_number_stays_none():
    network, _ = pair(1, 2)
    x = inputs(network).detach()
    x[5, 3] = torch.nan
    for values in (network(x), network.with_gradient(x)[0]):
        assert values[5].isnan().all() and values.isnan().sum() == 1


def test_networks_that_the_kernels_do_not_know():
    x = torch.zeros(3, 16, device=DEVICE)
    with pytest.raises(InputError, match="n_hidden_layers is 3, not 1 or 2"):
        VanillaMLP(16, 1, MLPConfig(n_hidden_layers=3, backend="triton")).to(DEVICE)(x)
    with pytest.raises(InputError, match="24 neurons"):
        VanillaMLP(16, 1, MLPConfig(n_neurons=24, backend="triton")).to(DEVICE)(x)
    with pytest.raises(InputError, match="only ReLU"):
        VanillaMLP(16, 1, MLPConfig(activation="Softplus", backend="triton")).to(DEVICE)(x)
    assert VanillaMLP(16, 1, MLPConfig(n_neurons=24)).to(DEVICE)(x).shape == (3, 1)
