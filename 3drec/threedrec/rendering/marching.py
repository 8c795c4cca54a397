"""From rays to samples: only those inside the box and inside occupied cells come into being.

Samples of all rays are packed into flat tensors, ordered by ray and, within a ray, by distance.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threedrec.rendering.occupancy import OccupancyGrid

TABLE = 2**25
"""Entries of the rays' table of candidates at a time: with what is computed on them, about 1 GB."""


class Intervals(NamedTuple):
    """N ray segments, packed."""

    ray_indices: Int[Tensor, " N"]
    """Which ray each belongs to; does not decrease."""
    starts: Float[Tensor, " N"]
    """Distance along the ray, world units."""
    ends: Float[Tensor, " N"]

    @property
    def middles(self) -> Float[Tensor, " N"]:
        """Distances of the sample points."""
        return 0.5 * (self.starts + self.ends)

    @property
    def lengths(self) -> Float[Tensor, " N"]:
        """Lengths of the segments."""
        return self.ends - self.starts

    def select(self, keep: Tensor) -> "Intervals":
        """Return the segments that a mask or index keeps."""
        return Intervals(self.ray_indices[keep], self.starts[keep], self.ends[keep])


def intersect_box(
    rays_o: Float[Tensor, "R 3"], rays_d: Float[Tensor, "R 3"], bounds: Float[Tensor, "2 3"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Return the distances at which rays enter and leave an axis-aligned box (slab method).

    The entry is not below 0. A ray that misses has exit <= entry.
    """
    # A direction component of exactly 0 would give 0 * inf = nan for an origin on the slab.
    safe = torch.where(rays_d.abs() < 1e-12, torch.full_like(rays_d, 1e-12), rays_d)
    first, second = (bounds[0] - rays_o) / safe, (bounds[1] - rays_o) / safe
    entry = torch.minimum(first, second).amax(-1).clamp(min=0.0)
    return entry, torch.maximum(first, second).amin(-1)


@torch.no_grad()
def march(
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    grid: OccupancyGrid,
    step_size: float,
    near: float = 0.0,
    far: float = 1e10,
    jitter: Float[Tensor, " R"] | None = None,
    skip: bool = True,
) -> Intervals:
    """Return the segments of equal length whose middle lies in the box and in an occupied cell.

    Segments tile a ray from its entry into the whole box, so what the grid skips does not move the others.

    Args:
        rays_o, rays_d: world units, unit directions.
        step_size: segment length.
        near, far: distance limits along the rays.
        jitter: in [0, 1) per ray; moves its segments towards the camera by that part of a step (stratified sampling:
            over many draws every point of the ray is a middle equally often).
        skip: False keeps the empty cells too.
    """
    radius = grid.radius
    box = torch.tensor([[-radius] * 3, [radius] * 3], device=rays_o.device, dtype=rays_o.dtype)
    anchor, _ = intersect_box(rays_o, rays_d, box)
    anchor = anchor.clamp(min=near)
    entry, leave = intersect_box(rays_o, rays_d, grid.bounds.to(rays_o.dtype) if skip else box)
    entry, leave = torch.maximum(entry, anchor), leave.clamp(max=far)
    offset = torch.zeros_like(anchor) if jitter is None else jitter
    base = anchor + (((entry - anchor) / step_size).floor() - offset) * step_size
    rays: tuple[Tensor, ...] = (rays_o, rays_d, entry, leave, base)
    if rays_o.is_cuda:
        # Which rays hit, and how far they go, is known on the device; to ask would be to wait for it.
        diagonal = grid.diagonal if skip else 2.0 * math.sqrt(3.0) * radius
        count = math.ceil(diagonal / step_size) + 3
        hits = torch.arange(len(rays_o), device=rays_o.device)
    else:
        hits = (leave > entry).nonzero()[:, 0]
        rays = tuple(part[hits] for part in rays)
        count = int(((rays[3] - rays[4]).max() / step_size).ceil().item()) + 1 if len(hits) else 0
    parts = [
        _segments(*part, count=count, step_size=step_size, grid=grid if skip else None)
        for part in zip(*(values.split(max(1, TABLE // max(1, count))) for values in (hits, *rays)), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return Intervals(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _segments(
    numbers: Int[Tensor, " R"],
    rays_o: Float[Tensor, "R 3"],
    rays_d: Float[Tensor, "R 3"],
    entry: Float[Tensor, " R"],
    leave: Float[Tensor, " R"],
    base: Float[Tensor, " R"],
    *,
    count: int,
    step_size: float,
    grid: OccupancyGrid | None,
) -> Intervals:
    """Return those of ``count`` segments from ``base`` on whose middle lies between entry and exit, in occupied cells.

    ``numbers`` are the rays' indices. A ray that misses has exit <= entry and gets none.
    """
    starts = base[:, None] + torch.arange(count, device=base.device, dtype=base.dtype) * step_size
    middles = starts + 0.5 * step_size
    keep = (middles >= entry[:, None]) & (middles < leave[:, None])
    if grid is not None:
        keep &= _occupied_along(rays_o, rays_d, middles, grid)
    rows, columns = keep.nonzero(as_tuple=True)
    chosen = starts[rows, columns]
    return Intervals(numbers[rows], chosen, chosen + step_size)


def _occupied_along(
    rays_o: Float[Tensor, "R 3"], rays_d: Float[Tensor, "R 3"], distances: Float[Tensor, "R S"], grid: OccupancyGrid
) -> Tensor:
    """Return ``grid.occupied`` of every point, (R, S), without building the (R, S, 3) points."""
    scale = grid.resolution / (2.0 * grid.radius)
    flat = torch.zeros_like(distances, dtype=torch.int32)
    for axis in range(3):
        origin, direction = (rays_o[:, axis, None] + grid.radius) * scale, rays_d[:, axis, None] * scale
        index = torch.addcmul(origin, distances, direction).int().clamp_(0, grid.resolution - 1)
        flat = flat.mul_(grid.resolution).add_(index)
    return grid.binary.index_select(0, flat.view(-1)).view_as(flat)
