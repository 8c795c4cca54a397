"""Signed distances and colours of objects made of a few parts, as plain tensor arithmetic without branches.

Every part is the same solid with different numbers: a rounded rectangle (half sizes a, b, corner radius r) extruded
along its z axis (half height h), whose size follows a profile along z (so cones, barrels, vases), hollow or full, with
rounded edges. That one formula covers boxes, cylinders, cones, capsules, balls, rings, tubes and lathe profiles, so a
batch of different objects is one computation. Distances follow Quilez's constructions
(https://iquilezles.org/articles/distfunctions/); where a profile or a stretch bends space they are scaled down to stay
lower bounds, as sphere tracing needs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

FAR = 10.0  # distance of a part that is not there


@dataclass
class Parts:
    """N objects of K parts in object space (x front, z up); a part's own axes are turned by ``rotation``."""

    centre: Float[Tensor, "n k 3"]
    rotation: Float[Tensor, "n k 9"]  # rows: the part's axes in object space
    stretch: Float[Tensor, "n k 3"]  # along the part's axes, after all else
    half: Float[Tensor, "n k 3"]  # a, b, h, edge rounding left out
    corner: Float[Tensor, "n k 1"]  # r, at most min(a, b)
    rounding: Float[Tensor, "n k 1"]  # of all edges; adds to half sizes
    profile: Float[Tensor, "n k 3"]  # size = 1 + p0 u + p1 u^2 + p2 sin(3 u), with u = z / h in [-1, 1]
    wall: Float[Tensor, "n k 1"]  # half thickness of a hollow part's wall; 0: full
    carve: Float[Tensor, "n k 1"]  # 1: taken away from the parts before it; 0: added
    blend: Float[Tensor, "n k 1"]  # radius of the smooth union with the parts before it
    mirrored: Float[Tensor, "n k 1"]  # 1: also there with y negated
    absent: Float[Tensor, "n k 1"]  # 1: not there
    colour: Float[Tensor, "n k 6"]  # two RGB colours
    pattern: Float[Tensor, "n k 4"]  # amounts of the second colour's stripes, checks, noise, front disc
    waves: Float[Tensor, "n k 6"]  # pattern wave vector (radians per unit, part axes) and phases

    def packed(self) -> Float[Tensor, "n k p"]:
        """All numbers in one tensor, in the order of the fields."""
        return torch.cat([getattr(self, field.name) for field in fields(self)], dim=-1)


_WIDTHS = (3, 9, 3, 3, 1, 1, 3, 1, 1, 1, 1, 1, 6, 4, 6)  # of the fields, in order
_OFFSETS = {field.name: sum(_WIDTHS[:index]) for index, field in enumerate(fields(Parts))}
Points = tuple[Tensor, Tensor, Tensor]  # x, y, z, each (m, r): apart, they fuse into one kernel


def _get(row: Tensor, field: str, index: int = 0) -> Float[Tensor, "m 1"]:
    return row[:, _OFFSETS[field] + index, None]


def to_part(points: Points, row: Float[Tensor, "m p"]) -> Points:
    """Object-space points in a part's own axes, unstretched."""
    x, y, z = points
    y = torch.where(_get(row, "mirrored") > 0.5, y.abs(), y)
    x, y, z = (value - _get(row, "centre", axis) for axis, value in enumerate((x, y, z)))
    turned = []
    for axis in range(3):
        along = [_get(row, "rotation", 3 * axis + column) for column in range(3)]
        turned.append((along[0] * x + along[1] * y + along[2] * z) / _get(row, "stretch", axis))
    return turned[0], turned[1], turned[2]


def part_distance(local: Points, row: Float[Tensor, "m p"]) -> Float[Tensor, "m r"]:
    """Signed distance (or a lower bound of it) from points in a part's axes to its surface."""
    x, y, z = local
    half_a, half_b, half_h = (_get(row, "half", axis) for axis in range(3))
    corner, rounding = _get(row, "corner"), _get(row, "rounding")
    slope, bulge, ripple = (_get(row, "profile", index) for index in range(3))
    height = half_h + rounding
    u = (z / height).clamp(-1, 1)
    size = (1 + slope * u + bulge * u * u + ripple * torch.sin(3 * u)).clamp_min(0.05)
    qx, qy = x.abs() - (half_a - corner) * size, y.abs() - (half_b - corner) * size
    flat = _length(qx.clamp_min(0), qy.clamp_min(0)) + torch.maximum(qx, qy).clamp_max(0) - corner * size
    wall = _get(row, "wall")
    flat = torch.where(wall > 0, (flat + wall).abs() - wall, flat)
    tall = z.abs() - half_h
    distance = torch.maximum(flat, tall).clamp_max(0) + _length(flat.clamp_min(0), tall.clamp_min(0)) - rounding
    steepest = (slope.abs() + 2 * bulge.abs() + 3 * ripple.abs()) * torch.maximum(half_a, half_b) / height
    stretch = torch.minimum(torch.minimum(_get(row, "stretch", 0), _get(row, "stretch", 1)), _get(row, "stretch", 2))
    return distance * stretch / (1 + steepest * steepest).sqrt() + FAR * _get(row, "absent")


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y + 1e-12).sqrt()


def join_part(total: Float[Tensor, "m r"], points: Points, row: Float[Tensor, "m p"]) -> Float[Tensor, "m r"]:
    """The distance to an object after one more part has been added to it or carved out of it."""
    own = part_distance(to_part(points, row), row)
    blend = _get(row, "blend").clamp_min(1e-4)
    overlap = (blend - (total - own).abs()).clamp_min(0)
    joined = torch.minimum(total, own) - overlap * overlap / (4 * blend)
    return torch.where(_get(row, "carve") > 0.5, torch.maximum(total, -own), joined)


def paint_part(nearest: Tensor, colour: Points, points: Points, row: Tensor) -> tuple[Tensor, Points]:
    """The nearest surface and its colour after one more part, as in :func:`join_part`."""
    local = to_part(points, row)
    own = part_distance(local, row)
    carve = _get(row, "carve") > 0.5
    wins = torch.where(carve, -own > nearest - 1e-3, own < nearest)
    nearest = torch.where(wins, torch.where(carve, -own, own), nearest)
    amount = _pattern(local, row)
    channels = []
    for channel in range(3):
        first, second = (_get(row, "colour", channel + 3 * index) for index in range(2))
        channels.append(torch.where(wins, first + amount * (second - first), colour[channel]))
    return nearest, (channels[0], channels[1], channels[2])


@dataclass(frozen=True)
class Kernels:
    """The two inner functions, as they are or compiled; the same ones serve every part, step and picture."""

    join: Callable[[Tensor, Points, Tensor], Tensor] = join_part
    paint: Callable[[Tensor, Points, Points, Tensor], tuple[Tensor, Points]] = paint_part


EAGER = Kernels()


@cache
def compiled_kernels() -> Kernels:
    """Both functions fused by ``torch.compile``."""
    return Kernels(torch.compile(join_part), torch.compile(paint_part))


def distance(points: Points, packed: Float[Tensor, "m k p"], kernels: Kernels = EAGER) -> Float[Tensor, "m r"]:
    """Signed distance from each of r points to each of m objects, parts joined in order."""
    x, y, z = (value.expand(len(packed), -1) for value in points)
    total = torch.full_like(x, FAR)
    for row in packed.unbind(1):
        total = kernels.join(total, (x, y, z), row)
    return total


def normal(points: Points, packed: Float[Tensor, "m k p"], kernels: Kernels = EAGER, step: float = 2e-3) -> Points:
    """Outward unit normals by differences over a tetrahedron."""
    gradient = [torch.zeros_like(points[0]) for _ in range(3)]
    for signs in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        x, y, z = (value + sign * step for value, sign in zip(points, signs, strict=True))
        value = distance((x, y, z), packed, kernels)
        gradient = [total + sign * value for total, sign in zip(gradient, signs, strict=True)]
    x, y, z = gradient
    length = (x * x + y * y + z * z).sqrt().clamp_min(1e-9)
    return x / length, y / length, z / length


def albedo(points: Points, packed: Float[Tensor, "m k p"], kernels: Kernels = EAGER) -> Points:
    """RGB in [0, 1] at surface points: that of the nearest part (of the carving part where one cut the surface)."""
    nearest = torch.full_like(points[0], math.inf)
    colour = (torch.zeros_like(nearest), torch.zeros_like(nearest), torch.zeros_like(nearest))
    for row in packed.unbind(1):
        nearest, colour = kernels.paint(nearest, colour, points, row)
    return colour


def _pattern(local: Points, row: Tensor) -> Float[Tensor, "m r"]:
    waves = [_get(row, "waves", index) for index in range(6)]
    x, y, z = (value * wave + phase for value, wave, phase in zip(local, waves[:3], waves[3:], strict=True))
    stripes = torch.sigmoid(8 * torch.sin(x + y + z))
    checks = torch.sigmoid(24 * torch.sin(x) * torch.sin(y) * torch.sin(z))
    rough = torch.sin(x + 1.3 * torch.sin(2 * y)) + torch.sin(y + 1.7 * torch.sin(2 * z)) + torch.sin(z + 2 * x)
    half_b, half_h = (_get(row, "half", axis) + _get(row, "rounding") for axis in (1, 2))
    offset = 0.3 * torch.sin(waves[3]), 0.3 * torch.sin(waves[4])  # off centre, so that left and right differ
    disc = 0.55 - _length(local[1] / half_b - offset[0], local[2] / half_h - offset[1])
    front = torch.sigmoid(30 * disc) * (local[0] > 0)
    amounts = [_get(row, "pattern", index) for index in range(4)]
    kinds = (stripes, checks, torch.sigmoid(2 * rough), front)
    return sum((amount * kind for amount, kind in zip(amounts, kinds, strict=True)), torch.zeros_like(x)).clamp(0, 1)
