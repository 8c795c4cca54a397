"""Group normalisation (Wu & He 2018) with SiLU as one operation on channels-last tensors.

torch's own turns channels-last tensors into contiguous ones on a GPU, and every convolution after it turns them back.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvsadapter_guidance.triton_support import current, has_triton

TILES = {"moments": (128, 64, 2), "values": (64, 64, 4), "sums": (64, 64, 2), "gradient": (16, 128, 4)}
"""Rows, channels and warps of one program at most; each was the fastest, or near it, at most of the sizes that the UNet
and the autoencoder of Stable Diffusion have. Sums over rows want few warps."""
WIDE_VALUES = (64, 128, 8)
"""In place of `TILES`' for large images."""
LARGE = 4096
"""Pixels from which an image is large."""


def group_norm_silu(
    x: Float[Tensor, "N C h w"], norm: nn.GroupNorm, offset: Float[Tensor, "#N C"] | None = None, silu: bool = True
) -> Float[Tensor, "N C h w"]:
    """``silu(norm(x + offset))``, or without SiLU; weights of the norm get no gradient from the fused kernels.

    The kernels run where ``x`` is a channels-last tensor on a GPU with Triton, `plain_group_norm_silu` elsewhere.
    """
    if _has_kernels(x, norm):
        return fused_group_norm_silu(x, norm, offset, silu)
    return plain_group_norm_silu(x, norm, offset, silu)


def branch_group_norm_silu(
    x: Float[Tensor, "N C h w"], norm: nn.GroupNorm, offset: Float[Tensor, "#N C"] | None = None, silu: bool = True
) -> tuple[Float[Tensor, "N C h w"], Float[Tensor, "N C h w"]]:
    """Return what `group_norm_silu` returns, and ``x``, where a branch begins that is added to ``x`` later.

    Gradients of both meet in the kernel of the norm's own, which saves a pass.
    """
    if _has_kernels(x, norm):
        return _fused(x, norm, offset, silu)
    return plain_group_norm_silu(x, norm, offset, silu), x


def _has_kernels(x: Tensor, norm: nn.GroupNorm) -> bool:
    frozen = not any(parameter.requires_grad for parameter in norm.parameters())
    return frozen and has_triton(x.device) and x.is_contiguous(memory_format=torch.channels_last)


def plain_group_norm_silu(
    x: Float[Tensor, "N C h w"], norm: nn.GroupNorm, offset: Float[Tensor, "#N C"] | None = None, silu: bool = True
) -> Float[Tensor, "N C h w"]:
    """The same by torch's operations."""
    result = norm(x if offset is None else x + offset[:, :, None, None])
    return F.silu(result) if silu else result


def fused_group_norm_silu(
    x: Float[Tensor, "N C h w"], norm: nn.GroupNorm, offset: Float[Tensor, "#N C"] | None = None, silu: bool = True
) -> Float[Tensor, "N C h w"]:
    """The same by the kernels of `group_norm_kernels`; the offset gets no gradient."""
    return _fused(x, norm, offset, silu)[0]


def _fused(x: Tensor, norm: nn.GroupNorm, offset: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    shifts = _no_offset(x.shape[1], x.dtype, x.device) if offset is None else offset.detach()
    shifts = shifts if shifts.stride(1) == 1 else shifts.contiguous()
    return _FusedGroupNorm.apply(x, shifts, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


@functools.cache  # none is ever given up, since captured graphs read them
def _no_offset(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a backward pass
        return torch.zeros(1, channels, dtype=dtype, device=device)


def _apart(offset: Float[Tensor, "#N C"]) -> int:
    """Elements between the offsets of two samples."""
    return 0 if len(offset) == 1 else offset.stride(0)


class _FusedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        from nvsadapter_guidance import group_norm_kernels as kernels

        size = _Size(x, groups)
        parts, whole = size.launch("moments"), size.launch("values")
        moments, stats, out = parts.partial(), size.stats(), torch.empty_like(x)
        pixels, channels, apart = size.pixels, size.channels, _apart(offset)
        with current(x.device):
            kernels.moments_kernel[parts.grid](x, offset, apart, moments, pixels, channels, **parts.tile)
            kernels.union_kernel[size.groups_grid](
                moments, stats, pixels, channels, parts.tiles, size.members, eps, **parts.group
            )
            kernels.apply_kernel[whole.grid](
                x, offset, apart, stats, weight, bias, out, pixels, channels, SILU=silu, **whole.tile
            )
        ctx.save_for_backward(x, offset, stats, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.size, ctx.silu = size, silu
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, beside: Tensor | None) -> tuple[Tensor | None, ...]:
        from nvsadapter_guidance import group_norm_kernels as kernels

        if gradient is None:
            return beside, None, None, None, None, None, None
        x, offset, stats, weight, bias = ctx.saved_tensors
        size: _Size = ctx.size
        parts, whole = size.launch("sums"), size.launch("gradient")
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        other = gradient if beside is None else beside.contiguous(memory_format=torch.channels_last)
        sums, means, out = parts.partial(), size.stats(), torch.empty_like(x)
        pixels, channels = size.pixels, size.channels
        inputs = x, offset, _apart(offset), stats, weight, bias, gradient
        kernels.sums_kernel[parts.grid](*inputs, sums, pixels, channels, SILU=ctx.silu, **parts.tile)
        kernels.means_kernel[size.groups_grid](sums, means, pixels, channels, parts.tiles, size.members, **parts.group)
        kernels.gradient_kernel[whole.grid](
            *inputs, other, means, out, pixels, channels, SILU=ctx.silu, ADD=beside is not None, **whole.tile
        )
        return out, None, None, None, None, None, None


class _Size:
    """Samples, pixels, channels, and members of a group, of one tensor."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.samples, self.channels, height, width = x.shape
        self.pixels, self.device = height * width, x.device
        self.members = self.channels // groups
        self.groups_grid = (self.samples, groups)

    def launch(self, kind: str) -> "_Launch":
        """Tiles for a kernel of `TILES`."""
        return _Launch(self, *(WIDE_VALUES if kind == "values" and self.pixels >= LARGE else TILES[kind]))

    def stats(self) -> Tensor:
        """Two numbers a channel and sample."""
        return torch.empty(self.samples, 2, self.channels, device=self.device, dtype=torch.float32)


class _Launch:
    """Tiles of at most so many rows and channels, and what unites them by groups."""

    def __init__(self, size: _Size, rows: int, channels: int, warps: int) -> None:
        self.size = size
        rows = min(rows, max(16, _power_of_two(size.pixels)))
        block = min(channels, _power_of_two(size.channels))
        self.tile = {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        self.tiles = -(-size.pixels // rows)
        self.grid = (size.samples, self.tiles, -(-size.channels // block))
        # Two paddings do for all sizes of groups, so that few kernels are compiled.
        padded = 16 if size.members <= 16 else max(128, _power_of_two(size.members))
        together = max(1, 2048 // padded)
        chunks = _power_of_two(-(-self.tiles // together))
        self.group = {"ROWS": rows, "PADDED": padded, "TILES": together, "CHUNKS": chunks}

    def partial(self) -> Tensor:
        """Two numbers a channel and tile."""
        size = self.size
        return torch.empty(size.samples, self.tiles, 2, size.channels, device=size.device, dtype=torch.float32)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
