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

CHANNELS = 64
"""Of a tile; 128 bytes in half precision, which is what memory is read by."""


def group_norm_silu(
    x: Float[Tensor, "N C h w"], norm: nn.GroupNorm, offset: Float[Tensor, "#N C"] | None = None, silu: bool = True
) -> Float[Tensor, "N C h w"]:
    """``silu(norm(x + offset))``, or without SiLU; weights of the norm get no gradient from the fused kernels.

    The kernels run where ``x`` is a channels-last tensor on a GPU with Triton, `plain_group_norm_silu` elsewhere.
    """
    frozen = not any(parameter.requires_grad for parameter in norm.parameters())
    if frozen and has_triton(x.device) and x.is_contiguous(memory_format=torch.channels_last):
        return fused_group_norm_silu(x, norm, offset, silu)
    return plain_group_norm_silu(x, norm, offset, silu)


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
    shifts = _no_offset(x.shape[1], x.dtype, x.device) if offset is None else offset.detach().contiguous()
    return _FusedGroupNorm.apply(x, shifts, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


@functools.cache  # none is ever given up, since captured graphs read them
def _no_offset(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a backward pass
        return torch.zeros(1, channels, dtype=dtype, device=device)


def _apart(offset: Float[Tensor, "#N C"]) -> int:
    """Elements between the offsets of two samples."""
    return 0 if len(offset) == 1 else offset.shape[1]


class _FusedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        from nvsadapter_guidance import group_norm_kernels as kernels

        launch = _Launch(x, groups)
        moments, stats, out = launch.partial(), launch.stats(), torch.empty_like(x)
        pixels, channels, apart = launch.pixels, launch.channels, _apart(offset)
        with current(x.device):
            kernels.moments_kernel[launch.tiles_grid](x, offset, apart, moments, pixels, channels, **launch.tile)
            kernels.union_kernel[launch.groups_grid](
                moments, stats, pixels, channels, launch.tiles, launch.size, eps, **launch.group
            )
            kernels.apply_kernel[launch.tiles_grid](
                x, offset, apart, stats, weight, bias, out, pixels, channels, SILU=silu, **launch.tile
            )
        ctx.save_for_backward(x, offset, stats, weight, bias)
        ctx.launch, ctx.silu = launch, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from nvsadapter_guidance import group_norm_kernels as kernels

        x, offset, stats, weight, bias = ctx.saved_tensors
        launch: _Launch = ctx.launch
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums, means, out = launch.partial(), launch.stats(), torch.empty_like(x)
        pixels, channels = launch.pixels, launch.channels
        inputs = x, offset, _apart(offset), stats, weight, bias, gradient
        kernels.sums_kernel[launch.tiles_grid](*inputs, sums, pixels, channels, SILU=ctx.silu, **launch.tile)
        kernels.means_kernel[launch.groups_grid](
            sums, means, pixels, channels, launch.tiles, launch.size, **launch.group
        )
        kernels.gradient_kernel[launch.tiles_grid](*inputs, means, out, pixels, channels, SILU=ctx.silu, **launch.tile)
        return out, None, None, None, None, None, None


class _Launch:
    """Tiles and groups of one tensor."""

    def __init__(self, x: Tensor, groups: int) -> None:
        samples, self.channels, height, width = x.shape
        self.samples, self.pixels, self.device = samples, height * width, x.device
        rows = 64 if self.pixels <= 4096 else 128
        block = min(CHANNELS, _power_of_two(self.channels))
        self.tile = {"ROWS": rows, "BLOCK": block, "num_warps": rows // 16}
        self.tiles = -(-self.pixels // rows)
        self.size = self.channels // groups
        # Two paddings do for all sizes of groups, so that few kernels are compiled.
        padded = 16 if self.size <= 16 else max(128, _power_of_two(self.size))
        together = max(1, 2048 // padded)
        chunks = _power_of_two(-(-self.tiles // together))
        self.group = {"ROWS": rows, "PADDED": padded, "TILES": together, "CHUNKS": chunks}
        self.tiles_grid = (samples, self.tiles, -(-self.channels // block))
        self.groups_grid = (samples, groups)

    def partial(self) -> Tensor:
        """Two numbers a channel and tile."""
        return torch.empty(self.samples, self.tiles, 2, self.channels, device=self.device, dtype=torch.float32)

    def stats(self) -> Tensor:
        """Two numbers a channel and sample."""
        return torch.empty(self.samples, 2, self.channels, device=self.device, dtype=torch.float32)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
