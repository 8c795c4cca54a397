"""Mesh files of any origin: found in folders, read as parts, and brought to a common position and size.

Axes are those of glTF: y up, the front faces +z.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from nvsadapter_guidance.errors import InputError

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
Fit = Literal["cube", "sphere", "none"]
FITS = get_args(Fit)


def find_meshes(paths: Iterable[Path]) -> dict[str, Path]:
    """Mesh files by name; folders are searched with all that is below them.

    A file's name is that of the file without its suffix, below a folder its path in it with ``_`` for ``/``. Dots,
    which shards of training data cannot have, become ``_`` too.

    Raises:
        InputError: a path does not exist or is no mesh, two files have one name, or there is no mesh at all.
    """
    paths = list(paths)
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            files = {f: f.relative_to(path) for f in sorted(path.rglob("*")) if f.suffix.lower() in MESH_SUFFIXES}
        elif path.suffix.lower() in MESH_SUFFIXES and path.is_file():
            files = {path: Path(path.name)}
        else:
            problem = f"no mesh file ({', '.join(MESH_SUFFIXES)})" if path.exists() else "no such file or folder"
            raise InputError(f"{path}: {problem}; give meshes or a folder of them")
        for file, relative in files.items():
            name = relative.with_suffix("").as_posix().replace("/", "_").replace(".", "_")
            if name in found:
                raise InputError(f"{file}: would be called '{name}', as is {found[name]}; rename one of them")
            found[name] = file
    if not found:
        places = ", ".join(map(str, paths))
        raise InputError(f"{places}: no mesh below it; meshes end in {', '.join(MESH_SUFFIXES)}")
    return found


def load_parts(path: Path, fit: Fit = "sphere") -> list[Any]:
    """Read a mesh as ``trimesh.Trimesh`` parts, each with one material, moved and scaled together.

    Args:
        fit: where the object comes to lie. ``cube``: centre of the bounding box at the origin, longest side 1, as in
            Zero-1-to-3's renderings. ``sphere``: the same centre, farthest vertex at radius 0.5, as in this project's
            world, so that no view from distance 1.5 cuts anything off. ``none``: as in the file.

    Raises:
        InputError: the file cannot be read, or it holds no faces, no extent, or coordinates that are not finite.
    """
    import trimesh

    if fit not in FITS:
        raise InputError(f"fit '{fit}' is unknown; use one of {', '.join(FITS)}")
    try:
        parts = trimesh.load_scene(path).dump()
    except Exception as error:  # each reader fails in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read as a mesh ({reason}); export it again") from error
    parts = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not parts:
        raise InputError(f"{path}: holds no faces; give a mesh")
    points = np.concatenate([np.asarray(part.vertices)[np.unique(part.faces)] for part in parts])
    if not np.isfinite(points).all():
        raise InputError(f"{path}: has vertices that are not finite numbers; export it again")
    if np.ptp(points, axis=0).max() <= 0.0:
        raise InputError(f"{path}: has no extent; export it again")
    if fit != "none":
        centre, scale = fitting(points, fit)
        for part in parts:
            part.vertices = (np.asarray(part.vertices) - centre) * scale
    return parts


def fitting(points: Float[np.ndarray, "n 3"], fit: Fit) -> tuple[Float[np.ndarray, "3"], float]:
    """The centre to subtract from points, and then the factor to multiply them by; see `load_parts`."""
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high) / 2.0
    if fit == "cube":
        return centre, 1.0 / float((high - low).max())
    return centre, 0.5 / float(np.linalg.norm(points - centre, axis=1).max())


def whole_mesh(parts: Sequence[Any]) -> Any:
    """One ``trimesh.Trimesh`` of the geometry of several."""
    import trimesh

    return trimesh.util.concatenate([trimesh.Trimesh(part.vertices, part.faces, process=False) for part in parts])
