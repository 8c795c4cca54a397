"""Resizing as products against torch's own operation, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from nvsadapter_guidance.resize import multiplied, resize_bilinear


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 8, 8), 32), ((1, 3, 64, 64), 48), ((2, 1, 7, 9), 20)])
def test_products_are_torch_s_resizing(shape, size):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    found, expected = multiplied(images, size), resize_bilinear(images, size)
    assert found.shape == (*shape[:2], size, size)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.rand(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad(y, images, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "size"), [(64, 256), (512, 256)])
def test_on_a_gpu_gradients_are_the_same_and_repeat_themselves(side, size):
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    upstream = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).cuda()
    found = resize_bilinear(images, size)
    expected = F.interpolate(images, (size, size), mode="bilinear", antialias=side > size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    first, second = (torch.autograd.grad(resize_bilinear(images, size), images, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(expected, images, upstream)[0], atol=1e-4, rtol=1e-4)
