"""The kernels of sums, gates and doubled images against torch's operations.

On a GPU these are the compiled kernels; ``test_group_norm_interpreted`` runs this file on the CPU by Triton's
interpreter.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nvsadapter_guidance.feed_forward import fused_gate
from nvsadapter_guidance.lean_layers import add, enlarge
from nvsadapter_guidance.triton_support import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
needs_kernels = pytest.mark.skipif(False, reason="") if is_interpreted() else pytest.mark.gpu


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64, 4, 8), (1, 40, 9, 11), (1, 320, 5, 5)])
def test_a_sum_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = torch.channels_last
    first, second = (normal(*shape, seed=seed).to(dtype, memory_format=layout).requires_grad_() for seed in (0, 1))
    bias = normal(shape[1], seed=2).to(dtype)
    found = add(first, second, bias)
    assert found.grad_fn is not None and "Sum" in type(found.grad_fn).__name__
    expected = (first.double() + second.double() + bias.double()[:, None, None]).to(dtype)
    torch.testing.assert_close(found, expected)
    upstream = normal(*shape, seed=3).to(dtype)
    for gradient in torch.autograd.grad(found, (first, second), upstream):
        assert torch.equal(gradient, upstream)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 64, 4, 8), (3, 40, 9, 11)])
def test_a_sum_with_a_border_and_its_gradient(shape: tuple[int, ...]) -> None:
    layout = torch.channels_last
    first, second = (normal(*shape, seed=seed).to(memory_format=layout).requires_grad_() for seed in (0, 1))
    bias = normal(shape[1], seed=2)
    found = add(first, second, bias, border=True)
    expected = functional.pad(first + second + bias[:, None, None], (0, 1, 0, 1))
    assert found.grad_fn is not None and "Sum" in type(found.grad_fn).__name__
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected)
    upstream = normal(*found.shape, seed=3)
    for gradient in torch.autograd.grad(found, (first, second), upstream):
        assert torch.equal(gradient, upstream[:, :, :-1, :-1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 40, 1280])
def test_a_gate(width: int, dtype: torch.dtype) -> None:
    projected = 3.0 * normal(2, 3, 2 * width).to(dtype)
    value, gate = projected.double().chunk(2, dim=-1)
    expected = value * functional.gelu(gate)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(fused_gate(projected).double(), expected, atol=tolerance, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 64, 4, 8), (1, 40, 9, 11), (3, 130, 5, 1)])
def test_an_image_of_twice_the_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(*shape).to(torch.bfloat16, memory_format=torch.channels_last)
    size = (2 * shape[2], 2 * shape[3])
    expected = functional.interpolate(x, size=size, mode="nearest")
    monkeypatch.setattr(functional, "interpolate", None)
    found = enlarge(x, size)
    assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(found, expected)


def test_an_image_of_another_size() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(enlarge(x, (7, 9)), functional.interpolate(x, size=(7, 9), mode="nearest"))
