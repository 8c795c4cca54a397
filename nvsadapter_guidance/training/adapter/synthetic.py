"""A small set of objects drawn on the fly, for tests and for trying a machine out: no file is needed.

An object is a coloured ball with a spot on its equator, so that its views differ and tell which way it faces.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from nvsadapter_guidance.cameras import RELEASED, look_at, relative_to_support
from nvsadapter_guidance.training.adapter.samples import Sample

SPOT = 0.35
"""Angle in radians of the spot, from its middle to its rim, seen from the centre of the ball."""


class SyntheticViews(Dataset[Sample]):
    """Views of balls.

    Args:
        objects: how many there are.
        num_query: query views of a sample.
        size: side of the images.
        first: number of the first object; objects of different numbers have different colours.
        control: give a control image of every view too.
    """

    def __init__(self, objects: int, num_query: int, size: int, first: int = 0, control: bool = False) -> None:
        self.objects, self.num_query, self.size, self.first, self.control = objects, num_query, size, first, control

    def __len__(self) -> int:
        return self.objects

    def __getitem__(self, index: int) -> Sample:
        """Random views, from torch's global generator."""
        if not 0 <= index < self.objects:
            raise IndexError(index)
        views = 1 + self.num_query
        azimuth, elevation = 360.0 * torch.rand(views), 60.0 * torch.rand(views) - 10.0
        poses = look_at(azimuth, elevation, 1.5, RELEASED)
        colours = torch.rand((2, 3), generator=torch.Generator().manual_seed(self.first + index))
        images = torch.stack([ball(pose[:3, 3], colours, self.size) for pose in poses])
        sample: Sample = {
            "support": images[0] * 2.0 - 1.0,
            "queries": images[1:] * 2.0 - 1.0,
            "c2w": relative_to_support(poses),
            "key": f"ball{self.first + index}",
        }
        if self.control:
            sample["control"] = 1.0 - images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        return sample


def ball(position: Float[Tensor, "3"], colours: Float[Tensor, "2 3"], size: int) -> Float[Tensor, "3 size size"]:
    """A ball seen from `position` (orthographically, filling three quarters of the image), in [0, 1] on white."""
    outward = position / position.norm()
    right = torch.stack((-outward[1], outward[0], torch.zeros(()))) / outward[:2].norm()
    up = torch.linalg.cross(outward, right)
    y, x = torch.meshgrid(torch.linspace(1, -1, size), torch.linspace(-1, 1, size), indexing="ij")
    x, y = x / 0.75, y / 0.75
    inside = x**2 + y**2 < 1.0
    depth = (1.0 - x**2 - y**2).clamp_min(0.0).sqrt()
    normal = x[..., None] * right + y[..., None] * up + depth[..., None] * outward
    spot = torch.acos(normal[..., 0].clamp(-1.0, 1.0)) < SPOT
    colour = torch.where(spot[..., None], colours[1], colours[0]) * (0.4 + 0.6 * depth[..., None])
    return torch.where(inside[..., None], colour, torch.ones(())).permute(2, 0, 1)
