"""Views of an object in the layout of Zero-1-to-3's renderings of Objaverse, and training samples made of them.

An object is a folder of ``000.png``, ``000.npy``, ``001.png``, …, 12 of each in Zero-1-to-3 (Liu et al. 2023,
arXiv 2303.11328). A picture is RGBA; a matrix is 3x4, world to camera, with the camera axes of Blender and OpenGL
(x right, y up, looking along -z). The world's z is up, the object's longest side is 1, its centre the origin, and
cameras look at it from distances of 1.5 to 2.2 with a field of view of 49.1 degrees.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.cameras import (
    PINHOLE,
    RELEASED,
    CameraConvention,
    from_opengl,
    look_at,
    relative_to_support,
)
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.images import support_tensor

VIEWS_PER_OBJECT = 12
ROTATION_TOLERANCE = 1e-3  # of the entries of R R^T; the files of the release agree to 1e-6


@dataclass(frozen=True)
class StoredViews:
    """Encoded files of one object, in memory or on disk; nothing is read before it is asked for."""

    name: str
    images: Sequence[bytes | Path]
    """PNG files."""
    cameras: Sequence[bytes | Path]
    """npy files, one for each image."""

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """A picture, RGBA.

        Raises:
            InputError: it cannot be read; names the object and the view.
        """
        try:
            return Image.open(io.BytesIO(_content(self.images[index]))).convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{self.name}: view {index:03d}.png cannot be read ({_reason(error)})") from error

    def world_to_camera(self, index: int) -> Float[np.ndarray, "3 4"]:
        """A camera, as in the file.

        Raises:
            InputError: it cannot be read or is no rigid motion; names the object and the view.
        """
        place = f"{self.name}: camera {index:03d}.npy"
        try:
            matrix = np.load(io.BytesIO(_content(self.cameras[index])), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{place} cannot be read ({_reason(error)})") from error
        if matrix.shape not in ((3, 4), (4, 4)) or matrix.dtype.kind != "f" or not np.isfinite(matrix).all():
            raise InputError(f"{place} holds {matrix.dtype} of shape {matrix.shape}, not a finite 3x4 matrix")
        matrix = matrix[:3].astype(np.float64)
        rotation = matrix[:, :3]
        deviation = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if deviation > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0.0:
            raise InputError(f"{place} has no rotation in its first three columns")
        return matrix

    def check(self) -> None:
        """Read all cameras, and the pictures' headers and checksums.

        Raises:
            InputError: one of them is damaged, or the pictures are not RGBA squares of one size.
        """
        sizes = set()
        for index, content in enumerate(self.images):
            try:
                with Image.open(io.BytesIO(_content(content))) as picture:
                    sizes.add((picture.size, picture.mode))
                    picture.verify()
            except (OSError, ValueError, SyntaxError) as error:
                raise InputError(f"{self.name}: view {index:03d}.png cannot be read ({_reason(error)})") from error
            self.world_to_camera(index)
        if len(sizes) != 1:
            raise InputError(f"{self.name}: its views have several sizes or modes: {sorted(sizes)}")
        (width, height), mode = sizes.pop()
        if width != height or mode != "RGBA":
            raise InputError(f"{self.name}: its views are {mode} of {width}x{height} pixels, not square RGBA")


def _content(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def stored_folder(folder: Path, name: str | None = None, count: int = VIEWS_PER_OBJECT) -> StoredViews:
    """The views of an object's folder.

    Raises:
        InputError: one of the first ``count`` pictures or cameras is missing.
    """
    images = [folder / f"{index:03d}.png" for index in range(count)]
    cameras = [path.with_suffix(".npy") for path in images]
    for path in (*images, *cameras):
        if not path.is_file():
            raise InputError(f"{name or folder}: {path.name} is missing")
    return StoredViews(name or folder.name, images, cameras)


def camera_matrix(azimuth: float, elevation: float, distance: float) -> Float[np.ndarray, "3 4"]:
    """World to camera in Blender's axes, of a camera that looks at the origin from (azimuth, elevation) in degrees."""
    c2w = look_at(azimuth, elevation, distance, PINHOLE).double().numpy()
    rotation = c2w[:3, :3] * np.array([1.0, -1.0, -1.0])  # OpenCV's axes to OpenGL's
    return np.concatenate([rotation.T, -rotation.T @ c2w[:3, 3:]], axis=1)


def camera_to_world(
    world_to_camera: Float[np.ndarray, "v 3 4"], convention: CameraConvention
) -> Float[Tensor, "v 4 4"]:
    """Poses as weights of a convention know them, float64. ``RELEASED`` gives ``(-R, t)`` of the OpenGL pose (R, t)."""
    rotation = np.swapaxes(world_to_camera[:, :, :3], 1, 2)
    c2w = np.tile(np.eye(4), (len(world_to_camera), 1, 1))
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3:] = -rotation @ world_to_camera[:, :, 3:]
    return from_opengl(torch.from_numpy(c2w), convention)


def camera_angles(
    world_to_camera: Float[np.ndarray, "v 3 4"],
) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """Azimuths and elevations in degrees, and distances from the origin, of where cameras stand."""
    position = camera_to_world(world_to_camera, PINHOLE)[:, :3, 3].numpy()
    distance = np.linalg.norm(position, axis=1)
    azimuth = np.degrees(np.arctan2(position[:, 1], position[:, 0])) % 360.0
    return azimuth, np.degrees(np.arcsin(np.clip(position[:, 2] / distance, -1.0, 1.0))), distance


class NovelViewSample(TypedDict):
    """One training example; view 0 of ``c2w`` is the support view."""

    name: str
    support_rgb: Float[Tensor, "3 size size"]
    """In about [-1, 1], on white."""
    query_rgb: Float[Tensor, "n 3 size size"]
    c2w: Float[Tensor, "views 4 4"]
    """Relative to the support view, whose own is the identity; float32, in the convention's camera axes."""


@dataclass(frozen=True)
class SampleOptions:
    """What a training example is made of."""

    num_query: int = 4
    size: int = 256
    """Side of the pictures in pixels."""
    convention: CameraConvention = RELEASED

    def __post_init__(self) -> None:
        if self.num_query < 1:
            raise InputError(f"num_query is {self.num_query}; use 1 or more")
        if self.size < 1:
            raise InputError(f"size of training views is {self.size}; use 1 or more pixels")


def draw_views(count: int, num_query: int, generator: torch.Generator) -> Int[Tensor, " views"]:
    """A support view and then ``num_query`` query views: distinct, uniform among ``count``.

    Raises:
        InputError: there are too few.
    """
    if num_query >= count:
        raise InputError(f"num_query is {num_query}, and objects have {count} views; one of them is the support view")
    return torch.randperm(count, generator=generator)[: num_query + 1]


def make_sample(views: StoredViews, options: SampleOptions, generator: torch.Generator) -> NovelViewSample:
    """Draw views of an object and prepare them as the release does.

    Pictures: pixels of alpha 0 become white, the others keep their colour; bicubic antialiased resizing, whose
    overshoot stays (`images.support_tensor`). Poses: inverted, brought into the convention's axes, relative to the
    support view; distances keep their scale.

    Raises:
        InputError: too few views, or one that cannot be read.
    """
    chosen = draw_views(len(views), options.num_query, generator).tolist()
    rgb = torch.cat([support_tensor(views.image(index), options.size) for index in chosen])
    cameras = np.stack([views.world_to_camera(index) for index in chosen])
    c2w = relative_to_support(camera_to_world(cameras, options.convention))
    # The support's pose is the identity by definition; inverting leaves 1e-16 of it, which float32 does not show.
    return {"name": views.name, "support_rgb": rgb[0], "query_rgb": rgb[1:], "c2w": c2w.float()}


def encode_views(rgba: UInt8[np.ndarray, "v h w 4"], cameras: Float[np.ndarray, "v 3 4"]) -> dict[str, bytes]:
    """Files of an object's folder by name."""
    files = {}
    for index, (picture, camera) in enumerate(zip(rgba, cameras, strict=True)):
        files[f"{index:03d}.png"] = _saved(Image.fromarray(picture).save, format="png")
        files[f"{index:03d}.npy"] = _saved(lambda stream, camera=camera: np.save(stream, camera, allow_pickle=False))
    return files


def _saved(save: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, **options)
    return stream.getvalue()
