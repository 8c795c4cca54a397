"""What a ray sees: occupancy, marching, compositing, shading."""

from threedrec.rendering.compositing import accumulate, render_weights
from threedrec.rendering.marching import Intervals, march
from threedrec.rendering.occupancy import OccupancyGrid
from threedrec.rendering.renderer import RenderOutput, Samples, VolumeRenderer
from threedrec.rendering.shading import DiffusePointLight, NoMaterial

__all__ = [
    "DiffusePointLight",
    "Intervals",
    "NoMaterial",
    "OccupancyGrid",
    "RenderOutput",
    "Samples",
    "VolumeRenderer",
    "accumulate",
    "march",
    "render_weights",
]
