"""Other shapes from a mesh: stretched, tapered, twisted and rippled, so that a training set has more of them.

Axes are those of glTF: y up, the front faces +z. What is symmetric from left to right stays so, but for the twist.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from nvsadapter_guidance.training.mesh_files import fitting


@dataclass(frozen=True)
class Variation:
    """How often and how strongly shapes are changed."""

    stretch: float = 0.3
    """Standard deviation of the logarithm of each axis's factor; every object gets one."""
    taper: float = 0.5
    """Probability of a change of width along the height, of up to half either way."""
    twist: float = 0.2
    """Probability of a turn between foot and top, of up to 60 degrees."""
    ripple: float = 0.5
    """Probability of a slow wave through the object."""
    ripple_size: float = 0.08
    """Largest amplitude of the wave, of the object's radius 0.5."""


def varied(parts: Sequence[Any], generator: torch.Generator, variation: Variation | None = None) -> list[Any]:
    """Return copies of ``trimesh.Trimesh`` parts, all bent alike and brought back to radius 0.5 about the origin.

    Args:
        parts: as :func:`mesh_files.load_parts` returns them.
        generator: of the draws, on the CPU.
        variation: probabilities and strengths.
    """
    variation = variation or Variation()
    # Some to spare: whatever else is drawn one day, the shapes of today stay.
    draws = torch.rand(16, generator=generator, dtype=torch.float64).tolist()
    tapers, taper, twists, twist, ripples, size, frequency, *phases = draws[:10]
    factors = np.exp(variation.stretch * torch.randn(3, generator=generator, dtype=torch.float64).numpy())
    bent = [part.copy() for part in parts]
    points = np.concatenate([np.asarray(part.vertices) for part in parts])
    centre, scale = fitting(points, "sphere")
    points = (points - centre) * scale * factors
    points = points / np.abs(points).max() / 2.0
    if tapers < variation.taper:
        points = tapered(points, taper - 0.5)
    if twists < variation.twist:
        points = twisted(points, math.radians(120.0 * twist - 60.0))
    if ripples < variation.ripple:
        points = rippled(points, variation.ripple_size * size, 4.0 + 8.0 * frequency, np.array(phases))
    centre, scale = fitting(points, "sphere")
    points = (points - centre) * scale
    start = 0
    for part in bent:
        part.vertices = points[start : start + len(part.vertices)]
        start += len(part.vertices)
    return bent


def tapered(points: Float[np.ndarray, "n 3"], strength: float) -> Float[np.ndarray, "n 3"]:
    """Widths times 1 + ``strength`` at the top (y = 0.5), and times 1 - ``strength`` at the foot."""
    factor = 1.0 + 2.0 * strength * points[:, 1:2]
    return np.concatenate([points[:, :1] * factor, points[:, 1:2], points[:, 2:] * factor], axis=1)


def twisted(points: Float[np.ndarray, "n 3"], angle: float) -> Float[np.ndarray, "n 3"]:
    """Turned about the upright axis by ``angle`` (radians) per unit of height."""
    turn = angle * points[:, 1]
    x = np.cos(turn) * points[:, 0] + np.sin(turn) * points[:, 2]
    return np.stack([x, points[:, 1], np.cos(turn) * points[:, 2] - np.sin(turn) * points[:, 0]], axis=1)


def rippled(
    points: Float[np.ndarray, "n 3"], amplitude: float, frequency: float, phases: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "n 3"]:
    """Each axis displaced by a sine along the others; x by an odd one of |x|, which keeps left and right alike."""
    x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
    waves = np.sin(frequency * np.stack([y + z, z + x, x + y], axis=1) + 2.0 * math.pi * phases)
    # At x = 0 both sides have to meet.
    waves[:, 0] *= np.sign(points[:, 0]) * np.minimum(4.0 * x, 1.0)
    return points + amplitude * waves
