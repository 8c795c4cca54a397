"""The adapter's own camera conventions: poses, focal lengths and poses relative to the support view.

World: right-handed, z up, cameras look at the origin. An OpenGL camera frame has x right, y up and looks along -z;
an OpenCV frame has x right, y down and looks along +z. Rays are made by ``rays.py`` from directions
``K^-1 (u, v, 1)``, so an OpenCV pose gives every pixel its own ray. The released NVS-Adapter differs from that in
two ways, and both are kept here, named, because its weights have learned them:

* focal length ``size / (2 tan(fov))`` with the full field of view, where a pinhole has ``tan(fov / 2)``;
* the rotation part of the pose is the OpenGL rotation times -1, which mirrors x (its sampling script flips the
  sign once more, so that relative translations change sign as well; docs/pose-convention.md derives what follows).
"""

import math
from dataclasses import dataclass, replace
from typing import Dict, Literal, Tuple, Union

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.errors import InputError

Focal = Literal["released", "pinhole"]
Axes = Literal["released", "released-sampling", "opencv"]
POSE_CONVENTIONS: Tuple[str, ...] = ("training", "released-sampling")

# Factors on the columns (right, up, backward) of an OpenGL rotation.
_AXES_SIGNS: Dict[str, Tuple[float, float, float]] = {
    "released": (-1.0, -1.0, -1.0),
    "released-sampling": (1.0, 1.0, 1.0),
    "opencv": (1.0, -1.0, -1.0),
}
_FOCAL_ANGLE_FACTOR: Dict[str, float] = {"released": 1.0, "pinhole": 0.5}
_RELEASED_EPS = 1e-6


@dataclass(frozen=True)
class CameraConvention:
    """How poses and fields of view become the rays a set of weights was trained with.

    Raises:
        InputError: a field is none of its known values.
    """

    focal: Focal = "pinhole"
    """"released": focal = size / (2 tan(fov)); "pinhole": focal = size / (2 tan(fov / 2))."""
    axes: Axes = "opencv"
    """"released": -R_gl; "released-sampling": +R_gl; "opencv": x right, y down, z forward."""

    def __post_init__(self) -> None:
        if self.focal not in _FOCAL_ANGLE_FACTOR:
            raise InputError(f"camera focal '{self.focal}' is unknown; use one of {sorted(_FOCAL_ANGLE_FACTOR)}")
        if self.axes not in _AXES_SIGNS:
            raise InputError(f"camera axes '{self.axes}' are unknown; use one of {sorted(_AXES_SIGNS)}")

    @property
    def signs(self) -> Tuple[float, float, float]:
        """Factors on the columns (right, up, backward) of an OpenGL rotation."""
        return _AXES_SIGNS[self.axes]


RELEASED = CameraConvention("released", "released")
RELEASED_SAMPLING = CameraConvention("released", "released-sampling")
PINHOLE = CameraConvention("pinhole", "opencv")

CONVENTIONS: Dict[str, CameraConvention] = {
    "released": RELEASED,
    "released-sampling": RELEASED_SAMPLING,
    "pinhole": PINHOLE,
}


def camera_convention(name: str) -> CameraConvention:
    """The convention called `name` in configuration files ("released", "released-sampling", "pinhole").

    Raises:
        InputError: there is no such convention.
    """
    if name not in CONVENTIONS:
        raise InputError(f"camera convention '{name}' is unknown; use one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[name]


def with_pose_convention(trained: CameraConvention, pose_convention: str) -> CameraConvention:
    """The convention to make rays with, for weights that were trained with ``trained``.

    Args:
        pose_convention: ``training`` keeps what the weights have learned. ``released-sampling`` reproduces the sign of
            the released sampling script, whose relative translations are those of training times -1
            (docs/pose-convention.md).

    Raises:
        InputError: the name is unknown, or the weights are not of the released kind.
    """
    if pose_convention not in POSE_CONVENTIONS:
        known = ", ".join(POSE_CONVENTIONS)
        raise InputError(f"pose_convention '{pose_convention}' is unknown; use one of {known}")
    if pose_convention == "training":
        return trained
    if trained.axes == "opencv":
        raise InputError(
            "pose_convention: released-sampling is a property of the released weights' sampling script; the embedded "
            "model knows training alone"
        )
    return replace(trained, axes="released-sampling")


def look_at(
    azimuth_deg: Union[float, Float[Tensor, "*batch"]],
    elevation_deg: Union[float, Float[Tensor, "*batch"]],
    distance: Union[float, Float[Tensor, "*batch"]],
    convention: CameraConvention = PINHOLE,
) -> Float[Tensor, "*batch 4 4"]:
    """Camera-to-world matrices of cameras on a sphere that look at the origin, z up.

    Args:
        azimuth_deg: degrees, counter-clockwise seen from above, 0 on the +x axis.
        elevation_deg: degrees above the xy plane.
        distance: from the origin, in world units.
        convention: its `axes` decide the rotation. The released axes also keep the released normalisation, which
            divides by (norm + 1e-6), so that those rotations are orthonormal only to about 2e-6 and degenerate at
            the poles; the opencv axes are exact everywhere.

    Returns:
        float32 matrices. Inputs broadcast; they are evaluated in float64.
    """
    inputs = (torch.as_tensor(value).to(torch.float64) for value in (azimuth_deg, elevation_deg, distance))
    azimuth, elevation, radius = torch.broadcast_tensors(*inputs)
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    zeros = torch.zeros_like(azimuth)
    outward = torch.stack((elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()), dim=-1)
    position = radius[..., None] * outward
    if convention.axes == "opencv":
        forward = -outward
        right = torch.stack((-azimuth.sin(), azimuth.cos(), zeros), dim=-1)
        up = torch.linalg.cross(right, forward)
    else:
        forward = _released_normalise(-position)
        down = torch.stack((zeros, zeros, zeros - 1.0), dim=-1)
        right = _released_normalise(torch.linalg.cross(down, forward))
        up = _released_normalise(torch.linalg.cross(right, forward))
    opengl = torch.stack((right, up, -forward, position), dim=-1)
    return from_opengl(_with_bottom_row(opengl), convention).to(torch.float32)


def from_opengl(
    c2w: Float[Tensor, "*batch 4 4"], convention: CameraConvention = PINHOLE
) -> Float[Tensor, "*batch 4 4"]:
    """Re-express OpenGL camera-to-world matrices in the convention's camera frame; positions stay."""
    # Column by column: a tensor of the signs would be a copy from host to device, which waits for the device.
    columns = zip(c2w.unbind(dim=-1), (*convention.signs, 1.0), strict=True)
    return torch.stack([column * sign for column, sign in columns], dim=-1)


def relative_to_support(
    c2w: Float[Tensor, "*batch views 4 4"], support_c2w: Union[Float[Tensor, "*batch 4 4"], None] = None
) -> Float[Tensor, "*batch views 4 4"]:
    """Poses in the frame of the support camera, which is view 0 unless `support_c2w` names another.

    Evaluated in float64 (the ray embedding's highest frequency is 2^14) and returned in the dtype of `c2w`.
    """
    exact = c2w.to(torch.float64)
    support = exact[..., 0, :, :] if support_c2w is None else support_c2w.to(torch.float64)
    return (_inverse(support)[..., None, :, :] @ exact).to(c2w.dtype)


def focal_length(fov_deg: float, size: int, convention: CameraConvention = PINHOLE) -> float:
    """Focal length in pixels of an image side of `size` pixels that spans `fov_deg` degrees."""
    angle = math.radians(fov_deg) * _FOCAL_ANGLE_FACTOR[convention.focal]
    return size / (2.0 * math.tan(angle))


def intrinsic_matrix(
    fov_deg: float, height: int, width: int, convention: CameraConvention = PINHOLE
) -> Float[Tensor, "4 4"]:
    """4x4 intrinsics in pixels with the principal point in the middle; the field of view spans both sides."""
    matrix = torch.eye(4)
    matrix[0, 0] = focal_length(fov_deg, width, convention)
    matrix[1, 1] = focal_length(fov_deg, height, convention)
    matrix[0, 2] = width / 2.0
    matrix[1, 2] = height / 2.0
    return matrix


def _inverse(c2w: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of an affine map by Cramer's rule, for rotations that are not quite orthonormal.

    ``torch.linalg.inv`` waits for the device to say whether a matrix is singular.
    """
    x, y, z, position = c2w[..., :3, :].unbind(dim=-1)
    cofactors = torch.stack((torch.linalg.cross(y, z), torch.linalg.cross(z, x), torch.linalg.cross(x, y)), dim=-2)
    linear = cofactors / (x * cofactors[..., 0, :]).sum(dim=-1)[..., None, None]
    return _with_bottom_row(torch.cat((linear, -linear @ position[..., None]), dim=-1))


def _with_bottom_row(matrix: Float[Tensor, "*batch 3 4"]) -> Float[Tensor, "*batch 4 4"]:
    bottom = torch.zeros_like(matrix[..., :1, :])
    bottom[..., 3].fill_(1.0)
    return torch.cat((matrix, bottom), dim=-2)


def _released_normalise(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + _RELEASED_EPS)
