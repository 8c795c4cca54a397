"""Layers of diffusers' UNets and autoencoders with frozen weights: the same modules, fewer passes over memory.

Biases of convolutions are added where their output is read anyway, norm and activation are one operation, and a
convolution keeps nothing for its backward pass, since only the gradient on its input is wanted.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvsadapter_guidance.group_norm import group_norm_silu
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
    block: Any, x: Float[Tensor, "N C h w"], time: Float[Tensor, "N D"] | None = None
) -> Float[Tensor, "N out h w"]:
    """A `ResnetBlock2D`.

    Args:
        time: the time embedding after its activation.
    """
    hidden = convolve(group_norm_silu(x, block.norm1), block.conv1)
    offset = block.conv1.bias[None]
    if time is not None:
        offset = offset + block.time_emb_proj(time)
    hidden = convolve(group_norm_silu(hidden, block.norm2, offset), block.conv2)
    bias, shortcut = block.conv2.bias, block.conv_shortcut
    if shortcut is None:
        return add(x, hidden, bias)
    return add(convolve(x, shortcut), hidden, bias if shortcut.bias is None else bias + shortcut.bias)


def convolve(x: Float[Tensor, "N C h w"], layer: nn.Conv2d, with_bias: bool = False) -> Float[Tensor, "N out h2 w2"]:
    """A convolution without its bias, unless it is asked for; weights get no gradient where they are frozen."""
    bias = layer.bias if with_bias else None
    if layer.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()):
        return F.conv2d(x, layer.weight, bias, layer.stride, layer.padding)
    return _Convolution.apply(x, layer.weight, bias, layer.stride, layer.padding)


def convolve_few_channels(x: Float[Tensor, "N C h w"], layer: nn.Conv2d) -> Float[Tensor, "N out h2 w2"]:
    """A convolution with its bias; in half precision channels are filled up to eight, as tensor cores take them."""
    if x.dtype.itemsize != 2 or layer.weight.requires_grad:
        return convolve(x, layer, with_bias=True)
    more = (0, 0, 0, 0, 0, -x.shape[1] % 8)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x, weight = (F.pad(tensor, more).contiguous(memory_format=layout) for tensor in (x, layer.weight))
    return _Convolution.apply(x, weight, layer.bias, layer.stride, layer.padding)


def add(
    first: Float[Tensor, "N C h w"], second: Float[Tensor, "N C h w"], bias: Float[Tensor, " C"]
) -> Float[Tensor, "N C h w"]:
    """``first + second`` plus a bias."""
    layout = torch.channels_last
    alike = first.is_contiguous(memory_format=layout) and second.is_contiguous(memory_format=layout)
    if alike and not bias.requires_grad and has_triton(first.device):
        return _Sum.apply(first, second, bias)
    return first + second + bias[:, None, None]


def enlarge(x: Float[Tensor, "N C h w"], size: tuple[int, int]) -> Float[Tensor, "N C h2 w2"]:
    """The nearest pixels of ``x`` at another size, without a gradient where a kernel does it."""
    doubled = size == (2 * x.shape[2], 2 * x.shape[3])
    if not doubled or not has_triton(x.device) or not x.is_contiguous(memory_format=torch.channels_last):
        return F.interpolate(x, size=size, mode="nearest")
    from nvsadapter_guidance.upsample_kernel import double_kernel

    samples, channels, height, width = x.shape
    out = torch.empty(samples, channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixels = samples * height * width
    with current(x.device):
        grid = (-(-pixels // TILE), -(-channels // TILE))
        double_kernel[grid](x, out, pixels, width, channels, ROWS=TILE, BLOCK=TILE)
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
    def forward(ctx: Any, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
        from nvsadapter_guidance.residual_kernel import sum_kernel

        out, channels = torch.empty_like(first), first.shape[1]
        rows = first.numel() // channels
        grid = (-(-rows // TILE), -(-channels // TILE))
        with current(first.device):
            sum_kernel[grid](first, second, bias, out, rows, channels, ROWS=TILE, BLOCK=TILE)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None
