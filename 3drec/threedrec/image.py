"""What goes in: one image of an object, as the support (reference) view of the reconstruction.

The file is read whatever its mode (``preprocess.reading``), the object is told from the background
(``preprocess.segmentation``), and framed as the adapter's training images are (``preprocess.framing``): centred on
white, the longer side of its silhouette's box taking ``fill`` of the frame.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from threedrec.camera_sampling import RandomCameraConfig
from threedrec.cameras import Cameras, orbit_cameras
from threedrec.errors import InputError
from threedrec.files import atomic_path
from threedrec.lookup import find_path
from threedrec.preprocess import (
    Window,
    check_coverage,
    cut_out,
    decontaminate,
    read_gray,
    read_rgba,
    resample,
    silhouette_window,
    whole_window,
)
from threedrec.schedules import at_milestone

__all__ = ["SingleImageConfig", "SupportView", "companion_path", "load_support_view", "save_support_view"]

_MAX_ASPECT_MISMATCH = 0.02
"""How much a depth, normal or mask map may differ from its image in aspect; rounding stays far below."""


@dataclass
class SingleImageConfig:
    """The image and the cameras around it (``data``). Names and defaults of threestudio's single-image data module."""

    image_path: str = ""
    """PNG, JPEG or WebP of one object."""
    height: Union[int, list[int]] = field(default=96, metadata={"ge": 1})
    """Pixels of the reference view in training; a list gives one per stage between ``resolution_milestones``."""
    width: Union[int, list[int]] = field(default=96, metadata={"ge": 1})
    """The same as ``height``: the reference view is square."""
    resolution_milestones: list[int] = field(default_factory=list, metadata={"ge": 0})
    """Steps at which the next height and width come into force."""
    default_elevation_deg: float = field(default=0.0, metadata={"ge": -90, "le": 90})
    """Where the image was taken from: degrees above the object's equator."""
    default_azimuth_deg: float = -180.0
    """Degrees; the shipped configs say 0, which puts the object's front at +x."""
    default_camera_distance: float = field(default=1.2, metadata={"gt": 0})
    default_fovy_deg: float = field(default=60.0, metadata={"gt": 0, "lt": 180})
    rays_noise_scale: float = field(default=2e-3, metadata={"ge": 0})
    """Standard deviation of the jitter of the reference rays in training, see ``Cameras.rays``."""
    requires_depth: bool = False
    """Read ``<image>_depth.png`` too (0..1, 8 or 16 bits)."""
    requires_normal: bool = False
    """Read ``<image>_normal.png`` too."""
    random_camera: RandomCameraConfig = field(default_factory=RandomCameraConfig)
    use_random_camera: bool = field(
        default=True, metadata={"ignored": "random views are always part of the reconstruction", "harmless": (True,)}
    )
    batch_size: int = field(default=1, metadata={"ignored": "there is one reference view", "harmless": (1,)})
    recenter: bool = True
    """Centre the object and scale it to ``fill``; False keeps the image's own framing (padded to a square)."""
    fill: float = field(default=0.65, metadata={"ge": 0.1, "le": 1.0})
    """Longer side of the silhouette's box over the frame's side."""
    segmentation: Literal["auto", "alpha", "rembg", "plain"] = "auto"
    """How the object is told from the background, see ``preprocess.segmentation``."""
    mask_path: str = ""
    """A mask (white on the object, black elsewhere) that replaces segmentation."""
    rembg_model: str = "u2net"
    """Which network rembg uses: one of its names, or the path of an ISNet network (.onnx)."""

    def __post_init__(self) -> None:
        heights, widths = (value if isinstance(value, list) else [value] for value in (self.height, self.width))
        if len(heights) != len(widths):
            raise InputError(f"width: {len(widths)} values beside {len(heights)} of height; give as many of both")
        if heights != widths:
            raise InputError(
                f"height: {self.height} beside a width of {self.width}; the reference view is square, so give one size"
            )
        if len(heights) > 1 and len(heights) != len(self.resolution_milestones) + 1:
            raise InputError(
                f"resolution_milestones: {len(heights)} sizes need {len(heights) - 1} milestones,"
                f" got {len(self.resolution_milestones)}"
            )
        if self.resolution_milestones != sorted(self.resolution_milestones):
            raise InputError("resolution_milestones: steps must not decrease; sort them")

    def size_at(self, step: int) -> tuple[int, int]:
        """Return height and width of the reference view at an optimisation step."""
        milestones = self.resolution_milestones
        return at_milestone(self.height, milestones, step), at_milestone(self.width, milestones, step)


@dataclass
class SupportView:
    """The reference view: what the object looks like from one known camera."""

    rgb: Float[Tensor, "H W 3"]
    """Composited over white, in [0, 1]."""
    mask: Float[Tensor, "H W 1"]
    """Fractional alpha in [0, 1]."""
    depth: Float[Tensor, "H W 1"] | None
    """As in the file, scaled to 0..1 (no metric unit); 0 outside the image."""
    normal: Float[Tensor, "H W 3"] | None
    """As in the file, channels in its order, scaled to 0..1 (0.5 is zero); 0 outside the image."""
    camera: Cameras
    """A batch of one, with a light at the camera."""
    path: str
    """The image file, for messages and names."""

    def resized(self, height: int, width: int) -> "SupportView":
        """Return the view on another pixel grid: averaged over areas, or interpolated where it grows."""
        maps: dict[str, Any] = {name: _resize(value, height, width) for name, value in self._tensors().items()}
        return replace(self, camera=self.camera.resized(height, width), **maps)

    def to(self, device: str | torch.device) -> "SupportView":
        """Return the view with every tensor on ``device``."""
        maps: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, camera=self.camera.to(device), **maps)

    def rgba(self) -> Float[Tensor, "H W 4"]:
        """Return straight (not premultiplied) colour and alpha; where alpha is 0 the colour is white."""
        color = (self.rgb - (1 - self.mask)) / self.mask.clamp(min=1e-6)
        color = torch.where(self.mask > 0, color.clamp(0, 1), 1.0)
        return torch.cat([color, self.mask], dim=-1)

    def _tensors(self) -> dict[str, Tensor]:
        maps = {"rgb": self.rgb, "mask": self.mask, "depth": self.depth, "normal": self.normal}
        return {name: value for name, value in maps.items() if value is not None}


def load_support_view(config: SingleImageConfig, size: int = 512) -> SupportView:
    """Read, cut out and frame the image of a config.

    Args:
        config: ``data`` of the experiment; paths are taken as they are (``mask_path`` also from the repository's root).
        size: pixels of the square frame.

    Raises:
        InputError: the image (or its mask, depth or normal map) cannot be used; the message names the file, the
            problem and what to do.
    """
    path = config.image_path
    if not path:
        raise InputError("data.image_path: no image given; add data.image_path=PHOTO.png")
    rgba = _masked(read_rgba(path), config)
    height, width = rgba.shape[:2]
    window = silhouette_window(rgba[..., 3:], config.fill) if config.recenter else whole_window(height, width)
    alpha = rgba[..., 3:]
    # Premultiplied, so that colours under transparent pixels leave no fringe.
    framed = resample(np.concatenate([rgba[..., :3] * alpha, alpha], axis=-1), window, size, size).clip(0, 1)
    mask = framed[..., 3:]
    depth = normal = None
    if config.requires_depth:
        depth = _framed_map(path, "depth", read_gray, (height, width), window, size)
    if config.requires_normal:
        normal = _framed_map(path, "normal", _read_rgb, (height, width), window, size)
    return SupportView(
        rgb=torch.from_numpy((framed[..., :3] + (1 - mask)).clip(0, 1)),
        mask=torch.from_numpy(np.ascontiguousarray(mask)),
        depth=depth,
        normal=normal,
        camera=_reference_camera(config, size),
        path=str(path),
    )


def save_support_view(view: SupportView, path: str | os.PathLike[str]) -> None:
    """Write the preprocessed image as an RGBA PNG, atomically.

    Raises:
        InputError: ``path`` cannot be written.
    """
    pixels = (view.rgba() * 255).round().to(torch.uint8).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def companion_path(path: str, kind: str) -> str:
    """Return where the depth or normal map of an image lies: ``x_rgba.png`` or ``x.jpg`` -> ``x_<kind>.png``."""
    file = Path(path)
    return str(file.with_name(f"{file.stem.removesuffix('_rgba')}_{kind}.png"))


def _masked(rgba: Float[np.ndarray, "H W 4"], config: SingleImageConfig) -> Float[np.ndarray, "H W 4"]:
    if not config.mask_path:
        return cut_out(rgba, config.segmentation, config.image_path, config.rembg_model)
    mask_path = str(find_path(config.mask_path))
    alpha = read_gray(mask_path)
    _check_same_frame(mask_path, alpha.shape[:2], config.image_path, rgba.shape[:2])
    alpha = resample(alpha, Window(0, 0, 1, 1), *rgba.shape[:2]).clip(0, 1)
    check_coverage(alpha, mask_path)
    return decontaminate(rgba[..., :3], alpha)


def _framed_map(
    path: str, kind: str, read: Callable[[str], np.ndarray], shape: tuple[int, ...], window: Window, size: int
) -> Float[Tensor, "size size C"]:
    """Read a depth or normal map that lies beside the image and frame it alike."""
    map_path = companion_path(path, kind)
    if not Path(map_path).exists():
        raise InputError(
            f"{map_path}: no such file; data.requires_{kind} asks for the {kind} map of {path}: put it there,"
            f" or set the losses that use it (system.loss.lambda_{kind}…) to 0"
        )
    values = read(map_path)
    _check_same_frame(map_path, values.shape[:2], path, shape)
    return torch.from_numpy(resample(values, window, size, size).clip(0, 1))


def _read_rgb(path: str) -> Float[np.ndarray, "H W 3"]:
    return read_rgba(path)[..., :3]


def _check_same_frame(path: str, shape: tuple[int, ...], image_path: str, image_shape: tuple[int, ...]) -> None:
    aspect, image_aspect = shape[1] / shape[0], image_shape[1] / image_shape[0]
    if abs(aspect / image_aspect - 1) > _MAX_ASPECT_MISMATCH:
        raise InputError(
            f"{path}: is {shape[1]}x{shape[0]}, which does not fit the {image_shape[1]}x{image_shape[0]} pixels of"
            f" {image_path}; give one of the same proportions"
        )


def _reference_camera(config: SingleImageConfig, size: int) -> Cameras:
    camera = orbit_cameras(
        config.default_elevation_deg,
        config.default_azimuth_deg,
        config.default_camera_distance,
        config.default_fovy_deg,
        size,
        size,
    )
    return replace(camera, light_positions=camera.positions)


def _resize(value: Float[Tensor, "H W C"], height: int, width: int) -> Float[Tensor, "height width C"]:
    batch = value.permute(2, 0, 1)[None]
    whole = value.shape[0] % height == 0 and value.shape[1] % width == 0
    if whole:
        resized = functional.interpolate(batch, (height, width), mode="area")
    else:
        resized = functional.interpolate(batch, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous()
