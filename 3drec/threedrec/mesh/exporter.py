"""From a trained field to mesh files: isosurface, clean, simplify, unwrap, bake, write."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Union

import torch

from threedrec.errors import InputError
from threedrec.files import atomic_folder
from threedrec.mesh.bake import ColorFunction, bake_texture, colors_at
from threedrec.mesh.isosurface import DensityFunction, extract_isosurface
from threedrec.mesh.simplify import keep_large_parts, simplify
from threedrec.mesh.types import is_watertight
from threedrec.mesh.unwrap import unwrap
from threedrec.mesh.write import TexturedMesh, write_glb, write_obj, write_ply

logger = logging.getLogger(__name__)

_FORMATS = ("glb", "obj-mtl", "obj", "ply")
_FEWEST_FACES = 20
_TEXTURE_SUFFIXES = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg"}


@dataclass
class MeshExporterConfig:
    """``system.exporter``: threestudio's keys of its mesh exporter, and ours."""

    fmt: str = "all"
    """Formats, separated by commas: ``glb``, ``obj-mtl``, ``obj`` (vertex colours), ``ply``, or ``all`` (not obj)."""
    save_name: str = "model"
    """Name of the files, without suffix."""
    save_normal: bool = True
    """Write vertex normals."""
    save_uv: bool = True
    """Unwrap the mesh; without it files carry vertex colours."""
    save_texture: bool = True
    """Bake the texture; without it files carry vertex colours."""
    texture_size: int = 1024
    """Side of the texture, pixels."""
    texture_format: str = "png"
    """Of the image beside the OBJ: ``png`` or ``jpg``."""
    xatlas_chart_options: Dict[str, Any] = field(default_factory=dict)
    """Fields of ``xatlas.ChartOptions``."""
    xatlas_pack_options: Dict[str, Any] = field(default_factory=dict)
    """Fields of ``xatlas.PackOptions``."""
    context_type: str = "gl"
    """Of threestudio's rasteriser; not used, since the texture is rasterised without one."""
    isosurface_resolution: int = 0
    """Voxels along the longest side of the object's box; 0 is 256 on a GPU and 160 on a CPU."""
    isosurface_threshold: Union[float, str] = "auto"
    """Density of the surface, or ``auto``: the surface that rays see (``threedrec.mesh.threshold``)."""
    isosurface_chunk: int = 262144
    """Points per call of the field."""
    radius: float = 1.0
    """The surface is cut off at this distance from the origin."""
    face_budget: int = 50000
    """Most faces of the mesh."""
    keep_components: float = 0.05
    """Solid parts smaller than this fraction of the largest are dropped."""


@dataclass(frozen=True)
class MeshReport:
    """What was exported."""

    vertices: int
    faces: int
    watertight: bool
    threshold: float
    files: list[Path]
    seconds: dict[str, float]
    """Of every step."""


class MeshExporter:
    """Writes a field as mesh files."""

    Config = MeshExporterConfig

    def __init__(self, config: MeshExporterConfig) -> None:
        """Check the values of ``config``.

        Raises:
            InputError: a value is out of range or unknown; names its key.
        """
        self.config = config
        self.formats = _check(config)

    def __call__(
        self,
        density_fn: DensityFunction,
        color_fn: ColorFunction,
        out_dir: str | os.PathLike[str],
        device: torch.device | str = "cpu",
    ) -> MeshReport:
        """Export the field; see :func:`export_mesh`."""
        config, device = self.config, torch.device(device)
        seconds: dict[str, float] = {}
        with _timed("isosurface", seconds):
            surface = extract_isosurface(
                density_fn,
                config.isosurface_resolution or (256 if device.type == "cuda" else 160),
                None if config.isosurface_threshold == "auto" else float(config.isosurface_threshold),
                config.radius,
                config.keep_components,
                device,
                config.isosurface_chunk,
            )
        with _timed("simplify", seconds):
            # Noise is no better for many faces, and xatlas needs minutes for them.
            budget = max(config.face_budget // 4, _FEWEST_FACES) if surface.rough else config.face_budget
            mesh = keep_large_parts(simplify(surface.mesh, budget), config.keep_components)
        model = TexturedMesh(mesh, colors_at(color_fn, mesh.vertices, device, config.isosurface_chunk))
        if config.save_uv and config.save_texture and {"glb", "obj-mtl"} & set(self.formats):
            with _timed("unwrap", seconds):
                atlas = unwrap(mesh, config.texture_size, config.xatlas_chart_options, config.xatlas_pack_options)
            with _timed("bake", seconds):
                texture = bake_texture(mesh, atlas, color_fn, config.texture_size, device, config.isosurface_chunk)
            model = TexturedMesh(mesh, model.colors, atlas, texture)
        with _timed("write", seconds):
            files = self._write(model, Path(out_dir))
        watertight = is_watertight(mesh.faces)
        report = MeshReport(len(mesh.vertices), len(mesh.faces), watertight, surface.threshold, files, seconds)
        logger.info("Mesh: %d vertices, %d faces, threshold %.3g", report.vertices, report.faces, report.threshold)
        return report

    def _write(self, model: TexturedMesh, out_dir: Path) -> list[Path]:
        name, normals = self.config.save_name, self.config.save_normal
        suffix = _TEXTURE_SUFFIXES[self.config.texture_format]
        with atomic_folder(out_dir) as folder:
            if "obj-mtl" in self.formats:
                write_obj(folder / f"{name}.obj", model, normals, suffix)
            if "obj" in self.formats:
                write_obj(folder / f"{name}.obj", TexturedMesh(model.mesh, model.colors), normals)
            if "ply" in self.formats:
                write_ply(folder / f"{name}.ply", model, normals)
            if "glb" in self.formats:
                write_glb(folder / f"{name}.glb", model, normals)
            names = sorted(file.name for file in folder.iterdir())
        return [out_dir / file for file in names]


def export_mesh(
    density_fn: DensityFunction,
    color_fn: ColorFunction,
    config: MeshExporterConfig,
    out_dir: str | os.PathLike[str],
    name: str | None = None,
    device: torch.device | str = "cpu",
) -> MeshReport:
    """Write the field's surface as mesh files; all of them appear, or none.

    Args:
        density_fn: (N, 3) world points in [-1, 1]³ to (N, 1) densities.
        color_fn: (N, 3) world points to (N, 3) colours in [0, 1].
        out_dir: made where missing.
        name: of the files; None takes ``config.save_name``.
        device: where the points for both functions are made.

    Raises:
        InputError: the field is empty or not finite, a value of ``config`` is wrong, or ``out_dir`` is not writable.
    """
    named = MeshExporterConfig(**{**vars(config), "save_name": name or config.save_name})
    return MeshExporter(named)(density_fn, color_fn, out_dir, device)


def _check(config: MeshExporterConfig) -> list[str]:
    """The formats to write, once every value has been found good."""
    formats = [part.strip() for part in config.fmt.split(",")]
    if formats == ["all"]:
        formats = ["glb", "obj-mtl", "ply"]
    for name in formats:
        if name not in _FORMATS:
            raise InputError(f"system.exporter.fmt: unknown format {name!r}; choose from {', '.join(_FORMATS)} or all")
    if {"obj", "obj-mtl"} <= set(formats):
        raise InputError("system.exporter.fmt: obj and obj-mtl write the same file; choose one of them")
    if config.texture_format not in _TEXTURE_SUFFIXES:
        raise InputError(f"system.exporter.texture_format: unknown format {config.texture_format!r}; choose png or jpg")
    if not config.save_name or Path(config.save_name).name != config.save_name:
        raise InputError(f"system.exporter.save_name: {config.save_name!r} is not a plain file name; give one")
    threshold = config.isosurface_threshold
    if threshold != "auto" and not (_is_number(threshold) and float(threshold) > 0):
        raise InputError(f"system.exporter.isosurface_threshold: {threshold!r} is neither auto nor a positive density")
    limits = {
        "texture_size": (16, 16384),
        "isosurface_chunk": (1, math.inf),
        "radius": (1e-3, math.inf),
        "face_budget": (_FEWEST_FACES, math.inf),
        "keep_components": (0.0, 1.0),
    }
    for key, (low, high) in limits.items():
        value = getattr(config, key)
        if not low <= value <= high:
            raise InputError(f"system.exporter.{key}: {value} is out of range; give a value from {low:g} to {high:g}")
    if config.isosurface_resolution != 0 and not 8 <= config.isosurface_resolution <= 1024:
        raise InputError(
            f"system.exporter.isosurface_resolution: {config.isosurface_resolution} is out of range; give 0 (chosen by "
            "the device) or a value from 8 to 1024"
        )
    return formats


def _is_number(value: float | str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 3)
