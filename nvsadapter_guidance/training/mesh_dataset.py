"""Mesh folders rendered into training data: one ``.tar`` of views per split.

Each mesh becomes one pair of files, ``<object>.webp`` (a grid of RGBA tiles, one per view, row by row) and
``<object>.json`` (cameras, scale, licence, author); a split is one ``.tar`` of such pairs, which
:func:`nvsadapter_guidance.training.views.load_tar` reads.
"""

import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_files import load_parts
from nvsadapter_guidance.training.render_meshes import DISTANCE, FOVY, Camera, MeshRenderer
from nvsadapter_guidance.training.vary_mesh import varied

TILES_PER_ROW = 8


@dataclass(frozen=True)
class ViewSet:
    """Cameras of one object, all looking at the origin: degrees, and the object's own scale."""

    azimuth: list[float]
    elevation: list[float]
    scale: float
    distance: float = DISTANCE
    fovy: float = FOVY

    @property
    def cameras(self) -> list[Camera]:
        """As renderers take them."""
        angles = zip(self.azimuth, self.elevation, strict=True)
        return [(azimuth, elevation, self.distance) for azimuth, elevation in angles]


def object_generator(name: str, seed: int = 0) -> torch.Generator:
    """A generator that depends on the seed and the object alone, so that a resumed run draws the same views."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def elevations_anywhere(draw: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """Numbers in [0, 1) as elevations in [-10, 80] degrees: half uniform in angle, then half uniform on the sphere."""
    low, high = math.sin(math.radians(-10)), math.sin(math.radians(80))
    half = draw.shape[-1] // 2
    on_sphere = torch.rad2deg(torch.asin(low + (high - low) * draw[..., half:]))
    return torch.cat([90 * draw[..., :half] - 10, on_sphere], dim=-1)


def training_views(generator: torch.Generator, count: int = 40) -> ViewSet:
    """Draw the training views of one object: two rings from a random phase, and the rest anywhere.

    Of 40, 16 views lie at elevation 0 (references), 8 at elevation 30, and 16 at elevations in [-10, 80] degrees,
    half uniform in angle and half uniform on the sphere; other counts keep these shares. The scale is uniform in
    [0.85, 1].

    Raises:
        InputError: ``count`` is not a positive multiple of 5.
    """
    if count < 5 or count % 5:
        raise InputError(f"{count} views cannot be shared out over two rings and elsewhere: use a multiple of 5")
    level, high = 2 * count // 5, count // 5
    draw = torch.rand(2 + 3 * level, generator=generator, dtype=torch.float64)
    phase, scale, anywhere, around = 360 * draw[0], 0.85 + 0.15 * draw[1], draw[2 : 2 + level], draw[2 + level :]
    rings = [phase + 360 / level * torch.arange(level), phase + 360 / high * torch.arange(high)]
    azimuth = torch.cat([*rings, 360 * around[:level]])
    elevation = torch.cat(
        [torch.zeros(level), torch.full((high,), 30.0), elevations_anywhere(anywhere.roll(level // 2))]
    )
    return ViewSet((azimuth % 360).tolist(), elevation.tolist(), float(scale))


def validation_views() -> ViewSet:
    """The 16 validation views: azimuths 0, 45, ..., 315 at elevation 0, then the same at elevation 30; scale 1."""
    ring = [45.0 * index for index in range(8)]
    return ViewSet(ring * 2, [0.0] * 8 + [30.0] * 8, 1.0)


def tile(views: UInt8[np.ndarray, "v h w c"], columns: int = TILES_PER_ROW) -> UInt8[np.ndarray, "rows_h columns_w c"]:
    """Views as one picture, row by row; missing tiles at the end are zero."""
    count, height, width, channels = views.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), dtype=views.dtype)
    grid[:count] = views
    return grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, -1, channels)


def untile(grid: UInt8[np.ndarray, "rows_h columns_w c"], count: int, size: int) -> UInt8[np.ndarray, "v h w c"]:
    """The first ``count`` square tiles of a picture made by :func:`tile`."""
    rows, columns = grid.shape[0] // size, grid.shape[1] // size
    tiles = grid.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return tiles.reshape(rows * columns, size, size, -1)[:count]


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Entries of a mesh folder's ``index.json``: file, label, creator, library, licence, source.

    Raises:
        InputError: the file is missing or is not a list of entries with a ``file`` key.
    """
    path = folder / "index.json"
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"mesh index {path} cannot be read ({error}): give a folder of .glb files with one") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "file" in entry for entry in entries):
        raise InputError(f"mesh index {path} is not a list of entries with a 'file' key: see docs on training data")
    return entries


def _write(path: Path, content: bytes) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    partial_path.write_bytes(content)
    partial_path.replace(path)


def keep_settings(path: Path, values: dict[str, Any]) -> None:
    """Record in ``path`` the options with which its folder is filled, and refuse to mix.

    Raises:
        InputError: the folder was filled with others, or what it says of them cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        earlier = json.loads(path.read_text()) if path.exists() else values
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); delete it or choose another folder") from error
    if earlier != values:
        changed = [key for key in values if not isinstance(earlier, dict) or earlier.get(key) != values[key]]
        raise InputError(f"{path.parent}: was rendered with another {', '.join(changed)}; choose another folder")
    _write(path, json.dumps(values, indent=1).encode())


_window = cache(MeshRenderer)  # one per process: opening one takes a second


def shape_of(path: Path, variant: int = 0, seed: int = 0) -> list[Any]:
    """The ``trimesh.Trimesh`` parts of a mesh, or with ``variant`` > 0 one of the shapes that it can be bent into.

    Raises:
        InputError: the file cannot be read as a mesh.
    """
    parts = load_parts(path, "none")
    return varied(parts, object_generator(f"{path.stem} bent {variant}", seed)) if variant else parts


def render_object(
    entry: dict[str, Any],
    variant: int,
    meshes: Path,
    staging: Path,
    validation: bool,
    views_per_object: int,
    size: int,
    quality: int,
    seed: int,
) -> str:
    """Render one object's views into ``staging`` unless they are there already; returns its name."""
    name = Path(entry["file"]).stem + (f"-{variant}" if variant else "")
    if (staging / f"{name}.json").exists():
        return name
    views = validation_views() if validation else training_views(object_generator(name, seed), views_per_object)
    renderer = _window(size, 4)
    renderer.show(shape_of(meshes / entry["file"], variant, seed), views.scale)
    images = renderer.render_all(views.cameras).numpy()
    buffer = io.BytesIO()
    # method 6 takes two seconds more for 0.3 % of the size
    Image.fromarray(tile(images)).save(buffer, "webp", quality=quality, alpha_quality=100, method=4)
    about = {key: entry.get(key, "") for key in ("label", "creator", "library", "licence", "source")}
    _write(staging / f"{name}.webp", buffer.getvalue())
    _write(staging / f"{name}.json", json.dumps({**asdict(views), "size": size, **about}).encode())
    return name


def render_split(
    meshes: Path,
    output: Path,
    *,
    validation: bool = False,
    views: int = 40,
    size: int = 128,
    quality: int = 92,
    seed: int = 0,
    processes: int = 1,
    limit: int | None = None,
    variants: int = 0,
) -> Iterator[str]:
    """Render every mesh that a folder's ``index.json`` names, then pack the views into one file.

    Finished objects are kept in a folder beside ``output`` (its name without ``.tar``), so an interrupted call
    goes on where it stopped.

    Args:
        meshes: folder of glTF files with an ``index.json``.
        output: the ``.tar`` to write.
        validation: the fixed validation cameras in place of random training ones.
        views: training views per object, a multiple of 5; an interrupted call must go on with the same number.
        size: side of a view in pixels.
        quality: WebP quality of the colours (alpha is lossless).
        seed: of the training cameras and scales.
        processes: how many windows render at once.
        limit: render the first few objects only.
        variants: in place of each mesh, so many shapes that it can be bent into (`vary_mesh`); 0 for the mesh itself.

    Yields:
        the name of each object when it is done.

    Raises:
        InputError: the index or a mesh cannot be read, ``variants`` is negative or asked for with ``validation``, or
            the folder of finished objects holds views of other options.
    """
    shapes = _shapes(read_index(meshes)[:limit], variants, validation)
    staging = output.with_suffix("")
    options: dict[str, Any] = {"views_per_object": views, "size": size, "quality": quality, "seed": seed}
    # No mesh has a name that begins with a dot.
    keep_settings(staging / ".render.json", {"validation": validation, **options})
    work: Callable[[dict[str, Any], int], str] = partial(
        render_object, meshes=meshes, staging=staging, validation=validation, **options
    )
    names = []
    if processes == 1:
        for shape in shapes:
            names.append(work(*shape))
            yield names[-1]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for name in pool.map(work, *zip(*shapes, strict=True)):
                names.append(name)
                yield name
    pack(staging, names, output)


def _shapes(entries: list[dict[str, Any]], variants: int, validation: bool) -> list[tuple[dict[str, Any], int]]:
    """Every mesh with the numbers of its variants; 0 is the mesh itself."""
    if variants < 0:
        raise InputError(f"variants: must be 0 or more, got {variants}")
    if variants and validation:
        raise InputError("variants: validation views show the meshes themselves; leave one of the two out")
    return list(product(entries, range(1, variants + 1) if variants else [0]))


def pack(folder: Path, names: list[str], output: Path) -> None:
    """Write the named pairs of files into one tar, in order, with fixed dates so that equal input gives equal bytes."""
    partial_path = output.with_name(f".{output.name}.{os.getpid()}")
    with tarfile.open(partial_path, "w") as archive:
        for file in (folder / f"{name}.{kind}" for name in names for kind in ("webp", "json")):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    partial_path.replace(output)
