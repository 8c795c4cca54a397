"""Packed volume rendering against numbers worked out by hand and a loop over rays."""

import math

import torch

from threedrec.rendering.compositing import (
    ExclusiveSum,
    RaySums,
    accumulate,
    exclusive_sum,
    render_weights,
    transmittance_and_opacity,
    visible,
)

RAYS = torch.tensor([0, 0, 0, 2, 2, 5])


def test_exclusive_sums_restart_at_every_ray():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 7.0])
    assert exclusive_sum(values, RAYS).tolist() == [0.0, 1.0, 3.0, 0.0, 10.0, 0.0]


def test_transmittance_by_hand():
    # Optical depths chosen as -ln of simple numbers: opacities 1/2, 3/4, 0 | 0.9, 1/2 | 1 (opaque).
    depth = torch.tensor([math.log(2), math.log(4), 0.0, math.log(10), math.log(2), 1e6])
    transmittance, opacity = transmittance_and_opacity(depth / 0.5, torch.full((6,), 0.5), RAYS)
    torch.testing.assert_close(opacity, torch.tensor([0.5, 0.75, 0.0, 0.9, 0.5, 1.0]))
    torch.testing.assert_close(transmittance, torch.tensor([1.0, 0.5, 0.125, 1.0, 0.1, 1.0]))
    weights = render_weights(depth / 0.5, torch.full((6,), 0.5), RAYS)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.375, 0.0, 0.9, 0.05, 1.0]))
    total = accumulate(weights, torch.ones(6, 1), RAYS, 6)[:, 0]
    torch.testing.assert_close(total, torch.tensor([0.875, 0.0, 0.95, 0.0, 0.0, 1.0]))


def test_weights_sum_to_one_minus_what_passes_all():
    generator = torch.Generator().manual_seed(0)
    rays = torch.randint(40, (500,), generator=generator).sort().values
    density, lengths = torch.rand(500, generator=generator) * 5, torch.rand(500, generator=generator) * 0.1
    passed = torch.exp(-torch.zeros(40).index_add(0, rays, density * lengths))
    opacity = accumulate(render_weights(density, lengths, rays), torch.ones(500, 1), rays, 40)[:, 0]
    torch.testing.assert_close(opacity, 1 - passed)


def test_values_and_gradients_equal_a_loop_over_rays():
    generator = torch.Generator().manual_seed(1)
    rays = torch.randint(7, (40,), generator=generator).sort().values
    density = torch.rand(40, dtype=torch.float64, generator=generator).mul(9).requires_grad_(True)
    lengths = torch.rand(40, dtype=torch.float64, generator=generator) * 0.2
    colors = torch.rand(40, 3, dtype=torch.float64, generator=generator)
    pull = torch.randn(7, 3, dtype=torch.float64, generator=generator)

    rows = []
    for ray in range(7):
        color, light = torch.zeros(3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for index in (rays == ray).nonzero()[:, 0].tolist():
            alpha = 1 - torch.exp(-density[index] * lengths[index])
            color, light = color + light * alpha * colors[index], light * (1 - alpha)
        rows.append(color)
    expected = torch.stack(rows)
    got = accumulate(render_weights(density, lengths, rays), colors, rays, 7)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad((got * pull).sum(), density), torch.autograd.grad((expected * pull).sum(), density)
    )


def test_many_opaque_rays_do_not_disturb_a_faint_one():
    # The running sum passes through 5e8 before the last ray; its transmittances must still be exact to float32.
    rays = torch.cat([torch.arange(500000), torch.full((3,), 500000)])
    density = torch.cat([torch.full((500000,), 1e9), torch.full((3,), 0.01)])
    transmittance, _ = transmittance_and_opacity(density, torch.ones(500003), rays)
    torch.testing.assert_close(transmittance[-3:], torch.tensor([0.0, -0.01, -0.02]).exp(), atol=1e-6, rtol=0)


def test_invisible_samples_are_those_behind_or_clear():
    density = torch.tensor([0.0, 20.0, 20.0, 1.0, 20.0, 1.0])
    keep = visible(density, torch.full((6,), 0.5), RAYS, min_transmittance=1e-4, min_opacity=0.01)
    assert keep.tolist() == [False, True, False, True, True, True]
    keep = visible(density, torch.full((6,), 1.0), RAYS, min_transmittance=1e-4)
    assert keep.tolist() == [True, True, False, True, True, True]


def test_no_samples_at_all():
    empty, rays = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert accumulate(render_weights(empty, empty, rays), torch.zeros(0, 3), rays, 4).tolist() == [[0.0] * 3] * 4


def packed(count: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, rays with gaps and runs of many lengths, and cotangents."""
    generator = torch.Generator().manual_seed(0)
    rays = torch.randint(0, 60, (count,), generator=generator).sort().values
    return torch.rand(count, generator=generator), rays, torch.randn(count, generator=generator)


def test_exclusive_sums_for_a_gpu_equal_those_for_the_cpu():
    values, rays, pull = packed()
    results = []
    for function in (exclusive_sum, ExclusiveSum.apply):
        leaf = values.clone().requires_grad_(True)
        out = function(leaf, rays)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, pull)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


def test_ray_sums_for_a_gpu_equal_those_for_the_cpu():
    weights, rays, _ = packed()
    values = torch.randn(len(weights), 4, generator=torch.Generator().manual_seed(1))
    pull = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    results = []
    for function in (accumulate, RaySums.apply):
        leaves = [weights.clone().requires_grad_(True), values.clone().requires_grad_(True)]
        out = function(*leaves, rays, 64)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, pull)))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(cpu, gpu, rtol=1e-6, atol=1e-6)
    assert (RaySums.apply(weights[:0], values[:0], rays[:0], 3) == 0).all()
