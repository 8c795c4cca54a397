"""Which triangle covers which pixel: a plain rasteriser without a loop over triangles."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 4_000_000
"""Candidate pixels handled at a time; bounds the memory to a few hundred MB."""


@dataclass(frozen=True)
class Coverage:
    """What every pixel of an image sees."""

    face: Int[Tensor, "H W"]
    """Index of the triangle, -1 where there is none."""
    barycentric: Float[Tensor, "H W 3"]
    """Weights of the triangle's corners at the pixel's centre; 0 where there is none."""


@torch.no_grad()
def rasterize(
    triangles: Float[Tensor, "F 3 2"], height: int, width: int, depth: Float[Tensor, "F 3"] | None = None
) -> Coverage:
    """Cover pixels with triangles; a pixel is covered when its centre (at +0.5) lies in the triangle or on its edge.

    Args:
        triangles: corners in pixels, x to the right and y downwards; either winding.
        depth: of the corners, linear over the image; the smallest wins. None: the triangle of highest index wins.
    """
    device = triangles.device
    size = torch.tensor([width, height], device=device)
    low = (triangles.amin(dim=1) - 0.5).ceil().long().clamp(min=0)
    high = torch.minimum((triangles.amax(dim=1) - 0.5).floor().long(), size - 1)
    extent = (high - low + 1).clamp(min=0)
    extent[~triangles.isfinite().all(dim=2).all(dim=1)] = 0
    counts = extent.prod(dim=1)
    face = torch.full((height * width,), -1, dtype=torch.long, device=device)
    weights = torch.zeros(height * width, 3, dtype=triangles.dtype, device=device)
    nearest = torch.full((height * width,), torch.inf, dtype=triangles.dtype, device=device)
    ends = counts.cumsum(0)
    start = 0
    while start < len(triangles):
        before = ends[start - 1] if start else torch.zeros_like(ends[0])
        stop = max(int(torch.searchsorted(ends, before + _CHUNK, right=True)), start + 1)
        owner, pixel, bary = _candidates(triangles, low, extent, counts, start, stop, width)
        order = owner.to(triangles.dtype).neg() if depth is None else (bary * depth[owner]).sum(dim=1)
        nearest.scatter_reduce_(0, pixel, order, "amin")
        wins = order == nearest[pixel]
        face[pixel[wins]] = owner[wins]
        weights[pixel[wins]] = bary[wins]
        start = stop
    return Coverage(face.view(height, width), weights.view(height, width, 3))


def _candidates(
    triangles: Tensor, low: Tensor, extent: Tensor, counts: Tensor, start: int, stop: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Triangle, pixel and barycentric coordinates of every covered pixel of triangles ``start`` to ``stop``."""
    counts = counts[start:stop]
    owner = torch.repeat_interleave(torch.arange(start, stop, device=triangles.device), counts)
    inner = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner - start]
    columns = extent[owner, 0]
    x, y = low[owner, 0] + inner % columns, low[owner, 1] + inner // columns
    points = torch.stack([x, y], dim=1) + 0.5
    a, b, c = triangles[owner].unbind(dim=1)
    areas = torch.stack([_area(points, b, c), _area(points, c, a), _area(points, a, b)], dim=1)
    total = _area(a, b, c)
    bary = areas / torch.where(total == 0, torch.inf, total)[:, None]
    # A little slack, so that no pixel falls between two triangles that share an edge.
    covered = (bary >= -1e-5).all(dim=1) & (total != 0)
    bary = bary[covered].clamp(min=0)
    return owner[covered], (y * width + x)[covered], bary / bary.sum(dim=1, keepdim=True)


def _area(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Twice the signed area."""
    u, v = b - a, c - a
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
