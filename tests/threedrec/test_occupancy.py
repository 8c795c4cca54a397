"""The occupancy grid: what it marks, what it forgets, and its bounds."""

import torch

from threedrec.rendering.occupancy import OccupancyGrid, step_length


def ball(radius: float, height: float = 100.0):
    return lambda points: height * (points.norm(dim=-1, keepdim=True) < radius)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_everything_is_occupied_before_the_first_update():
    grid = OccupancyGrid(8, 1.0)
    assert grid.occupied(torch.rand(20, 3) * 2 - 1).all()
    assert grid.bounds.tolist() == [[-1.0] * 3, [1.0] * 3]


def test_cells_inside_are_marked_and_far_ones_are_not():
    grid = OccupancyGrid(32, 1.0)
    grid.update(0, ball(0.5), 0.05, seeded())
    points = torch.rand(4000, 3, generator=seeded(1)) * 2 - 1
    distance, cell_diagonal = points.norm(dim=-1), 3**0.5 * 2 / 32
    occupied = grid.occupied(points)
    assert occupied[distance < 0.5 - cell_diagonal].all()
    assert not occupied[distance > 0.5 + 2 * cell_diagonal].any()


def test_holes_of_single_cells_are_closed():
    grid = OccupancyGrid(8, 1.0)
    hole = torch.tensor([[0.125, 0.125, 0.125]])
    grid.update(0, lambda points: 100.0 * ((points - hole).abs() > 0.125).any(1, True), 0.1, None)
    assert grid.occupied(hole)


def test_bounds_enclose_the_occupied_cells_exactly():
    grid = OccupancyGrid(16, 1.0)
    grid.update(
        0, lambda points: 100.0 * ((points - torch.tensor([0.3, 0.0, -0.3])).abs() < 0.2).all(1, True), 0.1, None
    )
    low, high = grid.bounds
    # Cells of 1/8 that the cube from (0.1, -0.2, -0.5) to (0.5, 0.2, -0.1) touches, and one more on each side.
    assert (low >= torch.tensor([-0.125, -0.375, -0.625])).all() and (low <= torch.tensor([0.1, -0.2, -0.5])).all()
    assert (high <= torch.tensor([0.625, 0.375, 0.125])).all() and (high >= torch.tensor([0.5, 0.2, -0.1])).all()


def test_occupancy_decays_when_the_field_empties_but_not_at_once():
    grid = OccupancyGrid(8, 1.0, threshold=0.3, decay=0.5)
    inside = torch.zeros(1, 3)
    grid.update(0, ball(2.0), 0.05, seeded())
    half_empty = lambda points: 100.0 * (points[:, :1] > 0.5)  # noqa: E731
    seen = []
    for step in (16, 32, 48, 64):
        grid.update(step, half_empty, 0.05, seeded(step))
        seen.append(bool(grid.occupied(inside)))
    assert seen[0] and not seen[-1]


def test_late_updates_reach_new_places():
    grid = OccupancyGrid(8, 1.0, warmup_steps=10)
    grid.update(0, ball(0.3), 0.05, seeded())
    corner = torch.full((1, 3), 0.8)
    assert not grid.occupied(corner)
    for step in range(16, 16 * 30, 16):
        grid.update(step, ball(2.0), 0.05, seeded(step))
    assert grid.occupied(corner)


def test_refresh_forgets_the_past():
    grid = OccupancyGrid(8, 1.0)
    grid.update(0, ball(2.0), 0.05, seeded())
    grid.refresh(ball(0.4), 0.05, seeded())
    assert not grid.occupied(torch.full((1, 3), 0.9))
    assert grid.occupied(torch.zeros(1, 3))


def test_an_empty_field_is_looked_at_everywhere():
    grid = OccupancyGrid(8, 1.0)
    grid.update(0, lambda points: torch.zeros(len(points), 1), 0.05, seeded())
    assert grid.binary.all()


def test_a_faint_field_keeps_its_better_half():
    grid = OccupancyGrid(16, 1.0)
    grid.update(0, lambda points: 1e-3 * (points[:, :1] > 0), 0.05, seeded())
    assert grid.binary.float().mean() == 9 / 16, "and one layer around it"


def test_updates_are_seeded_and_survive_saving():
    first, second = OccupancyGrid(8, 1.0, warmup_steps=0), OccupancyGrid(8, 1.0, warmup_steps=0)
    for grid in (first, second):
        grid.update(16, ball(0.5), 0.05, seeded(3))
    assert torch.equal(first.opacity, second.opacity)
    third = OccupancyGrid(8, 1.0)
    third.load_state_dict(first.state_dict())
    assert torch.equal(third.binary, first.binary) and torch.equal(third.bounds, first.bounds)


def test_step_length_is_the_diagonal_over_the_samples():
    assert step_length(1.0, 512) == 2 * 3**0.5 / 512
