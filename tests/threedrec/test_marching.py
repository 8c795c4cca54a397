"""Ray marching: boxes, tiling, occupancy, order."""

import torch
from torch.nn import functional

from threedrec.rendering.marching import intersect_box, march
from threedrec.rendering.occupancy import OccupancyGrid

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def random_rays(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    origins = functional.normalize(torch.randn(count, 3, generator=generator), dim=-1) * 2.5
    targets = torch.rand(count, 3, generator=generator) * 2 - 1
    return origins, functional.normalize(targets - origins, dim=-1)


def test_box_entries_and_exits_by_hand():
    origins = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    directions = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    entry, leave = intersect_box(origins, directions, BOX)
    assert (entry[0].item(), leave[0].item()) == (2.0, 4.0)
    assert (entry[1].item(), leave[1].item()) == (0.0, 1.0)
    assert leave[2] <= entry[2], "passes beside the box"
    assert leave[3] <= entry[3], "looks away from the box"


def test_segments_tile_the_ray_inside_the_box():
    origins, directions = random_rays()
    grid = OccupancyGrid(4, 1.0)
    intervals = march(origins, directions, grid, 0.05)
    entry, leave = intersect_box(origins, directions, BOX)
    for ray in range(0, 200, 17):
        mine = intervals.select(intervals.ray_indices == ray)
        torch.testing.assert_close(mine.starts[1:], mine.ends[:-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.starts[0], entry[ray], atol=1e-5, rtol=0)
        assert (leave[ray] - mine.ends[-1]).abs() <= 0.05
    points = origins[intervals.ray_indices] + intervals.middles[:, None] * directions[intervals.ray_indices]
    assert points.abs().max() <= 1.0 + 1e-5


def test_samples_are_ordered_by_ray_and_distance():
    origins, directions = random_rays()
    intervals = march(origins, directions, OccupancyGrid(4, 1.0), 0.1, jitter=torch.rand(200))
    rays, starts = intervals.ray_indices, intervals.starts
    assert (rays[1:] >= rays[:-1]).all()
    assert ((starts[1:] > starts[:-1]) | (rays[1:] > rays[:-1])).all()


def test_skipping_keeps_exactly_the_samples_in_occupied_cells():
    origins, directions = random_rays()
    grid = OccupancyGrid(16, 1.0)
    grid.update(0, lambda points: 100.0 * (points.norm(dim=-1, keepdim=True) < 0.4), 0.05, None)
    jitter = torch.rand(200, generator=torch.Generator().manual_seed(1))
    every = march(origins, directions, grid, 0.05, jitter=jitter, skip=False)
    points = origins[every.ray_indices] + every.middles[:, None] * directions[every.ray_indices]
    expected = every.select(grid.occupied(points))
    got = march(origins, directions, grid, 0.05, jitter=jitter)
    assert 0 < len(got.ray_indices) < len(every.ray_indices)
    assert torch.equal(got.ray_indices, expected.ray_indices)
    torch.testing.assert_close(got.starts, expected.starts, atol=1e-5, rtol=0)


def test_jitter_makes_every_distance_equally_likely():
    count = 20000
    origins, directions = torch.tensor([[2.0, 0.1, 0.2]]).expand(count, 3), torch.tensor([[-1.0, 0.0, 0.0]])
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(0))
    middles = march(origins, directions.expand(count, 3), OccupancyGrid(4, 1.0), 0.25, jitter=jitter).middles
    histogram = torch.histc(middles, bins=16, min=1.0, max=3.0) / len(middles)
    torch.testing.assert_close(histogram, torch.full((16,), 1 / 16), atol=4e-3, rtol=0)


def test_near_and_far_limits_hold():
    origins, directions = random_rays()
    intervals = march(origins, directions, OccupancyGrid(4, 1.0), 0.05, near=2.0, far=2.5)
    assert intervals.middles.min() >= 2.0 and intervals.middles.max() <= 2.5


def test_rays_that_miss_give_nothing():
    origins = torch.full((3, 3), 5.0)
    intervals = march(origins, functional.normalize(origins, dim=-1), OccupancyGrid(4, 1.0), 0.05)
    assert len(intervals.ray_indices) == 0 and len(intervals.middles) == 0
