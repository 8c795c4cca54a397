"""Layers of diffusers' UNets and autoencoders with frozen weights: the same modules, fewer passes over memory.

Biases of convolutions are added where their output is read anyway, norm and activation are one operation, and a
convolution keeps nothing for its backward pass, since only the gradient on its input is wanted. What a layer still owes
its output is handed on with it as ``owed``, a bias for every channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvsadapter_guidance.group_norm import branch_group_norm_silu, group_norm_silu
from nvsadapter_guidance.triton_support import current, has_triton

TILE = 64
"""Rows and channels that one program adds."""


def is_lean(block: nn.Module) -> bool:
    """Whether `residual_block` computes what a block computes: the plain one of Stable Diffusion, not in training."""
    if not isinstance(block, ResnetBlock2D):
        return False
    convolutions = [layer for layer in (block.conv1, block.conv2, block.conv_shortcut) if layer is not None]
    return (
        all(type(layer) is nn.Conv2d for layer in convolutions)  # not one with a LoRA, say
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1.0
        and isinstance(block.nonlinearity, nn.SiLU)
        and not (block.training and block.dropout.p > 0.0)
    )


def residual_block(
    block: Any,
    x: Float[Tensor, "N C h w"],
    offset: Float[Tensor, "#N out"] | None = None,
    owed: Float[Tensor, " C"] | None = None,
    border: bool = False,
) -> Float[Tensor, "N out h2 w2"]:
    """A `ResnetBlock2D`.

    Args:
        offset: what is added between its convolutions, of `offset_of`; None for a block without time embedding.
        owed: added to ``x`` first.
        border: add a row and a column of zeros at the far ends of the result.
    """
    normed, x = branch_group_norm_silu(x, block.norm1, None if owed is None else owed[None])
    hidden = convolve(normed, block.conv1)
    hidden = group_norm_silu(hidden, block.norm2, offset_of(block, None) if offset is None else offset)
    hidden = convolve(hidden, block.conv2)
    bias, shortcut = block.conv2.bias, block.conv_shortcut
    if shortcut is None:
        return add(x, hidden, bias if owed is None else bias + owed, border)
    bias = bias if shortcut.bias is None else bias + shortcut.bias
    if owed is not None:
        bias = bias + shortcut.weight.flatten(1) @ owed
    return add(convolve(x, shortcut), hidden, bias, border)


def offset_of(block: Any, time: Float[Tensor, "N D"] | None) -> Float[Tensor, "#N out"]:
    """What a `ResnetBlock2D` adds between its convolutions, given the time embedding after its activation."""
    bias = block.conv1.bias[None]
    return bias if time is None else bias + block.time_emb_proj(time)


def convolve(x: Float[Tensor, "N C h w"], layer: nn.Conv2d, with_bias: bool = False) -> Float[Tensor, "N out h2 w2"]:
    """A convolution without its bias, unless it is asked for; weights get no gradient where they are frozen."""
    bias = layer.bias if with_bias else None
    if layer.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
        return F.conv2d(x, layer.weight, bias, layer.stride, layer.padding)
    return _Convolution.apply(x, layer.weight, bias, layer.stride, layer.padding)


def convolve_owing(
    x: Float[Tensor, "N C h w"], layer: nn.Module
) -> tuple[Float[Tensor, "N out h2 w2"], Float[Tensor, " out"] | None]:
    """A convolution and the bias that it owes, which is None for layers of other kinds."""
    return (convolve(x, layer), layer.bias) if type(layer) is nn.Conv2d else (layer(x), None)


def convolve_few_channels(x: Float[Tensor, "N C h w"], layer: nn.Conv2d) -> Float[Tensor, "N out h2 w2"]:
    """`convolve`; in half precision channels are filled up to eight, as tensor cores take them."""
    if x.dtype.itemsize != 2 or layer.weight.requires_grad:
        return convolve(x, layer)
    more = (0, 0, 0, 0, 0, -x.shape[1] % 8)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x, weight = (F.pad(tensor, more).contiguous(memory_format=layout) for tensor in (x, layer.weight))
    return _Convolution.apply(x, weight, None, layer.stride, layer.padding)


def add(
    first: Float[Tensor, "N C h w"], second: Float[Tensor, "N C h w"], bias: Float[Tensor, " C"], border: bool = False
) -> Float[Tensor, "N C h2 w2"]:
    """``first + second`` plus a bias; with a row and a column of zeros at the far ends where ``border`` is wanted."""
    layout = torch.channels_last
    alike = first.is_contiguous(memory_format=layout) and second.is_contiguous(memory_format=layout)
    if alike and not bias.requires_grad and has_triton(first.device):
        return _Sum.apply(first, second, bias, border)
    total = first + second + bias[:, None, None]
    return F.pad(total, (0, 1, 0, 1)) if border else total


def enlarge(x: Float[Tensor, "N C h w"], size: tuple[int, int]) -> Float[Tensor, "N C h2 w2"]:
    """The nearest pixels of ``x`` at another size, without a gradient where a kernel does it."""
    doubled = size == (2 * x.shape[2], 2 * x.shape[3])
    if not doubled or not has_triton(x.device) or not x.is_contiguous(memory_format=torch.channels_last):
        return F.interpolate(x, size=size, mode="nearest")
    from nvsadapter_guidance.upsample_kernel import double_kernel

    samples, channels, height, width = x.shape
    out = _empty(x, *size)
    pixels = samples * height * width
    with current(x.device):
        double_kernel[_tiles(pixels, channels)](x, out, pixels, width, channels, ROWS=TILE, BLOCK=TILE)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[-2:], stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Rows and columns at the far end that the stride leaves out. (`aten.convolution_backward` gives the same, but
        # has cuDNN's input laid out in memory first, even where nothing of it is read.)
        left_over = [
            size + 2 * pad - kernel - (out - 1) * step
            for size, pad, kernel, out, step in zip(
                ctx.size, ctx.padding, weight.shape[-2:], gradient.shape[-2:], ctx.stride, strict=True
            )
        ]
        found = F.conv_transpose2d(gradient, weight, None, ctx.stride, ctx.padding, left_over)
        return found, None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, bias: Tensor, border: bool) -> Tensor:
        from nvsadapter_guidance.residual_kernel import sum_kernel

        samples, channels, height, width = first.shape
        out = _empty(first, height + border, width + border)
        ctx.size = (height, width) if border else None
        if border:
            out[:, :, -1] = 0.0
            out[:, :, :, -1] = 0.0
        rows = samples * height * width
        with current(first.device):
            sum_kernel[_tiles(rows, channels)](
                first, second, bias, out, rows, width, height, channels, BORDER=border, ROWS=TILE, BLOCK=TILE
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if ctx.size is not None:
            gradient = _crop(gradient.contiguous(memory_format=torch.channels_last), *ctx.size)
        return gradient, gradient, None, None


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """``x`` without its border."""
    from nvsadapter_guidance.residual_kernel import crop_kernel

    out = _empty(x, height, width)
    samples, channels = x.shape[:2]
    rows = samples * height * width
    crop_kernel[_tiles(rows, channels)](x, out, rows, width, height, channels, ROWS=TILE, BLOCK=TILE)
    return out


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    size = (*like.shape[:2], height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _tiles(rows: int, channels: int) -> tuple[int, int]:
    return -(-rows // TILE), -(-channels // TILE)
