"""A place in the texture for every face."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xatlas
from jaxtyping import Float, Int

from threedrec.errors import InputError
from threedrec.mesh.types import Mesh

_CHARTS = 100
"""A chart takes at most one part in this many of the surface. xatlas's time grows much faster than a chart's size: on
a smooth object of 50,000 faces the limit makes it five to eight times faster, and leaves fewer slivers of charts."""
_MANY = 5000
"""Faces from which on a mesh is cut in eight before xatlas cuts it further. It works on as many pieces at once as there
are processors, and on one core the pieces together take no longer than the whole; there are no more seams either."""
_EXTENT = 1000.0
"""Size at which xatlas sees the mesh; faces of an absolute area below about 1e-7 get no place in the texture."""


@dataclass(frozen=True)
class Atlas:
    """Texture coordinates of a mesh. Vertices on seams appear once per chart."""

    original: Int[np.ndarray, " U"]
    """The mesh's vertex behind every vertex of the atlas."""
    faces: Int[np.ndarray, "F 3"]
    """The mesh's faces in order, as indices into the atlas's vertices."""
    uv: Float[np.ndarray, "U 2"]
    """In [0, 1]; u to the right, v upwards: (0, 0) is the lower left corner of the image, as in OBJ."""


def unwrap(
    mesh: Mesh,
    texture_size: int = 1024,
    charts: Mapping[str, Any] | None = None,
    packing: Mapping[str, Any] | None = None,
) -> Atlas:
    """Cut the mesh into charts and pack them (xatlas).

    Args:
        texture_size: side of the texture in pixels, which sets the gap between charts.
        charts: fields of ``xatlas.ChartOptions``, such as ``max_iterations``; lengths in world units.
        packing: fields of ``xatlas.PackOptions``, such as ``padding``.

    Raises:
        InputError: an option is unknown or of the wrong type.
    """
    scale = _EXTENT / max(float(np.ptp(mesh.vertices, axis=0).max()), 1e-12)
    cutting = chart_options({"max_chart_area": mesh.area / _CHARTS, **(charts or {})})
    cutting.max_chart_area *= scale**2
    cutting.max_boundary_length *= scale
    gaps = pack_options({"resolution": texture_size, "padding": 2, "bilinear": True, **(packing or {})})
    # Not before all options are known to be right: an atlas that goes as soon as it came can wait for its own threads
    # for ever (a thread that has not begun to listen misses the signal to end).
    atlas = xatlas.Atlas()
    pieces = _octants(mesh) if len(mesh.faces) >= _MANY else [np.arange(len(mesh.faces))]
    corners = [np.unique(mesh.faces[piece], return_inverse=True) for piece in pieces]
    for used, faces in corners:
        atlas.add_mesh((mesh.vertices[used] * scale).astype(np.float32), faces.reshape(-1, 3).astype(np.uint32))
    atlas.generate(cutting, gaps)
    original, faces, uv = [], np.empty_like(mesh.faces), []
    first = 0
    for index, (piece, (used, _)) in enumerate(zip(pieces, corners)):
        own, indices, places = atlas[index]
        original.append(used[own])
        faces[piece] = indices.astype(np.int64) + first
        uv.append(places.astype(np.float64))
        first += len(own)
    return Atlas(np.concatenate(original).astype(np.int64), faces, np.concatenate(uv))


def _octants(mesh: Mesh) -> list[Int[np.ndarray, " N"]]:
    """Faces by the eighth of the mesh's box in which their centre lies, without empty ones."""
    centres = mesh.triangles.mean(axis=1)
    middle = 0.5 * (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0))
    place = (centres > middle) @ np.array([4, 2, 1])
    return [np.flatnonzero(place == octant) for octant in np.unique(place)]


def chart_options(values: Mapping[str, Any]) -> xatlas.ChartOptions:
    """Options of the cutting from a config's values.

    Raises:
        InputError: an option is unknown or of the wrong type.
    """
    return _filled(xatlas.ChartOptions(), "xatlas_chart_options", values)


def pack_options(values: Mapping[str, Any]) -> xatlas.PackOptions:
    """Options of the packing from a config's values.

    Raises:
        InputError: an option is unknown or of the wrong type.
    """
    return _filled(xatlas.PackOptions(), "xatlas_pack_options", values)


def _filled(options: Any, key: str, values: Mapping[str, Any]) -> Any:
    known = [name for name in dir(options) if not name.startswith("_")]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{key}.{name}: unknown option; xatlas knows {', '.join(known)}")
        try:
            setattr(options, name, value)
        except TypeError as error:
            wanted = type(getattr(options, name)).__name__
            raise InputError(f"{key}.{name}: {value!r} is of the wrong type; give a value of type {wanted}") from error
    return options
