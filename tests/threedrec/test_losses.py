"""Every loss against a value worked out by hand, and its behaviour at the edges."""

import math

import pytest
import torch

from threedrec import losses


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


ALL = torch.ones(4, 1, dtype=torch.bool)


def test_rgb_and_mask_are_mean_squares():
    assert losses.rgb_loss(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.0, 0.0]])).item() == pytest.approx(
        1.25 / 3
    )
    assert losses.mask_loss(column(0.5, 1.0), column(0.0, 1.0)).item() == 0.125


def test_depth_ignores_scale_and_shift_of_the_target():
    depth = column(1.0, 2.0, 3.0, 4.0)
    assert losses.depth_loss(depth, -5.0 * depth + 3.0, ALL).item() == pytest.approx(0.0, abs=1e-10)
    # The best line through the points (0,1) (1,2) (0,3) (1,4) of target and depth leaves residuals of 1 everywhere.
    assert losses.depth_loss(depth, column(0.0, 1.0, 0.0, 1.0), ALL).item() == pytest.approx(1.0)
    assert losses.depth_loss(depth, torch.ones(4, 1), ALL).item() == pytest.approx(1.25)


def test_depth_only_looks_inside_the_mask():
    depth, target = column(1.0, 2.0, 3.0, 99.0), column(2.0, 4.0, 6.0, -1.0)
    mask = torch.tensor([[True], [True], [True], [False]])
    assert losses.depth_loss(depth, target, mask).item() == pytest.approx(0.0, abs=1e-10)
    assert losses.depth_rel_loss(depth, target, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_relative_depth_is_one_minus_pearson():
    depth = column(1.0, 2.0, 3.0, 4.0)
    assert losses.depth_rel_loss(depth, -depth, ALL).item() == pytest.approx(2.0)
    other = column(2.0, 1.0, 4.0, 3.0)
    expected = 1 - torch.corrcoef(torch.cat([depth, other], 1).T)[0, 1].item()
    assert losses.depth_rel_loss(depth, other, ALL).item() == pytest.approx(expected)


def test_empty_masks_give_zero_with_a_gradient():
    nothing = torch.zeros(4, 1, dtype=torch.bool)
    depth = column(1.0, 2.0, 3.0, 4.0).requires_grad_(True)
    normal = torch.rand(4, 3, requires_grad=True)
    total = losses.depth_loss(depth, depth, nothing) + losses.depth_rel_loss(depth, depth, nothing)
    total = total + losses.normal_loss(normal, normal.detach(), nothing)
    assert total.item() == 0.0
    total.backward()
    assert depth.grad.abs().max() == 0


def test_normal_is_one_minus_the_mean_cosine():
    normal = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert losses.normal_loss(normal, target, torch.ones(2, 1, dtype=torch.bool)).item() == pytest.approx(0.5)


def test_normal_smoothness_in_the_image():
    image = torch.zeros(1, 2, 2, 3)
    image[0, 1] = 1.0
    # Both vertical pairs differ by one in each channel, no horizontal pair does.
    assert losses.normal_smooth_loss(image).item() == 1.0
    image[0, 0, 1] = 1.0
    assert losses.normal_smooth_loss(image).item() == 1.0


def test_normal_smoothness_in_space():
    normal = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    perturbed = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert losses.normal_smooth_3d_loss(normal, perturbed).item() == pytest.approx(2 / 6)
    assert losses.normal_smooth_3d_loss(normal[:0], perturbed[:0]).item() == 0.0


def test_orientation_counts_visible_normals_that_look_away():
    weights = column(0.5, 0.5, 1.0).requires_grad_(True)
    normal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [0.0, 0.6, 0.8]], requires_grad=True)
    dirs = torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3)
    loss = losses.orient_loss(weights, normal, dirs, column(1.0, 0.9, 0.0))
    assert loss.item() == pytest.approx((0.5 + 0.64) / 2)
    loss.backward()
    assert weights.grad is None, "shape must not hide by becoming clear"
    assert normal.grad[1].abs().max() == 0


def test_sparsity_and_opacity_entropy():
    assert losses.sparsity_loss(column(0.0, 1.0)).item() == pytest.approx((0.1 + math.sqrt(1.01)) / 2)
    assert losses.opaque_loss(column(0.5)).item() == pytest.approx(math.log(2))
    edge = -(0.001 * math.log(0.001) + 0.999 * math.log(0.999))
    assert losses.opaque_loss(column(0.0, 1.0)).item() == pytest.approx(edge, rel=1e-4)


def test_charbonnier_is_quadratic_near_and_linear_far():
    near, far = losses.charbonnier(torch.tensor([[1e-4], [1.0]])).tolist()
    assert near == pytest.approx(0.5 * 1e-8 / 1e-2, abs=2e-8)  # r² / (2 · 0.01), to float32's digits
    assert far == pytest.approx(1.0 - 1e-2, abs=1e-4)


def test_charbonnier_is_a_mean_over_channels_and_forgets_the_sign():
    residual = torch.tensor([[0.1, -0.2, 0.3]])
    expected = losses.charbonnier(residual.abs().T).mean()
    torch.testing.assert_close(losses.charbonnier(residual)[0], expected)


def test_weights_default_to_the_released_recipe():
    config = losses.LossConfig()
    assert (config.lambda_sds, config.lambda_rgb, config.lambda_mask, config.lambda_opaque) == (0.1, 500.0, 50.0, 0.1)
    assert (config.lambda_normal_smooth, config.lambda_3d_normal_smooth) == (8.0, 8.0)
