"""From a trained field to mesh files: isosurface, clean, simplify, unwrap, bake, write."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Union

import torch

from threedrec.config_schema import ignored
from threedrec.errors import InputError
from threedrec.files import atomic_folder
from threedrec.mesh.bake import ColorFunction, bake_texture, colors_at
from threedrec.mesh.isosurface import DensityFunction, extract_isosurface
from threedrec.mesh.simplify import keep_large_parts, simplify
from threedrec.mesh.types import is_watertight
from threedrec.mesh.unwrap import chart_options, pack_options, unwrap
from threedrec.mesh.write import TexturedMesh, write_glb, write_obj, write_ply

logger = logging.getLogger(__name__)

_FORMATS = ("glb", "obj-mtl", "obj", "ply")
_FEWEST_FACES = 20
_LIMITS: dict[str, tuple[float, float]] = {
    "texture_size": (16, 16384),
    "isosurface_resolution": (8, 1024),
    "isosurface_smoothing": (0.0, 10.0),
    "isosurface_chunk": (1, math.inf),
    "radius": (1e-3, math.inf),
    "face_budget": (_FEWEST_FACES, math.inf),
    "keep_components": (0.0, 1.0),
}
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
    context_type: str = ignored("gl", "the texture is rasterised without a graphics context")
    isosurface_resolution: int = 0
    """Voxels along the longest side of the object's box; 0 is 256 on a GPU and 160 on a CPU."""
    isosurface_threshold: Union[int, float, str] = "auto"
    """Density of the surface, or ``auto``: the surface that rays see (``threedrec.mesh.threshold``)."""
    isosurface_smoothing: float = 1.5
    """Standard deviation of the smoothing of the surface, voxels; 0 keeps all of the field's noise."""
    isosurface_chunk: int = 262144
    """Points per call of the field."""
    radius: float = 1.0
    """The surface is cut off at this distance from the origin."""
    face_budget: int = 50000
    """Most faces of the mesh."""
    keep_components: float = 0.05
    """Solid parts smaller than this fraction of the largest are dropped."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value is out of range or unknown; begins with its key.
        """
        for name in self.formats:
            if name not in _FORMATS:
                raise InputError(f"fmt: unknown format {name!r}; choose from {', '.join(_FORMATS)} or all")
        if {"obj", "obj-mtl"} <= set(self.formats):
            raise InputError("fmt: obj and obj-mtl write the same file; choose one of them")
        if self.texture_format not in _TEXTURE_SUFFIXES:
            raise InputError(f"texture_format: unknown format {self.texture_format!r}; choose png or jpg")
        if self.save_name in ("", ".", "..") or Path(self.save_name).name != self.save_name:
            raise InputError(f"save_name: {self.save_name!r} is not a plain file name; give one")
        threshold = self.isosurface_threshold
        if threshold != "auto" and not (_is_number(threshold) and float(threshold) > 0):
            raise InputError(f"isosurface_threshold: {threshold!r} is neither auto nor a positive density")
        for key, (low, high) in _LIMITS.items():
            value = getattr(self, key)
            if not low <= value <= high and not (key == "isosurface_resolution" and value == 0):
                raise InputError(f"{key}: {value} is out of range; give a value from {low:g} to {high:g}")
        chart_options(self.xatlas_chart_options)
        pack_options(self.xatlas_pack_options)

    @property
    def formats(self) -> list[str]:
        """The formats to write."""
        names = [part.strip() for part in self.fmt.split(",")]
        return ["glb", "obj-mtl", "ply"] if names == ["all"] else names


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
        """Export as ``config`` says."""
        self.config = config

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
                config.isosurface_smoothing,
                config.keep_components,
                device,
                config.isosurface_chunk,
            )
        with _timed("simplify", seconds):
            # Noise is no better for many faces, and xatlas needs minutes for them.
            budget = max(config.face_budget // 4, _FEWEST_FACES) if surface.rough else config.face_budget
            mesh = keep_large_parts(simplify(surface.mesh, budget), config.keep_components)
        model = TexturedMesh(mesh, colors_at(color_fn, mesh.vertices, device, config.isosurface_chunk))
        if config.save_uv and config.save_texture and {"glb", "obj-mtl"} & set(self.config.formats):
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
            if "obj-mtl" in self.config.formats:
                write_obj(folder / f"{name}.obj", model, normals, suffix)
            if "obj" in self.config.formats:
                write_obj(folder / f"{name}.obj", TexturedMesh(model.mesh, model.colors), normals)
            if "ply" in self.config.formats:
                write_ply(folder / f"{name}.ply", model, normals)
            if "glb" in self.config.formats:
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
        InputError: the field is empty or not finite, ``name`` is no file name, or ``out_dir`` is not writable.
    """
    named = replace(config, save_name=name or config.save_name)
    return MeshExporter(named)(density_fn, color_fn, out_dir, device)


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
