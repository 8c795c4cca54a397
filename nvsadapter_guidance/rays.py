"""Rays of the latent grid and their embedding, the adapter's only knowledge of where a view looks from.

Frequencies are 2^k without a factor of pi, k from 0; the highest of the released model is 2^14, where a change of
1e-7 in a coordinate moves the sine by 2e-3. Everything here is therefore float32 with autocast switched off.
"""

import math
from dataclasses import dataclass
from typing import Literal, Optional, Tuple

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.cameras import PINHOLE, CameraConvention, focal_length, relative_to_support
from nvsadapter_guidance.errors import InputError

RayKind = Literal["plucker", "rayo_rayd", "extrinsic"]
RAY_KINDS: Tuple[str, ...] = ("plucker", "rayo_rayd", "extrinsic")


def latent_rays(
    c2w: Float[Tensor, "*batch 4 4"],
    fov_deg: float,
    image_size: Tuple[int, int],
    stride: int = 8,
    convention: CameraConvention = PINHOLE,
) -> Tuple[Float[Tensor, "*batch h w 3"], Float[Tensor, "*batch h w 3"]]:
    """Rays through the centres of the latent pixels, one per `stride` x `stride` block of image pixels.

    Args:
        c2w: poses already in the convention's camera frame (`look_at`, `from_opengl`).
        fov_deg: field of view in degrees.
        image_size: (height, width) of the image in pixels.
        stride: image pixels per latent pixel.
        convention: its `focal` decides the focal length.

    Returns:
        Origins, and directions that are not normalised (their camera-frame z is 1), both in the dtype of `c2w`.
    """
    height, width = image_size
    rows, columns = height // stride, width // stride
    focal_x = focal_length(fov_deg, width, convention) / stride
    focal_y = focal_length(fov_deg, height, convention) / stride
    u = (torch.arange(columns, device=c2w.device, dtype=c2w.dtype) + 0.5 - width / (2.0 * stride)) / focal_x
    v = (torch.arange(rows, device=c2w.device, dtype=c2w.dtype) + 0.5 - height / (2.0 * stride)) / focal_y
    v_grid, u_grid = torch.meshgrid(v, u, indexing="ij")
    camera_directions = torch.stack((u_grid, v_grid, torch.ones_like(u_grid)), dim=-1)
    with torch.autocast(c2w.device.type, enabled=False):
        rays_d = torch.einsum("hwj,...ij->...hwi", camera_directions, c2w[..., :3, :3])
    rays_o = c2w[..., None, None, :3, 3].expand_as(rays_d)
    return rays_o, rays_d


def plucker_coordinates(
    rays_o: Float[Tensor, "*batch 3"], rays_d: Float[Tensor, "*batch 3"]
) -> Tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
    """Moment o x d' and unit direction d' of rays (Sitzmann et al. 2021, Light Field Networks, eq. 2)."""
    direction = rays_d / rays_d.norm(dim=-1, keepdim=True)
    return torch.linalg.cross(rays_o, direction), direction


def frequency_encoding(x: Float[Tensor, "*batch n"], degrees: int) -> Float[Tensor, "*batch c"]:
    """[x, sin(2^k x), sin(2^k x + pi/2)] for k < degrees, all k of a coordinate side by side.

    Mildenhall et al. 2020, eq. 4, without the factor pi. Channels: n (1 + 2 degrees).
    """
    scales = 2.0 ** torch.arange(degrees, device=x.device, dtype=x.dtype)
    phases = (x[..., None] * scales).flatten(-2)
    return torch.cat((x, torch.sin(phases), torch.sin(phases + 0.5 * math.pi)), dim=-1)


@dataclass(frozen=True)
class RayEmbedding:
    """Encoder of view poses into channels of the latent grid.

    Kinds: "plucker" (moment with `degrees[0]`, unit direction with `degrees[1]` frequencies), "rayo_rayd" (origin
    and raw direction with the same), "extrinsic" (the 16 entries of the relative pose with `degrees[0]`
    frequencies, constant over the grid).
    """

    kind: RayKind = "plucker"
    degrees: Tuple[int, int] = (15, 8)

    def __post_init__(self) -> None:
        if self.kind not in RAY_KINDS:
            raise InputError(f"ray embedding '{self.kind}' is unknown; use one of {list(RAY_KINDS)}")
        if len(self.degrees) != 2 or min(self.degrees) < 0:
            raise InputError(f"ray embedding degrees must be two numbers >= 0, got {self.degrees}")

    @property
    def channels(self) -> int:
        """Number of embedding channels: 144 for rays and 496 for extrinsics at the released degrees."""
        if self.kind == "extrinsic":
            return 16 * (1 + 2 * self.degrees[0])
        return 3 * (2 + 2 * self.degrees[0] + 2 * self.degrees[1])

    def encode_rays(
        self, rays_o: Float[Tensor, "*batch h w 3"], rays_d: Float[Tensor, "*batch h w 3"]
    ) -> Float[Tensor, "*batch c h w"]:
        """Embedding of rays already relative to the support view, float32."""
        with torch.autocast(rays_o.device.type, enabled=False):
            rays_o, rays_d = rays_o.float(), rays_d.float()
            first, second = plucker_coordinates(rays_o, rays_d) if self.kind == "plucker" else (rays_o, rays_d)
            encoded = torch.cat(
                (frequency_encoding(first, self.degrees[0]), frequency_encoding(second, self.degrees[1])), dim=-1
            )
        return encoded.movedim(-1, -3).contiguous()

    def encode_poses(self, c2w: Float[Tensor, "*batch 4 4"], height: int, width: int) -> Float[Tensor, "*batch c h w"]:
        """Extrinsic embedding of poses already relative to the support view, the same at every grid point."""
        with torch.autocast(c2w.device.type, enabled=False):
            encoded = frequency_encoding(c2w.float().flatten(-2), self.degrees[0])
        return encoded[..., None, None].expand(*encoded.shape, height, width).contiguous()

    def __call__(
        self,
        c2w: Float[Tensor, "*batch views 4 4"],
        fov_deg: float,
        image_size: Tuple[int, int],
        stride: int = 8,
        convention: CameraConvention = PINHOLE,
        support_c2w: Optional[Float[Tensor, "*batch 4 4"]] = None,
    ) -> Float[Tensor, "*batch views c h w"]:
        """Embedding of views from their absolute poses (in the convention's camera frame).

        Poses are first made relative to the support view, which is view 0 unless `support_c2w` is given; arguments
        are those of `latent_rays`. The result is float32 whatever autocast says.
        """
        relative = relative_to_support(c2w, support_c2w)
        if self.kind == "extrinsic":
            return self.encode_poses(relative, image_size[0] // stride, image_size[1] // stride)
        return self.encode_rays(*latent_rays(relative, fov_deg, image_size, stride, convention))
