"""Pictures with a silhouette inflated into solids: a known front in strong colours, and a plainer back.

The height over the picture is the square root of the solution of a Poisson equation that vanishes on the silhouette,
so that a disc becomes a ball and a strip becomes a rod.
"""

import zlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.sources.objects import textured_part

Back = Literal["plain", "blurred", "mirrored"]
BACKS = get_args(Back)


@dataclass(frozen=True)
class Inflation:
    """How a picture becomes a solid."""

    grid: int = 80
    """Cells along the picture's longer side."""
    depth: float = 0.8
    """Depth relative to a ball's, in (0, 1]: 1 makes a disc a ball."""
    exponent: float = 2.0
    """Roundness from the middle to the rim: 2 as a ball, more as a cushion with a steeper rim."""
    back: Back = "plain"
    """What is behind: the picture's commonest colour, the front blurred, or the same as in front."""
    faces: int = 3000
    """Faces of the solid, about."""


def squared_height(inside: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Solution of (u_xx + u_yy) = -4 inside a silhouette, 0 on the first cells outside; lengths in cells.

    For a disc of radius R this is R^2 - r^2, the squared height of a ball's surface over its equator.

    Raises:
        InputError: the silhouette is empty, or it touches the border.
    """
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    if not inside.any() or inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any():
        raise InputError("a silhouette to inflate needs cells inside, and a margin outside")
    number = np.full(inside.shape, -1)
    count = int(inside.sum())
    number[inside] = np.arange(count)
    rows, columns = np.nonzero(inside)
    own, neighbours = [], []
    for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        other = number[rows + step[0], columns + step[1]]
        own.append(np.arange(count)[other >= 0])
        neighbours.append(other[other >= 0])
    pairs = (np.concatenate(own), np.concatenate(neighbours))
    laplace = 4 * sparse.identity(count) - sparse.coo_matrix((np.ones(len(pairs[0])), pairs), shape=(count, count))
    solution = np.zeros(inside.shape)
    solution[inside] = spsolve(laplace.tocsc(), np.full(count, 4.0))
    return solution


def spread_colours(rgba: Float[np.ndarray, "h w 4"], sigma: float) -> Float[np.ndarray, "h w 3"]:
    """Colours blurred over the silhouette alone, so that they go on beyond its border (sigma in pixels)."""
    from scipy.ndimage import gaussian_filter

    alpha = rgba[..., 3]
    weight = gaussian_filter(alpha, sigma) + 1e-6
    total = np.stack([gaussian_filter(rgba[..., c] * alpha, sigma) for c in range(3)], axis=-1)
    mean = (rgba[..., :3] * alpha[..., None]).sum(axis=(0, 1)) / max(float(alpha.sum()), 1e-6)
    return (total + 1e-6 * mean) / weight[..., None]


def commonest_colour(rgba: Float[np.ndarray, "h w 4"]) -> Float[np.ndarray, "3"]:
    """The commonest of a picture's six main colours where it is solid (0..1)."""
    pixels = rgba[rgba[..., 3] > 0.95][:, :3]
    strip = Image.fromarray((pixels[None] * 255).round().astype(np.uint8)).quantize(6, Image.Quantize.MEDIANCUT)
    number = np.bincount(np.asarray(strip).reshape(-1)).argmax()
    return np.asarray(strip.convert("RGB"))[np.asarray(strip) == number][0] / 255


def front_and_back(image: Image.Image, back: Back) -> Image.Image:
    """The texture: the picture on the left half, what is behind on the right, both seen from the front.

    Towards the rim, what is behind takes on the front's colours, so that the two meet without a seam.
    """
    from scipy.ndimage import distance_transform_edt

    rgba = np.asarray(image.convert("RGBA"), dtype=np.float64) / 255
    side = max(image.size)
    # Half-transparent pixels at the border carry the edge's antialiasing, which a solid makes anew.
    solid = np.concatenate([rgba[..., :3], (rgba[..., 3:] > 0.95).astype(np.float64)], axis=-1)
    rim = spread_colours(solid, side / 80)
    front = np.where(solid[..., 3:] > 0, rgba[..., :3], rim)
    if back == "mirrored":
        behind = front
    else:
        middle = commonest_colour(rgba) if back == "plain" else spread_colours(solid, side / 12)
        towards = np.clip(distance_transform_edt(np.pad(solid[..., 3], 1))[1:-1, 1:-1, None] / (0.12 * side), 0, 1)
        behind = rim * (1 - towards) + middle * towards
    both = np.concatenate([front, behind], axis=1)
    return Image.fromarray((both * 255).round().clip(0, 255).astype(np.uint8))


def inflate(image: Image.Image, options: Inflation) -> list[Any]:
    """A solid in glTF axes, the picture on its front, as one ``trimesh.Trimesh``.

    Raises:
        InputError: the picture is (almost) empty, or no back of that name is known.
    """
    import fast_simplification
    import mcubes
    from scipy.ndimage import gaussian_filter

    if options.back not in BACKS:
        raise InputError(f"back '{options.back}' is unknown; use one of {', '.join(BACKS)}")
    alpha = image.convert("RGBA").getchannel("A")
    margin = 4  # cells around the silhouette, so that its surface closes
    factor = options.grid / max(image.size)
    size = [max(1, round(length * factor)) for length in image.size]
    coarse = np.asarray(alpha.resize(size, Image.Resampling.BOX), dtype=np.float64) / 255
    coarse = np.pad(coarse, margin)
    inside = coarse > 0.5
    if inside.sum() < 20:
        raise InputError("a picture to inflate has no silhouette to speak of")
    # Outside, what is missing to 1/2 of the coverage takes over: the level set is at coverage 1/2 in both.
    field = squared_height(inside) + 4.0 * np.minimum(coarse - 0.5, 0.0)
    field = gaussian_filter(field, 0.6)
    highest = max(float(field.max()), 1.0)
    height = options.depth * np.sqrt(highest)
    half = int(np.ceil(height)) + 2
    z = np.abs(np.arange(-half, half + 1)) / height
    volume = field[..., None] / highest - z**options.exponent  # [row, column, z], positive inside
    points, faces = mcubes.marching_cubes(volume, 0.0)
    if len(faces) > options.faces:
        points, faces = fast_simplification.simplify(
            points.astype(np.float32), faces.astype(np.int64), target_count=options.faces
        )
    return [_painted(points - [margin, margin, half], faces, size, front_and_back(image, options.back))]


def _painted(cells: Float[np.ndarray, "n 3"], faces: Any, size: list[int], texture: Image.Image) -> Any:
    """The surface in cells (row, column, height) as a part that wears the texture, seen from the front."""
    # (row down, column right, height) to (x right, y up, z front) is a rotation: faces keep their winding
    points = np.stack([cells[:, 1], -cells[:, 0], cells[:, 2]], axis=1)
    faces = np.asarray(faces)
    across, down = (cells[:, 1] + 0.5) / size[0], (cells[:, 0] + 0.5) / size[1]
    uv = np.stack([np.clip(across, 0.002, 0.998) / 2, 1 - down], axis=1)
    in_front = points[faces, 2].mean(axis=1) >= 0
    corners = np.concatenate([points, points])
    both = np.concatenate([uv, uv + np.array([0.5, 0.0])])
    chosen = np.where(in_front[:, None], faces, faces + len(points))
    return textured_part(corners, chosen, both, texture)


def drawn_inflation(name: str, two_sided: bool) -> Inflation:
    """How to inflate the picture of a name: depth and back differ between names, and never for one.

    Args:
        name: of the object.
        two_sided: what is behind may look as what is in front does, as with an animal seen from its side.
    """
    seed = zlib.crc32(name.encode())
    depth = 0.45 + 0.5 * (seed % 997) / 996
    backs: tuple[Back, ...] = ("plain", "blurred", "mirrored") if two_sided else ("plain", "plain", "blurred")
    exponent = (2.0, 2.5, 4.0)[seed % 3]
    return Inflation(depth=depth, exponent=exponent, back=backs[(seed // 997) % 3])
