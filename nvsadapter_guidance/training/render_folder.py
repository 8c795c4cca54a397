"""Meshes rendered into the layout of Zero-1-to-3: one folder per object, twelve views from all around.

An object's folder appears when all its views are there, so an interrupted call goes on where it stopped.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import keep_settings, object_generator
from nvsadapter_guidance.training.mesh_files import FITS, Fit, load_parts
from nvsadapter_guidance.training.render_meshes import Camera, MeshRenderer
from nvsadapter_guidance.training.render_torch import TorchMeshRenderer
from nvsadapter_guidance.training.zero123 import VIEWS_PER_OBJECT, camera_matrix, encode_views

SETTINGS_FILE, PATHS_FILE, BROKEN_FILE = "render.json", "valid_paths.json", "broken.json"
RendererName = Literal["vtk", "torch"]
RENDERERS = get_args(RendererName)
Renderer = MeshRenderer | TorchMeshRenderer
NEAREST = 1.01
"""Smallest distance of a camera: outside of the cube of side 1, with room for the near plane."""


@dataclass(frozen=True)
class RenderOptions:
    """What views are rendered; the defaults are Zero-1-to-3's, whose angles are uniform on the sphere too.

    Raises:
        InputError: a value is out of range.
    """

    views: int = VIEWS_PER_OBJECT
    size: int = 512
    """Side of a view in pixels."""
    supersample: int = 2
    """Samples per pixel along each side."""
    fit: Fit = "cube"
    """See `mesh_files.load_parts`."""
    nearest: float = 1.5
    farthest: float = 2.2
    lowest: float = -90.0
    """Degrees of elevation."""
    highest: float = 90.0
    seed: int = 0
    renderer: RendererName = "vtk"
    """``vtk`` draws in software, ``torch`` in plain PyTorch on a GPU; they differ in a few pixels at edges."""

    def __post_init__(self) -> None:
        for name, low, high in (("views", 1, 1000), ("size", 8, 4096), ("supersample", 1, 8)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; use {low} to {high}")
        if self.fit not in FITS:
            raise InputError(f"fit '{self.fit}' is unknown; use one of {', '.join(FITS)}")
        if self.renderer not in RENDERERS:
            raise InputError(f"renderer '{self.renderer}' is unknown; use one of {', '.join(RENDERERS)}")
        if not NEAREST <= self.nearest <= self.farthest < math.inf:
            raise InputError(f"distances are {self.nearest} to {self.farthest}; use {NEAREST} or more, nearest first")
        if not -90.0 <= self.lowest <= self.highest <= 90.0:
            raise InputError(f"elevations are {self.lowest} to {self.highest}; use -90 to 90 degrees, lowest first")


@dataclass(frozen=True)
class Rendered:
    """What became of one mesh."""

    name: str
    problem: str | None = None
    """Why it could not be rendered, in one line."""
    was_there: bool = False


def sphere_cameras(name: str, options: RenderOptions) -> list[Camera]:
    """Azimuth, elevation (degrees) and distance of an object's cameras; the same ones at every call.

    Directions are uniform on the sphere between the elevations, distances uniform.
    """
    generator = object_generator(name, options.seed)
    draw = torch.rand((options.views, 3), generator=generator, dtype=torch.float64).numpy()
    low, high = (math.sin(math.radians(value)) for value in (options.lowest, options.highest))
    elevation = np.degrees(np.arcsin(low + (high - low) * draw[:, 1]))
    distance = options.nearest + (options.farthest - options.nearest) * draw[:, 2]
    return [(float(a), float(e), float(d)) for a, e, d in zip(360.0 * draw[:, 0], elevation, distance, strict=True)]


def render_folder(
    meshes: Mapping[str, Path], output: Path, options: RenderOptions, processes: int = 1
) -> Iterator[Rendered]:
    """Render meshes that are not rendered yet; broken ones are skipped and listed.

    Besides the objects' folders ``output`` gets ``render.json`` (the options), ``valid_paths.json`` (names of all
    rendered objects, as scripts/objaverse_renderings_to_webdataset.py takes them) and, where there are any,
    ``broken.json`` (name, file and reason of those that were skipped).

    Args:
        meshes: files by name, see `mesh_files.find_meshes`.
        processes: how many windows render at once.

    Yields:
        every mesh when it is done, in order.

    Raises:
        InputError: VTK is asked for and missing, or the folder holds views of other options.
    """
    keep_settings(output / SETTINGS_FILE, asdict(options))
    outcomes = []
    work = partial(_render_one, output=output, options=options)
    if processes == 1:
        for item in meshes.items():
            outcomes.append(work(item))
            yield outcomes[-1]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for outcome in pool.map(work, meshes.items()):
                outcomes.append(outcome)
                yield outcome
    broken = [{"name": o.name, "file": str(meshes[o.name]), "reason": o.problem} for o in outcomes if o.problem]
    _write_json(output / PATHS_FILE, [o.name for o in outcomes if not o.problem])
    if broken:
        _write_json(output / BROKEN_FILE, broken)
    else:
        (output / BROKEN_FILE).unlink(missing_ok=True)


def open_renderer(kind: RendererName, size: int, supersample: int) -> Renderer:
    """A renderer that keeps nothing but its window: ``vtk`` on the CPU, ``torch`` on a GPU where there is one.

    Raises:
        InputError: VTK is asked for and missing.
    """
    if kind == "torch":
        return TorchMeshRenderer(size, supersample, "cuda" if torch.cuda.is_available() else "cpu")
    return MeshRenderer(size, supersample)


_window = cache(open_renderer)  # one per process: opening one takes a second


def _render_one(item: tuple[str, Path], output: Path, options: RenderOptions) -> Rendered:
    name, path = item
    target = output / name
    if target.is_dir():
        return Rendered(name, was_there=True)
    renderer = _window(options.renderer, options.size, options.supersample)
    try:
        renderer.show(load_parts(path, options.fit))
    except InputError as error:
        return Rendered(name, problem=str(error))
    cameras = sphere_cameras(name, options)
    rgba = renderer.render_all(cameras).cpu().numpy()
    if not rgba[..., 3].any():
        return Rendered(name, problem=f"{path}: nothing of it is seen from any camera")
    files = encode_views(rgba, np.stack([camera_matrix(*camera) for camera in cameras]))
    temporary = output / f".{name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Rendered(name)


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
