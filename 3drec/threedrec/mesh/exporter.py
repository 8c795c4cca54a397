"""From a trained field to mesh files: isosurface, clean, simplify, unwrap, bake, write."""

import logging
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Union

import torch

from threedrec.config_schema import ignored
from threedrec.errors import InputError
from threedrec.files import atomic_folder
from threedrec.mesh.bake import ColorFunction, bake_texture, colors_at
from threedrec.mesh.isosurface import Samples
from threedrec.mesh.sampling import DensityFunction, sample_solid
from threedrec.mesh.shape import FEWEST_FACES, ShapeOptions, make_shape, timed
from threedrec.mesh.side_process import SideProcess
from threedrec.mesh.types import is_watertight
from threedrec.mesh.unwrap import chart_options, pack_options
from threedrec.mesh.write import TexturedMesh, write_glb, write_obj, write_ply

logger = logging.getLogger(__name__)

_FORMATS = ("glb", "obj-mtl", "obj", "ply")
_CPU_CHUNK = 16384
"""Most points per call of the field on a CPU; what is computed between its layers then stays in the caches."""
_LIMITS: dict[str, tuple[float, float]] = {
    "texture_size": (16, 16384),
    "isosurface_resolution": (8, 1024),
    "isosurface_smoothing": (0.0, 10.0),
    "isosurface_chunk": (1, math.inf),
    "radius": (1e-3, math.inf),
    "face_budget": (FEWEST_FACES, math.inf),
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


@dataclass(frozen=True)
class Sampled:
    """A field of which nothing but colours will be asked any more."""

    samples: Samples
    seconds: float
    """That sampling took."""
    side: SideProcess | None = None
    """Where its shape is being made, if that has begun."""

    def close(self) -> None:
        """Give up on the shape, if it is still being made."""
        if self.side is not None:
            self.side.close()


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
        return self.finish(self._sampled(density_fn, device), color_fn, out_dir, device)

    def begin(self, density_fn: DensityFunction, device: torch.device | str) -> Sampled:
        """Sample the field, and make its shape in a process of its own; :meth:`finish` does the rest.

        Raises:
            InputError: the field is empty or not finite.
        """
        side = SideProcess()
        try:
            sampled = self._sampled(density_fn, device)
            side.begin(sampled.samples, self._shape_options())
        except BaseException:
            side.close()
            raise
        return replace(sampled, side=side)

    def finish(
        self, sampled: Sampled, color_fn: ColorFunction, out_dir: str | os.PathLike[str], device: torch.device | str
    ) -> MeshReport:
        """Write the files of a field that has been sampled; see :func:`export_mesh`."""
        config, chunk = self.config, self._chunk(device)
        shape = make_shape(sampled.samples, self._shape_options()) if sampled.side is None else sampled.side.shape()
        seconds = dict(shape.seconds)
        seconds["isosurface"] = round(seconds["isosurface"] + sampled.seconds, 3)
        with timed("bake", seconds):
            model = TexturedMesh(shape.mesh, colors_at(color_fn, shape.mesh.vertices, device, chunk))
            if shape.atlas is not None:
                texture = bake_texture(shape.mesh, shape.atlas, color_fn, config.texture_size, device, chunk)
                model = replace(model, atlas=shape.atlas, texture=texture)
        with timed("write", seconds):
            files = self._write(model, Path(out_dir))
        mesh, watertight = shape.mesh, is_watertight(shape.mesh.faces)
        report = MeshReport(len(mesh.vertices), len(mesh.faces), watertight, shape.threshold, files, seconds)
        logger.info("Mesh: %d vertices, %d faces, threshold %.3g", report.vertices, report.faces, report.threshold)
        return report

    def _sampled(self, density_fn: DensityFunction, device: torch.device | str) -> Sampled:
        config = self.config
        seconds: dict[str, float] = {}
        with timed("samples", seconds):
            samples = sample_solid(
                density_fn,
                config.isosurface_resolution or (256 if torch.device(device).type == "cuda" else 160),
                self._threshold(),
                config.radius,
                config.keep_components,
                device,
                self._chunk(device),
            )
        return Sampled(samples, seconds["samples"])

    def _threshold(self) -> float | None:
        return None if self.config.isosurface_threshold == "auto" else float(self.config.isosurface_threshold)

    def _chunk(self, device: torch.device | str) -> int:
        on_cpu = torch.device(device).type == "cpu"
        return min(self.config.isosurface_chunk, _CPU_CHUNK) if on_cpu else self.config.isosurface_chunk

    def _shape_options(self) -> ShapeOptions:
        config = self.config
        textured = config.save_uv and config.save_texture and bool({"glb", "obj-mtl"} & set(config.formats))
        return ShapeOptions(
            self._threshold(),
            config.isosurface_smoothing,
            config.keep_components,
            config.face_budget,
            config.texture_size if textured else 0,
            dict(config.xatlas_chart_options),
            dict(config.xatlas_pack_options),
        )

    def _write(self, model: TexturedMesh, out_dir: Path) -> list[Path]:
        name, normals = self.config.save_name, self.config.save_normal
        suffix = _TEXTURE_SUFFIXES[self.config.texture_format]
        formats = self.config.formats
        with atomic_folder(out_dir) as folder, ThreadPoolExecutor() as pool:
            # Images are compressed outside of Python's lock.
            tasks: list[Future[Any]] = []
            if "obj-mtl" in formats:
                tasks.append(pool.submit(write_obj, folder / f"{name}.obj", model, normals, suffix))
            if "obj" in formats:
                plain = TexturedMesh(model.mesh, model.colors)
                tasks.append(pool.submit(write_obj, folder / f"{name}.obj", plain, normals))
            if "ply" in formats:
                tasks.append(pool.submit(write_ply, folder / f"{name}.ply", model, normals))
            if "glb" in formats:
                tasks.append(pool.submit(write_glb, folder / f"{name}.glb", model, normals))
            for task in tasks:
                task.result()
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
