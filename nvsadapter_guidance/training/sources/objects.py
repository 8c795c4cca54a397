"""A mesh of any source on its way into a folder of training meshes, and the tidying that all of them get.

Axes of all parts are those of glTF: y up, the front faces +z.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_files import fitting

FEWEST_FACES = 16  # of a part: less is not worth decimating


@dataclass(frozen=True)
class SourceObject:
    """One object that a source offers: who made it, under which licence, and how to read it.

    ``load`` returns its parts, each a ``trimesh.Trimesh`` with a picture and texture coordinates, or with one colour.
    """

    name: str
    label: str
    category: str
    creator: str
    library: str
    licence: str
    source: str
    load: Callable[[], list[Any]]


@dataclass(frozen=True)
class Tidying:
    """How small an object is made."""

    faces: int = 6000
    """Objects of more faces are decimated to about this many."""
    texture: int = 192
    """Longest side of a picture in pixels."""
    quality: int = 80
    """JPEG quality of the pictures, 1..95."""


def slug(text: str) -> str:
    """Text as a part of a file name: lower-case letters, digits and ``_``."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def textured_part(
    points: Float[np.ndarray, "n 3"], faces: Any, uv: Float[np.ndarray, "n 2"], image: Image.Image
) -> Any:
    """A ``trimesh.Trimesh`` with a picture; ``uv`` has its origin at the picture's lower left corner."""
    import trimesh

    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, metallicFactor=0.0, roughnessFactor=1.0)
    visual = trimesh.visual.TextureVisuals(uv=np.asarray(uv, dtype=np.float64), material=material)
    return trimesh.Trimesh(np.asarray(points, dtype=np.float64), np.asarray(faces), visual=visual, process=False)


def plain_part(points: Float[np.ndarray, "n 3"], faces: Any, colour: Sequence[float]) -> Any:
    """A ``trimesh.Trimesh`` of one colour (sRGB, 0..1), kept as a picture of it as every other part has one."""
    level = tuple(int(value) for value in np.clip(np.round(np.asarray(colour[:3]) * 255), 0, 255))
    return textured_part(points, faces, np.full((len(points), 2), 0.5), Image.new("RGB", (4, 4), level))


def team_coloured(image: Image.Image, colour: Sequence[float]) -> Image.Image:
    """A picture whose alpha marks where a team's colour (sRGB, 0..1) shows through, composed with that colour.

    Raises:
        InputError: the picture has no alpha.
    """
    if image.mode != "RGBA":
        raise InputError(f"a picture of mode {image.mode} has no alpha to say where the team's colour goes")
    pixels = np.asarray(image, dtype=np.float32) / 255
    mixed = pixels[..., :3] * pixels[..., 3:] + np.asarray(colour, dtype=np.float32) * (1 - pixels[..., 3:])
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def as_jpeg(image: Image.Image, longest: int, quality: int) -> Image.Image:
    """The picture, shrunk and encoded; exporters keep the encoding of a picture that was read from a file."""
    image = image.convert("RGB")
    factor = longest / max(image.size)
    if factor < 1:
        image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer)


def decimated(part: Any, faces: int) -> Any:
    """A textured part with about ``faces`` faces; texture coordinates come from the nearest original vertex."""
    import fast_simplification
    from scipy.spatial import cKDTree

    if len(part.faces) <= max(faces, FEWEST_FACES):
        return part
    points = np.asarray(part.vertices, dtype=np.float32)
    kept, triangles = fast_simplification.simplify(
        points, np.asarray(part.faces), target_count=max(faces, FEWEST_FACES)
    )
    nearest = cKDTree(points).query(kept)[1]
    return textured_part(kept, triangles, np.asarray(part.visual.uv)[nearest], part.visual.material.baseColorTexture)


def tidy(parts: Sequence[Any], options: Tidying) -> list[Any]:
    """Parts with fewer faces and smaller pictures, centred, the farthest vertex at radius 0.5.

    Raises:
        InputError: there are no faces, or points are not finite, or have no extent.
    """
    parts = [part for part in parts if len(part.faces)]
    total = sum(len(part.faces) for part in parts)
    if total == 0:
        raise InputError("the object has no faces")
    share = min(1.0, options.faces / total)
    parts = [decimated(part, round(share * len(part.faces))) for part in parts]
    points = np.concatenate([np.asarray(part.vertices)[np.unique(part.faces)] for part in parts])
    if not np.isfinite(points).all() or np.ptp(points, axis=0).max() <= 0:
        raise InputError("the object has points that are not finite, or no extent")
    centre, scale = fitting(points, "sphere")
    done: list[Any] = []
    for part in parts:
        image = as_jpeg(part.visual.material.baseColorTexture, options.texture, options.quality)
        done.append(textured_part((part.vertices - centre) * scale, part.faces, part.visual.uv, image))
    return done


def extents(parts: Sequence[Any]) -> Float[np.ndarray, "3"]:
    """Width, height and depth of parts together."""
    points = np.concatenate([np.asarray(part.vertices)[np.unique(part.faces)] for part in parts])
    return np.ptp(points, axis=0)


def mean_colour(image: Image.Image) -> UInt8[np.ndarray, "3"]:
    """The mean colour of a picture."""
    return np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
