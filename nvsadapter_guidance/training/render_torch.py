"""A textured mesh seen from many cameras at once, in plain PyTorch: fast on a GPU, and it needs no VTK.

It draws what :class:`nvsadapter_guidance.training.render_meshes.MeshRenderer` draws, in the same frames and under the
same lights; the two differ in a few pixels where surfaces coincide or an edge passes close to a sample.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.mesh_files import load_parts
from nvsadapter_guidance.training.render_meshes import (
    FOVY,
    Camera,
    corner_colours,
    corner_normals,
    plain_colour,
    texture_image,
    world_from_gltf,
)

CANDIDATES = {"cuda": 1 << 24, "cpu": 1 << 21}
"""Pairs of a triangle and a sample that are looked at together; each takes about 100 bytes."""
SAMPLES = {"cuda": 1 << 24, "cpu": 1 << 21}
"""Samples of all views that are rendered together."""
_NOTHING = torch.iinfo(torch.int64).max


class Surface(NamedTuple):
    """Triangles in the world's frame with what their corners carry; colours and textures in [0, 1]."""

    points: Float[Tensor, "F 3 3"]
    normals: Float[Tensor, "F 3 3"]
    colours: Float[Tensor, "F 3 3"]
    coordinates: Float[Tensor, "F 3 2"]
    """Of the texture, v upwards."""
    texture: Int[Tensor, " F"]
    """Index into ``textures``, -1 for a face that shows its colours."""
    textures: list[Float[Tensor, "h w 3"]]


class TorchMeshRenderer:
    """Renders one mesh after another on a torch device.

    Args:
        size: side of the square views in pixels.
        supersample: samples per pixel along each side.
        device: where.
    """

    def __init__(self, size: int = 128, supersample: int = 4, device: torch.device | str = "cpu") -> None:
        self.size, self.supersample, self.device = size, supersample, torch.device(device)
        self.surface: Surface | None = None
        """The mesh in view; may be set to one of :func:`surface_of`."""

    def load(self, path: Path, scale: float = 1.0) -> None:
        """Replace the mesh by a file's (glTF axes), its points multiplied by ``scale``.

        Raises:
            InputError: the file cannot be read as a mesh.
        """
        self.show(load_parts(path, "none"), scale)

    def show(self, parts: Sequence[Any], scale: float = 1.0) -> None:
        """Replace the mesh by ``trimesh.Trimesh`` parts with faces, in glTF axes."""
        self.surface = surface_of(parts, scale, self.device)

    def render_all(self, cameras: Sequence[Camera]) -> UInt8[Tensor, "V size size 4"]:
        """Views as straight-alpha RGBA on the renderer's device; cameras look at the origin from outside the mesh."""
        side = self.size * self.supersample
        if self.surface is None or not cameras:
            return torch.zeros(len(cameras), self.size, self.size, 4, dtype=torch.uint8, device=self.device)
        poses = torch.tensor(cameras, dtype=torch.float32, device=self.device)
        together = max(1, SAMPLES[self.device.type] // side**2)
        return torch.cat([self._render(self.surface, part) for part in poses.split(together)])

    @torch.no_grad()
    def _render(self, surface: Surface, poses: Float[Tensor, "V 3"]) -> UInt8[Tensor, "V size size 4"]:
        side, count = self.size * self.supersample, len(poses)
        projected = project(surface.points, poses, side)
        face = nearest_faces(projected, side)
        seen = (face >= 0).nonzero()[:, 0]
        samples = torch.zeros(count * side * side, 4, device=self.device)
        samples[seen, :3] = shade(surface, projected, face[seen], seen, side)
        samples[seen, 3] = 1.0
        blocks = samples.view(count, self.size, self.supersample, self.size, self.supersample, 4).mean(dim=(2, 4))
        colour = blocks[..., :3] / blocks[..., 3:].clamp_min(1e-6)
        return (torch.cat([colour, blocks[..., 3:]], dim=-1) * 255.0).round().clamp(0, 255).byte()


def surface_of(parts: Sequence[Any], scale: float, device: torch.device) -> Surface:
    """Collect ``trimesh.Trimesh`` parts (glTF axes) on a device; points are multiplied by ``scale``."""
    columns: list[list[Tensor]] = [[], [], [], [], []]
    textures: list[Tensor] = []
    for part in parts:
        faces, vertices = np.asarray(part.faces), world_from_gltf(np.asarray(part.vertices, dtype=np.float64))
        count, picture, coloured = len(faces), texture_image(part), corner_colours(part)
        tint = np.ones(3) if picture is not None or coloured is not None else plain_colour(part)
        corners = np.broadcast_to(tint, (count * 3, 3)) if coloured is None else coloured / 255.0
        uv = np.zeros((count * 3, 2)) if picture is None else np.asarray(part.visual.uv)[faces.reshape(-1)]
        index = np.full(count, len(textures) if picture is not None else -1)
        if picture is not None:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
            textures.append(pixels.to(device).float() / 255.0)
        values = (vertices[faces] * scale, corner_normals(vertices, faces), corners, uv)
        shapes = ((count, 3, 3), (count, 3, 3), (count, 3, 3), (count, 3, 2))
        for column, value, shape in zip(columns, values, shapes, strict=False):
            column.append(torch.from_numpy(np.array(value, dtype=np.float32).reshape(shape)))
        columns[4].append(torch.from_numpy(index))
    points, normals, colours, coordinates, texture = (torch.cat(column).to(device) for column in columns)
    return Surface(points, normals, colours, coordinates, texture, textures)


def project(points: Float[Tensor, "F 3 3"], poses: Float[Tensor, "V 3"], side: int) -> Float[Tensor, "V F 3 3"]:
    """Corners as every camera sees them: x to the right and y downwards in samples, and the inverse depth."""
    azimuth, elevation = torch.deg2rad(poses[:, 0]), torch.deg2rad(poses[:, 1])
    level = elevation.cos()
    backward = torch.stack([level * azimuth.cos(), level * azimuth.sin(), elevation.sin()], dim=-1)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)], dim=-1)
    up = torch.linalg.cross(backward, right)
    # Sums of products as they are written: matrix products may be rounded to TF32.
    axes = torch.stack([right, -up, -backward], dim=1)
    seen = (points[None, :, :, None] * axes[:, None, None]).sum(dim=-1)
    inverse = 1.0 / (seen[..., 2] + poses[:, None, None, 2]).clamp_min(1e-3)
    focal = 0.5 * side / math.tan(math.radians(FOVY) / 2.0)
    flat = seen[..., :2] * (focal * inverse)[..., None] + 0.5 * side
    return torch.cat([flat, inverse[..., None]], dim=-1)


def nearest_faces(projected: Float[Tensor, "V F 3 3"], side: int) -> Int[Tensor, " samples"]:
    """What every sample of every view sees, view by view and row by row: a face's index, or -1 for the background.

    A sample sees the nearest triangle in which its centre (at +0.5) lies, or on whose edge; of several at one depth the
    last one, as OpenGL does.
    """
    views, faces = projected.shape[:2]
    corners = projected.flatten(0, 1)
    low = (corners[..., :2].amin(dim=1) - 0.5).ceil().long().clamp(min=0)
    high = (corners[..., :2].amax(dim=1) - 0.5).floor().long().clamp(max=side - 1)
    extent = (high - low + 1).clamp(min=0)
    ends = extent.prod(dim=1).cumsum(0)
    # Inverse depth and face in one number, so that the nearest face is a minimum.
    nearest = torch.full((views * side * side,), _NOTHING, device=projected.device)
    start, limit = 0, CANDIDATES[projected.device.type]
    while start < len(corners):
        before = ends[start - 1] if start else torch.zeros_like(ends[0])
        stop = max(int(torch.searchsorted(ends, before + limit, right=True)), start + 1)
        owner, sample, inverse = _covered(corners, low, extent, start, stop)
        # Bits of positive floats are in their order.
        key = (inverse.view(torch.int32).long().neg() << 32) - owner % faces
        nearest.scatter_reduce_(0, owner // faces * side**2 + sample[:, 1] * side + sample[:, 0], key, "amin")
        start = stop
    face = (-nearest) & 0xFFFFFFFF
    return torch.where(nearest == _NOTHING, -1, face)


def _covered(
    corners: Tensor, low: Tensor, extent: Tensor, start: int, stop: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Triangle, sample (x, y) and inverse depth of all that triangles ``start`` to ``stop`` cover."""
    counts = extent[start:stop].prod(dim=1)
    owner = torch.repeat_interleave(torch.arange(start, stop, device=corners.device), counts)
    inner = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner - start]
    columns = extent[owner, 0]
    sample = low[owner] + torch.stack([inner % columns, inner // columns], dim=1)
    weights, within = barycentric(corners[owner], sample)
    owner, sample, weights = owner[within], sample[within], weights[within]
    return owner, sample, (weights * corners[owner, :, 2]).sum(dim=1)


def barycentric(corners: Float[Tensor, "n 3 3"], sample: Int[Tensor, "n 2"]) -> tuple[Float[Tensor, "n 3"], Tensor]:
    """Weights of a triangle's corners at a sample's centre, linear over the image, and whether it lies inside."""
    offset = corners[..., :2] - (sample + 0.5)[:, None]
    a, b, c = offset.unbind(dim=1)

    def area(u: Tensor, v: Tensor) -> Tensor:
        return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]

    areas = torch.stack([area(b, c), area(c, a), area(a, b)], dim=1)
    total = areas.sum(dim=1, keepdim=True)
    weights = areas / torch.where(total == 0, torch.inf, total)
    # A little slack, so that nothing shows between two triangles that share an edge.
    return weights, (weights >= -1e-4).all(dim=1) & (total[:, 0] != 0)


def shade(
    surface: Surface, projected: Float[Tensor, "V F 3 3"], face: Int[Tensor, " n"], place: Int[Tensor, " n"], side: int
) -> Float[Tensor, "n 3"]:
    """Colours of samples that see a face.

    Args:
        face: that each sees.
        place: of each among the samples of all views, ``side`` by ``side`` a view.
    """
    view, inner = place // side**2, place % side**2
    corners = projected[view, face]
    weights, _ = barycentric(corners, torch.stack([inner % side, inner // side], dim=1))
    facing = _twice_area(corners) < 0  # y runs downwards
    weights = weights * corners[..., 2]
    weights = (weights / weights.sum(dim=1, keepdim=True))[..., None]
    normal = functional.normalize((weights * surface.normals[face]).sum(dim=1), dim=-1)
    normal = torch.where(facing[:, None], normal, -normal)
    colour = (weights * surface.colours[face]).sum(dim=1)
    texture, coordinates = surface.texture[face], (weights * surface.coordinates[face]).sum(dim=1)
    for index, picture in enumerate(surface.textures):
        here = (texture == index).nonzero()[:, 0]
        colour[here] = bilinear(picture, coordinates[here])
    light = torch.full_like(colour[:, :1], AMBIENT)
    for source in LIGHTS:
        towards = torch.tensor(source.direction, device=colour.device)
        light += source.intensity * (normal * towards).sum(dim=1, keepdim=True).clamp_min(0.0)
    return (colour * light).clamp(0.0, 1.0)


def _twice_area(corners: Float[Tensor, "n 3 3"]) -> Float[Tensor, " n"]:
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


def bilinear(picture: Float[Tensor, "h w 3"], coordinates: Float[Tensor, "n 2"]) -> Float[Tensor, "n 3"]:
    """Colours at texture coordinates, v upwards; the picture repeats in both directions."""
    height, width = picture.shape[:2]
    x = coordinates[:, 0] * width - 0.5
    y = (1.0 - coordinates[:, 1]) * height - 0.5
    left, top = x.floor(), y.floor()
    across, down = (x - left)[:, None], (y - top)[:, None]
    columns = [(left.long() + step) % width for step in (0, 1)]
    rows = [(top.long() + step) % height for step in (0, 1)]
    upper, lower = (torch.lerp(picture[row, columns[0]], picture[row, columns[1]], across) for row in rows)
    return torch.lerp(upper, lower, down)
