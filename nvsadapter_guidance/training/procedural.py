"""Banks of procedural objects: drawn, traced and shaded on one device, all objects of a chunk at once.

Rays march by sphere tracing (Hart 1996) through the objects' distance fields. A first pass marches one cone for each
tile of the picture, which drops empty tiles and starts the others close to the surface. Lights are those of the
rendered meshes. Lengths inside are in object space, where an object is about one unit across; a world point p is
``p / scale + centre`` there.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training import sdf
from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.mesh_dataset import elevations_anywhere
from nvsadapter_guidance.training.recipes import random_parts
from nvsadapter_guidance.training.render_meshes import DISTANCE, FOVY
from nvsadapter_guidance.training.views import ViewBank

TILE = 16  # side in samples
CONE_STEPS = 28
RAY_STEPS = 32
REACH = 0.52  # world radius that holds every object


@dataclass(frozen=True)
class Tracing:
    """Sizes of a rendering: pixels a side, samples a pixel a side, tiles at once, and whether to compile."""

    size: int = 128
    supersample: int = 2
    tiles: int = 256
    compiled: bool = False

    @property
    def kernels(self) -> sdf.Kernels:
        """The inner functions, compiled or not."""
        return sdf.compiled_kernels() if self.compiled else sdf.EAGER

    @property
    def samples(self) -> int:
        """Samples along a side of the picture."""
        return self.size * self.supersample

    @property
    def tiles_per_side(self) -> int:
        """Tiles along a side of the picture."""
        return self.samples // TILE


def render_procedural(
    count: int,
    generator: torch.Generator,
    *,
    views: int = 10,
    size: int = 128,
    supersample: int = 2,
    compiled: bool | None = None,
    objects_at_once: int | None = None,
    tiles_at_once: int | None = None,
) -> ViewBank:
    """Draw and render ``count`` random objects.

    Of the views, four in ten ring the object at elevation 0, two in ten at elevation 30, each ring from a random
    phase; the others lie anywhere at elevations in [-10, 80] degrees.

    Args:
        count: number of objects.
        generator: its device renders and holds the bank.
        views: views of each object, at least 5.
        size: side of a view in pixels, such that ``size * supersample`` is a multiple of 16.
        supersample: samples per pixel along each side.
        compiled: fuse the arithmetic with ``torch.compile`` (on CUDA by default).
        objects_at_once, tiles_at_once: bound the memory; 512 and 16384 on CUDA, 16 and 256 on the CPU by default.

    Raises:
        InputError: a size or count cannot be rendered.
    """
    if count < 1 or views < 5 or size < 1 or size * supersample % TILE:
        raise InputError(
            f"count={count}, views={views}, size={size}, supersample={supersample}: give count >= 1, views >= 5 and a "
            f"size * supersample that is a multiple of {TILE}"
        )
    cuda = generator.device.type == "cuda"
    tracing = Tracing(
        size, supersample, tiles_at_once or (16384 if cuda else 256), cuda if compiled is None else compiled
    )
    parts, kinds = random_parts(count, generator)
    packed = parts.packed()
    azimuth, elevation = orbit_views(count, views, generator)
    radius = 0.44 + 0.06 * torch.rand(count, generator=generator, device=generator.device)
    rgba = torch.empty((count, views, size, size, 4), dtype=torch.uint8, device=generator.device)
    at_once = objects_at_once or (512 if cuda else 16)
    for start in range(0, count, at_once):
        rows = slice(start, start + at_once)
        few = 64 if cuda else 1
        placed = [placement(*some) for some in zip(packed[rows].split(few), radius[rows].split(few), strict=True)]
        centre, scale = (torch.cat(column) for column in zip(*placed, strict=True))
        cameras = object_cameras(azimuth[rows], elevation[rows], centre, scale)
        rgba[rows] = trace(packed[rows], cameras, scale, tracing)
    names = tuple(f"procedural_{index:06d}_{kind}" for index, kind in enumerate(kinds))
    return ViewBank(rgba, azimuth, elevation, torch.full_like(azimuth, DISTANCE), names, FOVY)


def orbit_views(
    count: int, views: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n v"]]:
    """Azimuths and elevations in degrees: a level ring, a ring at 30, the others anywhere."""
    device = generator.device
    level, raised = round(0.4 * views), round(0.2 * views)
    phase = 360 * torch.rand((count, 1), generator=generator, device=device)
    rings = [phase + 360 / number * torch.arange(number, device=device) for number in (level, raised)]
    free = views - level - raised
    anywhere = 360 * torch.rand((count, free), generator=generator, device=device)
    elevation = torch.zeros((count, views), device=device)
    elevation[:, level : level + raised] = 30.0
    elevation[:, level + raised :] = elevations_anywhere(torch.rand((count, free), generator=generator, device=device))
    return torch.cat([*rings, anywhere], dim=1) % 360, elevation


def placement(
    packed: Float[Tensor, "n k p"], radius: Float[Tensor, " n"], resolution: int = 40
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
    """Where objects lie: the centre of their box, and the scale that brings their farthest point to ``radius``.

    Found on a grid over [-1.1, 1.1]; the half cell of slack keeps objects within the radius.
    """
    axis = torch.linspace(-1.1, 1.1, resolution, device=packed.device)
    points = torch.cartesian_prod(axis, axis, axis)
    spacing = float(axis[1] - axis[0])
    x, y, z = points.T[:, None]
    inside = sdf.distance((x, y, z), packed) < 0.6 * spacing
    far = torch.where(inside[..., None], points, -math.inf).amax(1)
    near = torch.where(inside[..., None], points, math.inf).amin(1)
    centre = torch.where(torch.isfinite(far), (far + near) / 2, 0.0)
    reach = torch.where(inside, torch.linalg.vector_norm(points - centre[:, None], dim=-1), 0.0).amax(1)
    return centre, radius / reach.clamp_min(0.1)


def object_cameras(
    azimuth: Float[Tensor, "n v"],
    elevation: Float[Tensor, "n v"],
    centre: Float[Tensor, "n 3"],
    scale: Float[Tensor, " n"],
) -> Float[Tensor, "n v 12"]:
    """Cameras in object space: position, then the world directions of image right, image up and the view axis."""
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    zero = torch.zeros_like(azimuth)
    outward = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], -1)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), zero], dim=-1)
    up = torch.linalg.cross(outward, right)
    position = DISTANCE * outward / scale[:, None, None] + centre[:, None]
    return torch.cat([position, right, up, -outward], dim=-1)


def trace(
    packed: Float[Tensor, "n k p"],
    cameras: Float[Tensor, "n v 12"],
    scale: Float[Tensor, " n"],
    tracing: Tracing,
) -> UInt8[Tensor, "n v h w 4"]:
    """Render every view of every object as straight-alpha RGBA."""
    count, views = cameras.shape[:2]
    per_side = tracing.tiles_per_side
    start, active = _cone_pass(packed, cameras.flatten(0, 1), scale, tracing)
    pixels = TILE // tracing.supersample
    tiles = torch.zeros((count * views * per_side**2, pixels, pixels, 4), dtype=torch.uint8, device=packed.device)
    indices = active.nonzero()[:, 0]
    for chunk in indices.split(tracing.tiles):
        # the last chunk is filled up with its first tile, so that compiled code sees one shape
        padded = torch.cat([chunk, chunk[:1].expand(tracing.tiles - len(chunk))]) if tracing.compiled else chunk
        tiles[padded] = _render_tiles(padded, packed, cameras.flatten(0, 1), scale, start, tracing)
    grid = tiles.view(count, views, per_side, per_side, pixels, pixels, 4)
    return grid.permute(0, 1, 2, 4, 3, 5, 6).reshape(count, views, tracing.size, tracing.size, 4)


def _cone_pass(
    packed: Tensor, cameras: Float[Tensor, "nv 12"], scale: Tensor, tracing: Tracing
) -> tuple[Float[Tensor, " t"], Tensor]:
    """How far every tile's cone of rays goes before it may touch something, and whether it touches at all."""
    per_side, views = tracing.tiles_per_side, len(cameras) // len(packed)
    corner = torch.cartesian_prod(*[torch.arange(per_side, device=packed.device) * TILE] * 2)
    middle = (corner.float() + TILE / 2)[None].expand(len(cameras), -1, -1)
    origin, direction = _rays(cameras, middle[..., 0], middle[..., 1], tracing)
    objects = torch.arange(len(packed), device=packed.device).repeat_interleave(views)
    each = packed[objects]
    slope = math.sqrt(2) * TILE / tracing.samples * math.tan(math.radians(FOVY / 2))
    scales = scale[objects, None]
    depth = ((DISTANCE - REACH) / scales).expand(-1, per_side**2)
    for _ in range(CONE_STEPS):
        gap = sdf.distance(_at(origin, direction, depth), each, tracing.kernels) - slope * depth
        depth = depth + gap.clamp_min(0) / (1 + slope)
    return depth.flatten(), (depth < (DISTANCE + REACH) / scales).flatten()


def _render_tiles(
    tiles: Int[Tensor, " m"],
    packed: Tensor,
    cameras: Float[Tensor, "nv 12"],
    scale: Tensor,
    start: Float[Tensor, " t"],
    tracing: Tracing,
) -> UInt8[Tensor, "m h w 4"]:
    per_side, views = tracing.tiles_per_side, len(cameras) // len(packed)
    view, place = tiles // per_side**2, tiles % per_side**2
    objects = view // views
    sample = torch.arange(TILE * TILE, device=packed.device)
    row = (place // per_side * TILE)[:, None] + sample // TILE + 0.5
    column = (place % per_side * TILE)[:, None] + sample % TILE + 0.5
    origin, direction = _rays(cameras[view], row, column, tracing)
    each = packed[objects]
    depth = start[tiles, None].expand(-1, TILE * TILE).contiguous()
    for _ in range(RAY_STEPS):
        depth = depth + sdf.distance(_at(origin, direction, depth), each, tracing.kernels)
    footprint = 2 * math.tan(math.radians(FOVY / 2)) / tracing.samples
    rgba = _shade(_at(origin, direction, depth), each, 1.25 * footprint * depth, tracing.kernels)
    pixels = TILE // tracing.supersample
    blocks = rgba.view(len(tiles), pixels, tracing.supersample, pixels, tracing.supersample, 4).mean(dim=(2, 4))
    colour = blocks[..., :3] / blocks[..., 3:].clamp_min(1e-6)
    return (255 * torch.cat([colour, blocks[..., 3:]], dim=-1)).round().clamp(0, 255).to(torch.uint8)


def _rays(
    cameras: Float[Tensor, "m 12"], row: Float[Tensor, "m r"], column: Float[Tensor, "m r"], tracing: Tracing
) -> tuple[sdf.Points, sdf.Points]:
    """Origins (m, 1) and unit directions (m, r) through sample positions counted from the top left corner."""
    half = math.tan(math.radians(FOVY / 2))
    x, y = (2 * column / tracing.samples - 1) * half, (1 - 2 * row / tracing.samples) * half
    length = (1 + x * x + y * y).sqrt()
    position, right, up, axis = (cameras[:, 3 * index : 3 * index + 3] for index in range(4))
    origin = [position[:, index, None] for index in range(3)]
    direction = [
        (axis[:, index, None] + x * right[:, index, None] + y * up[:, index, None]) / length for index in range(3)
    ]
    return (origin[0], origin[1], origin[2]), (direction[0], direction[1], direction[2])


def _at(origin: sdf.Points, direction: sdf.Points, depth: Tensor) -> sdf.Points:
    x, y, z = (start + depth * along for start, along in zip(origin, direction, strict=True))
    return x, y, z


def _shade(
    points: sdf.Points, packed: Tensor, tolerance: Float[Tensor, "m r"], kernels: sdf.Kernels
) -> Float[Tensor, "m r 4"]:
    """Premultiplied colour and coverage where rays ended; a surface farther than ``tolerance`` was missed."""
    hit = (sdf.distance(points, packed, kernels) < tolerance).float()
    x, y, z = sdf.normal(points, packed, kernels)
    light = torch.full_like(x, AMBIENT)
    for source in LIGHTS:
        towards = source.direction
        light = light + source.intensity * (x * towards[0] + y * towards[1] + z * towards[2]).clamp_min(0)
    colour = [channel * light * hit for channel in sdf.albedo(points, packed, kernels)]
    return torch.stack([*colour, hit], dim=-1)
