"""The lights that every training view is rendered under: fixed in the world, soft, without shadows or highlights.

A surface of colour c and outward unit normal n shows ``c * (AMBIENT + sum_i intensity_i * max(0, n . direction_i))``
in display (sRGB) values; the sum stays at or below one, so nothing clips.
"""

import math
from dataclasses import dataclass

AMBIENT = 0.62


@dataclass(frozen=True)
class Light:
    """A distant light: the unit direction towards it (world axes) and its intensity."""

    direction: tuple[float, float, float]
    intensity: float


def _towards(azimuth: float, elevation: float) -> tuple[float, float, float]:
    azimuth, elevation = math.radians(azimuth), math.radians(elevation)
    horizontal = math.cos(elevation)
    return horizontal * math.cos(azimuth), horizontal * math.sin(azimuth), math.sin(elevation)


LIGHTS = (Light(_towards(25.0, 42.0), 0.32), Light(_towards(-115.0, 25.0), 0.16))
