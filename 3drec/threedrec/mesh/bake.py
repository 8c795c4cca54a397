"""The field's colour, painted onto the texture."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from torch import Tensor

from threedrec.mesh.rasterize import rasterize
from threedrec.mesh.types import Mesh
from threedrec.mesh.unwrap import Atlas

ColorFunction = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 3"]]


@torch.no_grad()
def bake_texture(
    mesh: Mesh,
    atlas: Atlas,
    color_fn: ColorFunction,
    size: int = 1024,
    device: torch.device | str = "cpu",
    chunk: int = 262_144,
) -> UInt8[np.ndarray, "S S 3"]:
    """Texture image, row 0 at v = 1, whose texels hold the colour at the surface point that maps to their centre.

    Texels that no face covers take the nearest covered texel's colour, so that neither bilinear filtering nor coarser
    mipmap levels bring a background in at the seams.

    Args:
        color_fn: (N, 3) world points to (N, 3) colours in [0, 1].
    """
    uv = torch.from_numpy(atlas.uv)
    pixels = torch.stack([uv[:, 0], 1.0 - uv[:, 1]], dim=1) * size
    coverage = rasterize(pixels[torch.from_numpy(atlas.faces)], size, size)
    covered = coverage.face >= 0
    corners = torch.from_numpy(mesh.vertices[mesh.faces])[coverage.face[covered]]
    points = (corners * coverage.barycentric[covered][:, :, None]).sum(dim=1)
    texture = np.zeros((size, size, 3), dtype=np.float32)
    texture[covered.numpy()] = colors_at(color_fn, points, device, chunk)
    return np.round(fill_uncovered(texture, covered.numpy()) * 255.0).astype(np.uint8)


@torch.no_grad()
def colors_at(
    color_fn: ColorFunction,
    points: Float[Tensor, "N 3"] | Float[np.ndarray, "N 3"],
    device: torch.device | str = "cpu",
    chunk: int = 262_144,
) -> Float[np.ndarray, "N 3"]:
    """Colours in [0, 1] at world points, asked for ``chunk`` points at a time; what is not finite becomes black."""
    points = torch.as_tensor(points).float()
    parts = [color_fn(part.to(device)).float().cpu() for part in points.split(chunk)]
    return torch.cat(parts).nan_to_num(0.0).clamp(0.0, 1.0).numpy()


def fill_uncovered(image: Float[np.ndarray, "H W C"], covered: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W C"]:
    """Give every uncovered pixel the value of the nearest covered one."""
    if covered.all() or not covered.any():
        return image
    rows, columns = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return image[rows, columns]
