"""The fused group normalisation against torch's, in value and gradient.

On a GPU these are the compiled kernels; ``test_group_norm_interpreted`` runs this file on the CPU by Triton's
interpreter.
"""

import pytest
import torch
from torch import Tensor, nn

from nvsadapter_guidance.group_norm import (
    branch_group_norm_silu,
    fused_group_norm_silu,
    group_norm_silu,
    plain_group_norm_silu,
)
from nvsadapter_guidance.triton_support import is_interpreted

DEVICE = "cpu" if is_interpreted() else "cuda"
needs_kernels = pytest.mark.skipif(False, reason="") if is_interpreted() else pytest.mark.gpu
SHAPES = [(2, 32, 8, 8, 8), (1, 60, 5, 7, 6), (1, 40, 48, 64, 2), (2, 320, 8, 8, 32), (1, 8, 72, 64, 4)]
"""Samples, channels, height, width, groups: the third has more tiles than one program unites at a time, the last other
tiles, others have channels or rows left over."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, nn.GroupNorm, Tensor, Tensor]:
    samples, channels, height, width, groups = shape
    draw = torch.Generator().manual_seed(channels)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    norm.weight.data, norm.bias.data = 1.0 + 0.3 * normal(channels), normal(channels)
    x = 3.0 * normal(samples, channels, height, width) + 5.0
    place = {"device": DEVICE, "dtype": dtype}
    x, upstream = (t.to(**place, memory_format=torch.channels_last) for t in (x, normal(*x.shape)))
    return x, norm.to(**place).requires_grad_(False), normal(samples, channels).to(**place), upstream


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("offsets", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], offsets: int, silu: bool) -> None:
    x, norm, offset, upstream = inputs(shape, torch.float32)
    given = offset[:offsets] if offsets else None
    leaf = x.double().requires_grad_()
    exact = plain_group_norm_silu(leaf, norm.double(), None if given is None else given.double(), silu)
    (exact_gradient,) = torch.autograd.grad(exact, leaf, upstream.double())
    norm.float()
    found = fused_group_norm_silu(x.requires_grad_(), norm, given, silu)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, exact.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, exact_gradient.float(), atol=2e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_of_a_branch_and_of_what_it_leaves(shape: tuple[int, ...], used: tuple[bool, bool]) -> None:
    x, norm, offset, upstream = inputs(shape, torch.float32)
    x.requires_grad_()
    found = branch_group_norm_silu(x, norm, offset)
    assert torch.equal(found[1], x) and "FusedGroupNorm" in type(found[0].grad_fn).__name__
    expected = plain_group_norm_silu(x, norm, offset), x + 0.0
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    results = []
    for pair in (found, expected):
        parts = [part for part, wanted in zip(pair, used, strict=True) if wanted]
        results.append(torch.autograd.grad(parts, x, [upstream, 2.0 * upstream][: len(parts)], retain_graph=True)[0])
    torch.testing.assert_close(*results, atol=3e-5, rtol=1e-5)


@needs_kernels
def test_a_large_mean_costs_no_digits() -> None:
    x, norm, _, _ = inputs(SHAPES[0], torch.float32)
    moved = (x.double() + 1000.0).float()
    exact = plain_group_norm_silu(moved.double(), norm.double())
    torch.testing.assert_close(fused_group_norm_silu(moved, norm.float()), exact.float(), atol=1e-3, rtol=1e-3)


@needs_kernels
def test_half_precision_rounds_no_more_than_torch() -> None:
    x, norm, offset, upstream = inputs(SHAPES[3], torch.bfloat16)
    leaf = x.double().requires_grad_()
    exact = plain_group_norm_silu(leaf, norm.double(), offset.double())
    (exact_gradient,) = torch.autograd.grad(exact, leaf, upstream.double())
    norm.bfloat16()
    found = fused_group_norm_silu(x.requires_grad_(), norm, offset)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    for got, want in ((found, exact), (gradient, exact_gradient)):
        assert float((got.double() - want).norm() / want.norm()) < 4e-3


@needs_kernels
def test_a_width_first_seen_in_inference_mode_has_gradients_later() -> None:
    x, norm, _, _ = inputs((1, 24, 4, 4, 4), torch.float32)
    with torch.inference_mode():
        first = fused_group_norm_silu(x, norm)
    later = fused_group_norm_silu(x.requires_grad_(), norm)
    assert torch.equal(first, later) and torch.autograd.grad(later.sum(), x)[0].isfinite().all()


@pytest.mark.gpu
def test_kernels_run_where_their_tensors_lie() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, norm, _, upstream = inputs(SHAPES[0], torch.float32)
    expected = fused_group_norm_silu(x.requires_grad_(), norm)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    assert torch.cuda.current_device() == 0
    layout = torch.channels_last
    other = x.detach().to("cuda:1", memory_format=layout).requires_grad_()
    found = fused_group_norm_silu(other, norm.to("cuda:1"))
    (found_gradient,) = torch.autograd.grad(found, other, upstream.to("cuda:1", memory_format=layout))
    assert torch.equal(found.cpu(), expected.cpu()) and torch.equal(found_gradient.cpu(), gradient.cpu())


def test_other_layouts_and_trained_norms_take_torch_s_operations() -> None:
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = group_norm_silu(x, norm)
    torch.testing.assert_close(found, nn.functional.silu(norm(x)))
    assert torch.autograd.grad(found.sum(), norm.weight)[0].abs().max() > 0.0
