"""A textured mesh seen from anywhere, rendered offscreen on the CPU with VTK (the ``render`` extra).

Frames: glTF files are y up and face +z; the world is z up and objects face +x, so a camera at azimuth 0 sees the
front. Lights are those of :mod:`nvsadapter_guidance.training.lights`.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.mesh_files import load_parts

DISTANCE = 1.5  # of the camera from the origin, in units where an object has radius at most 0.5
FOVY = 49.1  # degrees
SMOOTHING_ANGLE = 40.0  # degrees between faces above which an edge is drawn sharp

Camera = tuple[float, float, float]
"""Azimuth and elevation in degrees, distance from the origin."""


def world_from_gltf(points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Rotate glTF coordinates (y up, front +z) into the world's (z up, front +x)."""
    return points[:, [2, 0, 1]]


def corner_normals(
    points: Float[np.ndarray, "n 3"], faces: Int[np.ndarray, "f 3"], angle: float = SMOOTHING_ANGLE
) -> Float[np.ndarray, "f 3 3"]:
    """Unit normals of every face corner, smooth over edges below ``angle`` degrees.

    Vertices are joined by position first, since texture seams split them. A neighbour wound the other way counts
    with its normal flipped, so that each corner's normal keeps the side of its own face.
    """
    from scipy import sparse

    cross = np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])
    unit = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-20)
    _, welded = np.unique(np.round(points, 5), axis=0, return_inverse=True)
    corner_vertex = welded.reshape(-1)[faces.reshape(-1)]
    count = len(corner_vertex)
    incidence = sparse.csr_matrix((np.ones(count), (np.arange(count), corner_vertex)))
    pairs = (incidence @ incidence.T).tocoo()
    own, other = pairs.row // 3, pairs.col // 3
    cosine = np.einsum("ij,ij->i", unit[own], unit[other])
    near = np.abs(cosine) > math.cos(math.radians(angle))
    weights = sparse.csr_matrix((np.sign(cosine[near]), (pairs.row[near], other[near])), shape=(count, len(faces)))
    summed = weights @ cross
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.where(length > 1e-20, summed / np.maximum(length, 1e-20), np.repeat(unit, 3, axis=0)).reshape(-1, 3, 3)


def texture_image(part: Any) -> Image.Image | None:
    """The picture on a ``trimesh.Trimesh``, where it has one and coordinates to lay it on with.

    glTF and OBJ materials keep it under different names.
    """
    material = getattr(part.visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    return image if getattr(part.visual, "uv", None) is not None else None


def corner_colours(part: Any) -> UInt8[np.ndarray, "corners 3"] | None:
    """Colours of every face corner of a ``trimesh.Trimesh`` with coloured vertices or faces, else None."""
    if part.visual.kind == "vertex":
        return np.ascontiguousarray(part.visual.vertex_colors[part.faces.reshape(-1), :3], dtype=np.uint8)
    if part.visual.kind == "face":
        return np.repeat(part.visual.face_colors[:, :3], 3, axis=0).astype(np.uint8)
    return None


def plain_colour(part: Any) -> Float[np.ndarray, "3"]:
    """Colour in [0, 1] of a ``trimesh.Trimesh`` that has neither a picture nor colours of its own."""
    material = getattr(part.visual, "material", None)
    return np.asarray((part.visual if material is None else material).main_color[:3]) / 255.0


class MeshRenderer:
    """Renders one mesh after another into one offscreen VTK window.

    Args:
        size: side of the square views in pixels.
        supersample: samples per pixel along each side.
    """

    def __init__(self, size: int = 128, supersample: int = 4) -> None:
        if not os.environ.get("DISPLAY"):  # otherwise VTK warns before it falls back to EGL
            os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
        try:
            import vtk
        except ImportError as error:
            raise InputError("rendering meshes needs VTK: pip install -e '.[render]'") from error
        self._vtk = vtk
        self.size, self.supersample = size, supersample
        self._renderer = vtk.vtkRenderer()
        self._renderer.SetBackground(1.0, 1.0, 1.0)
        self._renderer.SetBackgroundAlpha(0.0)
        self._renderer.AutomaticLightCreationOff()
        for light in LIGHTS:
            source = vtk.vtkLight()
            source.SetLightTypeToSceneLight()
            source.PositionalOff()
            source.SetPosition(*light.direction)
            source.SetFocalPoint(0.0, 0.0, 0.0)
            source.SetIntensity(light.intensity)
            self._renderer.AddLight(source)
        self._window = vtk.vtkRenderWindow()
        self._window.OffScreenRenderingOn()
        self._window.SetMultiSamples(0)
        self._window.SetAlphaBitPlanes(1)
        self._window.SetSize(size * supersample, size * supersample)
        self._window.AddRenderer(self._renderer)

    def load(self, path: Path, scale: float = 1.0) -> None:
        """Replace the mesh in the window.

        Args:
            path: a glTF file, y up, facing +z.
            scale: its points are multiplied by this.

        Raises:
            InputError: the file cannot be read as a mesh.
        """
        self.show(load_parts(path, "none"), scale)

    def show(self, parts: Sequence[Any], scale: float = 1.0) -> None:
        """Replace what is in the window by ``trimesh.Trimesh`` parts with faces, in glTF axes."""
        self._renderer.RemoveAllViewProps()
        for part in parts:
            self._renderer.AddActor(self._actor(part, scale))

    def render_all(self, cameras: Sequence[Camera]) -> UInt8[Tensor, "V h w 4"]:
        """Views of several cameras, see :meth:`render`."""
        return torch.from_numpy(np.stack([self.render(*camera) for camera in cameras]))

    def render(self, azimuth: float, elevation: float, distance: float = DISTANCE) -> UInt8[np.ndarray, "h w 4"]:
        """One view as straight-alpha RGBA; the camera stands at (azimuth, elevation) in degrees and looks at 0."""
        azimuth_rad, elevation_rad = math.radians(azimuth), math.radians(elevation)
        camera = self._renderer.GetActiveCamera()
        camera.SetPosition(
            distance * math.cos(elevation_rad) * math.cos(azimuth_rad),
            distance * math.cos(elevation_rad) * math.sin(azimuth_rad),
            distance * math.sin(elevation_rad),
        )
        camera.SetFocalPoint(0.0, 0.0, 0.0)
        camera.SetViewUp(0.0, 0.0, 1.0)
        camera.SetViewAngle(FOVY)
        camera.SetClippingRange(0.05 * distance, 4.0 * distance)
        self._window.Render()
        return self._read()

    def _read(self) -> UInt8[np.ndarray, "h w 4"]:
        from vtk.util.numpy_support import vtk_to_numpy

        side = self.size * self.supersample
        buffer = self._vtk.vtkUnsignedCharArray()
        self._window.GetRGBACharPixelData(0, 0, side - 1, side - 1, 0, buffer)
        pixels = vtk_to_numpy(buffer).reshape(side, side, 4)[::-1].astype(np.float32)
        alpha = pixels[..., 3:] / 255.0
        stacked = np.concatenate([pixels[..., :3] * alpha, alpha], axis=-1)
        blocks = stacked.reshape(self.size, self.supersample, self.size, self.supersample, 4).mean(axis=(1, 3))
        colour = blocks[..., :3] / np.maximum(blocks[..., 3:], 1e-6)
        return np.concatenate([colour, 255.0 * blocks[..., 3:]], axis=-1).round().clip(0, 255).astype(np.uint8)

    def _actor(self, part: Any, scale: float) -> Any:
        from vtk.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray

        vtk = self._vtk
        points, faces = world_from_gltf(np.asarray(part.vertices, dtype=np.float64)), np.asarray(part.faces)
        normals = corner_normals(points, faces).reshape(-1, 3)
        corners = faces.reshape(-1)
        data, vertices, cells = vtk.vtkPolyData(), vtk.vtkPoints(), vtk.vtkCellArray()
        vertices.SetData(numpy_to_vtk((points[corners] * scale).astype(np.float32), deep=True))
        ids = np.arange(len(corners), dtype=np.int64).reshape(-1, 3)
        cells.SetCells(len(ids), numpy_to_vtkIdTypeArray(np.insert(ids, 0, 3, axis=1).reshape(-1), deep=True))
        data.SetPoints(vertices)
        data.SetPolys(cells)
        data.GetPointData().SetNormals(numpy_to_vtk(normals.astype(np.float32), deep=True))
        mapper, actor = vtk.vtkPolyDataMapper(), vtk.vtkActor()
        mapper.SetInputData(data)
        mapper.ScalarVisibilityOff()
        actor.SetMapper(mapper)
        shading = actor.GetProperty()
        shading.SetAmbient(1.0)
        shading.SetDiffuse(1.0)
        shading.SetSpecular(0.0)
        image, colours = texture_image(part), corner_colours(part)
        plain = image is not None or colours is not None
        tint = (1.0, 1.0, 1.0) if plain else tuple(plain_colour(part))
        shading.SetDiffuseColor(*tint)
        shading.SetAmbientColor(*(AMBIENT * value for value in tint))
        if image is not None:
            coordinates = np.asarray(part.visual.uv, dtype=np.float32)[corners]
            data.GetPointData().SetTCoords(numpy_to_vtk(coordinates, deep=True))
            actor.SetTexture(self._texture(image))
        elif colours is not None:
            data.GetPointData().SetScalars(numpy_to_vtk(colours, deep=True))
            mapper.ScalarVisibilityOn()
            shading.SetAmbient(AMBIENT)  # of a vertex's colour; the property's own ambient colour is not looked at
        return actor

    def _texture(self, image: Image.Image) -> Any:
        from vtk.util.numpy_support import numpy_to_vtk

        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[::-1])  # VTK's first row is the bottom one
        data = self._vtk.vtkImageData()
        data.SetDimensions(image.width, image.height, 1)
        data.GetPointData().SetScalars(numpy_to_vtk(pixels.reshape(-1, 3), deep=True))
        texture = self._vtk.vtkTexture()
        texture.SetInputData(data)
        texture.InterpolateOn()
        # no mipmaps: samples are denser than texels anyway, and a software driver hangs over some views with them
        return texture
