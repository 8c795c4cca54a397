"""True views of objects: the cameras of an evaluation, and meshes rendered from them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import ViewSet
from nvsadapter_guidance.training.mesh_files import Fit, load_parts
from nvsadapter_guidance.training.render_folder import Renderer

ELEVATIONS = (0.0, 30.0)
SUPERSAMPLE = 4


def evaluation_views(count: int = 16) -> ViewSet:
    """Cameras evenly around the object, half of them level and half at elevation 30 degrees, distance 1.5.

    View 0, at azimuth 0 and elevation 0, is the reference. The other views at azimuth 0 are no targets either.

    Raises:
        InputError: the number is odd or below four.
    """
    if count < 4 or count % 2:
        raise InputError(f"number of views is {count}; use an even number from 4 on")
    ring = [720.0 * index / count for index in range(count // 2)]
    return ViewSet(ring * 2, [ELEVATIONS[0]] * len(ring) + [ELEVATIONS[1]] * len(ring), 1.0)


def target_views(views: ViewSet) -> Bool[Tensor, " v"]:
    """Which views are scored: all but those at the reference's azimuth."""
    return torch.tensor([azimuth % 360.0 != 0.0 for azimuth in views.azimuth])


@dataclass(frozen=True)
class TrueViews:
    """What an object looks like from the cameras of an evaluation; view 0 is the reference."""

    name: str
    rgba: UInt8[np.ndarray, "v h w 4"]
    """Straight alpha."""

    @property
    def rgb(self) -> Float[Tensor, "v 3 h w"]:
        """On white, in [0, 1]."""
        pixels = torch.from_numpy(self.rgba).float().permute(0, 3, 1, 2) / 255.0
        return pixels[:, :3] * pixels[:, 3:] + (1.0 - pixels[:, 3:])

    @property
    def mask(self) -> Bool[Tensor, "v h w"]:
        """Pixels that the object covers by half or more."""
        return torch.from_numpy(self.rgba[..., 3] > 127)


class TruthRenderer:
    """Renders the true views of meshes.

    Args:
        renderer: of `render_folder.open_renderer`, with `SUPERSAMPLE` samples per pixel along each side.
        fit: see `mesh_files.load_parts`; ``sphere`` is how this project's models see objects.
    """

    def __init__(self, views: ViewSet, renderer: Renderer, fit: Fit = "sphere") -> None:
        self.views, self.fit = views, fit
        self._renderer = renderer

    def __call__(self, name: str, path: Path) -> TrueViews:
        """The views of one mesh file.

        Raises:
            InputError: it cannot be read, or nothing is seen of it from the reference camera.
        """
        self._renderer.show(load_parts(path, self.fit))
        rgba = self._renderer.render_all(self.views.cameras).cpu().numpy()
        if not rgba[0, ..., 3].any():
            raise InputError(f"{path}: nothing of it is seen from the reference camera; is it in glTF axes, front +z?")
        return TrueViews(name, rgba)
