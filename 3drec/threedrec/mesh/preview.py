"""A picture of a mesh file as a viewer would show it, without one."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh.rasterize import Coverage, rasterize

_NEAR = 1e-3


@torch.no_grad()
def render_mesh_preview(
    path: str | os.PathLike[str],
    azimuth: float = 0.0,
    elevation: float = 0.0,
    size: int = 256,
    distance: float = 1.5,
    fovy: float = 49.1,
    shaded: bool = False,
    cull: bool = True,
) -> Float[Tensor, "size size 3"]:
    """Render a mesh file (glTF frame: y up, front +z) over white.

    Args:
        path: ``.glb``, ``.obj`` or ``.ply``.
        azimuth: degrees, 0 in front; 90 looks from +x, which is the world's +y.
        elevation: degrees above the horizon.
        distance: of the camera from the origin.
        fovy: vertical field of view, degrees.
        shaded: multiply the colour by a headlight's cosine, from the file's vertex normals.
        cull: leave out faces seen from behind, so that a mesh turned inside out looks like it.

    Raises:
        InputError: the file cannot be read as a mesh.
    """
    mesh = _load(path)
    vertices = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float64)
    faces = torch.tensor(np.asarray(mesh.faces), dtype=torch.long)
    view = _view(azimuth, elevation, distance)
    camera = vertices @ view[:3, :3].T + view[:3, 3]
    depth = -camera[:, 2]
    scale = 0.5 * size / math.tan(math.radians(fovy) / 2.0)
    pixels = torch.stack([camera[:, 0], -camera[:, 1]], dim=1) / depth.clamp(min=_NEAR)[:, None] * scale + 0.5 * size
    corners = pixels[faces]
    edge, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    shown = (depth[faces] > _NEAR).all(dim=1)
    if cull:
        # Counter-clockwise faces turn clockwise on the screen, whose y points down.
        shown &= edge[:, 0] * other[:, 1] - edge[:, 1] * other[:, 0] < 0
    faces, corners = faces[shown], corners[shown]
    # 1/depth is linear on the screen; its negative grows with the depth.
    coverage = rasterize(corners, size, size, depth=-1.0 / depth[faces])
    return _shade(mesh, faces, coverage, depth, view[2, :3] if shaded else None).float()


def _shade(mesh: trimesh.Trimesh, faces: Tensor, coverage: Coverage, depth: Tensor, towards: Tensor | None) -> Tensor:
    hit = coverage.face >= 0
    owners = faces[coverage.face[hit]]
    weights = coverage.barycentric[hit] / depth[owners]
    weights = weights / weights.sum(dim=1, keepdim=True)

    def across(values: np.ndarray) -> Tensor:
        return (torch.tensor(np.asarray(values), dtype=torch.float64)[owners] * weights[:, :, None]).sum(dim=1)

    image = torch.ones(*hit.shape, 3, dtype=torch.float64)
    visual: Any = mesh.visual
    texture = _texture(visual)
    if texture is None:
        image[hit] = across(visual.vertex_colors[:, :3] / 255.0)
    else:
        uv = across(visual.uv)
        rows = ((1.0 - uv[:, 1]) * texture.shape[0]).long().clamp(0, texture.shape[0] - 1)
        columns = (uv[:, 0] * texture.shape[1]).long().clamp(0, texture.shape[1] - 1)
        image[hit] = texture[rows, columns]
    if towards is not None:
        cosine = torch.nn.functional.normalize(across(mesh.vertex_normals), dim=1) @ towards
        image[hit] *= 0.2 + 0.8 * cosine.clamp(min=0.0)[:, None]
    return image


def _load(path: str | os.PathLike[str]) -> trimesh.Trimesh:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such mesh file")
    try:
        mesh = trimesh.load_mesh(path, process=False)
    except Exception as error:  # whatever trimesh's readers raise on a malformed file
        raise InputError(f"{path}: cannot be read as a mesh: {error}") from error
    if len(mesh.faces) == 0:
        raise InputError(f"{path}: cannot be read as a mesh: it has no faces")
    return mesh


def _texture(visual: Any) -> Tensor | None:
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if image is None or getattr(visual, "uv", None) is None:
        return None
    return torch.tensor(np.asarray(image.convert("RGB")), dtype=torch.float64) / 255.0


def _view(azimuth: float, elevation: float, distance: float) -> Float[Tensor, "4 4"]:
    """World (glTF frame) to camera (x right, y up, looking along -z)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = torch.tensor([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)], dtype=torch.float64)
    right = torch.tensor([math.cos(a), 0.0, -math.sin(a)], dtype=torch.float64)
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = torch.stack([right, torch.linalg.cross(back, right), back])
    view[2, 3] = -distance
    return view
