"""From density samples to a mesh with a place in the texture for every face: the work that needs no field.

It is NumPy and C++ on one core, and most of it holds Python's lock; `threedrec.mesh.side_process` does it in a process
of its own while the GPU renders.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from threedrec.mesh.isosurface import Samples, surface_of
from threedrec.mesh.simplify import keep_large_parts, simplify
from threedrec.mesh.types import Mesh
from threedrec.mesh.unwrap import Atlas, unwrap

FEWEST_FACES = 20


@dataclass(frozen=True)
class ShapeOptions:
    """How to make a shape; the values are those of ``system.exporter``."""

    threshold: float | None = None
    """Density of the surface, None to choose it."""
    smoothing: float = 1.5
    keep_components: float = 0.05
    face_budget: int = 50_000
    texture_size: int = 1024
    """0 leaves the mesh without texture coordinates."""
    charts: Mapping[str, Any] = field(default_factory=dict)
    packing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """A mesh that waits for its colours."""

    mesh: Mesh
    atlas: Atlas | None
    threshold: float
    seconds: dict[str, float]
    """Of every step."""


def make_shape(samples: Samples, options: ShapeOptions) -> Shape:
    """Cut, simplify and unwrap.

    Raises:
        InputError: the field is empty.
    """
    seconds: dict[str, float] = {}
    with timed("isosurface", seconds):
        surface = surface_of(samples, options.threshold, options.smoothing, options.keep_components)
    with timed("simplify", seconds):
        # Noise is no better for many faces, and xatlas needs minutes for them.
        budget = max(options.face_budget // 4, FEWEST_FACES) if surface.rough else options.face_budget
        mesh = keep_large_parts(simplify(surface.mesh, budget), options.keep_components)
    atlas = None
    if options.texture_size:
        with timed("unwrap", seconds):
            atlas = unwrap(mesh, options.texture_size, options.charts, options.packing)
    return Shape(mesh, atlas, surface.threshold, seconds)


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of the block to ``seconds[step]``."""
    start = time.perf_counter()
    yield
    seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - start, 3)
