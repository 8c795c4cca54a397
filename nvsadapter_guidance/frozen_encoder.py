"""The autoencoder's encoder with the gradient on its images, as score distillation runs it at every step.

In half precision it is a copy, in the layout that tensor cores take, and the model's own stays in float32. Forward and
backward pass are two CUDA graphs where possible.
"""

import copy
import logging
import threading
from collections import OrderedDict
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nvsadapter_guidance.cuda_graphs import WeightsAt, capture, convolution_search, graphs_possible
from nvsadapter_guidance.lean_encoder import can_run_lean, encode_lean

log = logging.getLogger(__name__)

LIMIT = 2
"""Batch sizes whose activations are kept at a time: a batch's full parts and its last, smaller one."""


class FrozenEncoder(nn.Module):
    """Means and logarithmic variances of images, in float32 whatever they are computed in.

    Args:
        vae: whose encoder is used. In its own dtype that is the encoder itself, put into evaluation mode and its
            gradients switched off; in another dtype it is a copy, which does not see later changes of the weights.
        dtype: to compute in.
        pixels_per_call: image pixels that go through at a time; None for all of a batch. Parts are made again for their
            backward pass.
        graphs: capture CUDA graphs on a GPU.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        dtype: torch.dtype = torch.bfloat16,
        pixels_per_call: int | None = None,
        graphs: bool = True,
    ) -> None:
        super().__init__()
        parts: tuple[Any, Any] = (vae.encoder, vae.quant_conv or nn.Identity())
        if dtype != vae.dtype:
            layout = torch.channels_last if vae.device.type == "cuda" else torch.preserve_format
            parts = tuple(copy.deepcopy(part).to(dtype=dtype, memory_format=layout) for part in parts)
        self.encoder, self.quant_conv = (part.eval().requires_grad_(False) for part in parts)
        self.dtype = dtype
        self.pixels_per_call = pixels_per_call
        self.graphs = graphs
        self.search = dtype.itemsize == 2
        """As in `GraphCache`."""
        self._captured: OrderedDict[torch.Size, GraphedMoments] = OrderedDict()
        self._seen: set[torch.Size] = set()

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2C h w"]:
        """Moments of the posterior; differentiable once where graphs are used."""
        pixels = images.shape[-2] * images.shape[-1]
        step = len(images) if self.pixels_per_call is None else max(1, self.pixels_per_call // pixels)
        parts = images.split(step)
        gradient = images.requires_grad and torch.is_grad_enabled()
        if gradient and self.graphs and graphs_possible((self,), images.device):
            with convolution_search(self.search):
                return torch.cat([self._graphed(part) for part in parts])
        if gradient and len(parts) > 1:
            return torch.cat(
                [checkpoint(self.moments, p, use_reentrant=False, preserve_rng_state=False) for p in parts]
            )
        return torch.cat([self.moments(part) for part in parts])

    def moments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2C h w"]:
        """The same in one part, as plain operations."""
        half = self.dtype.itemsize == 2 and images.device.type == "cuda"
        given = images.to(self.dtype, memory_format=torch.channels_last if half else torch.contiguous_format)
        encoded = encode_lean(self.encoder, given) if can_run_lean(self.encoder) else self.encoder(given)
        found = self.quant_conv(encoded)
        return found.to(torch.promote_types(images.dtype, torch.float32))

    def _graphed(self, images: Tensor) -> Tensor:
        shape = images.shape
        if shape in self._captured and not self._captured[shape].weights.unchanged((self.encoder, self.quant_conv)):
            self._captured.clear()
        if shape not in self._captured:
            if shape not in self._seen:  # a shape that is used once is not worth a graph
                self._seen.add(shape)
                return self.moments(images)
            while len(self._captured) >= LIMIT:  # before the next one asks for its memory
                self._captured.popitem(last=False)
            try:
                self._captured[shape] = GraphedMoments(self, images)
            except RuntimeError as error:
                self.graphs = False
                self._captured.clear()
                log.warning("the encoder runs without CUDA graphs: %s", str(error).splitlines()[0])
                return self.moments(images)
        self._captured.move_to_end(shape)
        return _Replay.apply(images, self._captured[shape])


class GraphedMoments:
    """Forward and backward pass of `FrozenEncoder.moments` on images of one shape.

    One set of activations exists. Where another forward pass, or the one backward pass that it serves, has used it, the
    forward pass is replayed before the next backward pass.
    """

    def __init__(self, encoder: FrozenEncoder, images: Tensor) -> None:
        # Not the encoder itself: it holds this object, and a circle of references would keep the GPU's memory.
        self.weights = WeightsAt((encoder.encoder, encoder.quant_conv))
        self.images = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        self.owner: object = None
        self.lock = threading.Lock()
        with torch.cuda.device(images.device), torch.enable_grad():
            self._warm_up(encoder)
            pool = torch.cuda.graph_pool_handle()
            self.forward_graph, self.moments = capture(lambda: encoder.moments(self.images), pool, warm_ups=0)
            self.output_gradient = torch.zeros_like(self.moments)
            self.backward_graph, self.gradient = capture(self._backward, pool, warm_ups=0)
        self.moments = self.moments.detach()

    def _warm_up(self, encoder: FrozenEncoder) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                moments = encoder.moments(self.images)
                torch.autograd.grad(moments, self.images, torch.zeros_like(moments))
        torch.cuda.current_stream().wait_stream(side)

    def _backward(self) -> Tensor:
        return torch.autograd.grad(self.moments, self.images, self.output_gradient)[0]

    def forward(self, images: Tensor, owner: object) -> Tensor:
        """Moments of images; the activations belong to ``owner`` from now on."""
        with self.lock, torch.no_grad():
            self._run(images, owner)
            return self.moments.clone()

    def backward(self, images: Tensor, gradient: Tensor, owner: object) -> Tensor:
        """Gradient on the images that ``owner`` has passed forward."""
        with self.lock, torch.no_grad():
            if self.owner is not owner:
                self._run(images, owner)
            self.output_gradient.copy_(gradient)
            self.backward_graph.replay()
            self.owner = None  # the pass has written over its activations
            return self.gradient.clone()

    def _run(self, images: Tensor, owner: object) -> None:
        self.images.copy_(images)
        self.forward_graph.replay()
        self.owner = owner


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, graphs: GraphedMoments) -> Tensor:
        ctx.save_for_backward(images)
        ctx.graphs, ctx.owner = graphs, object()
        return graphs.forward(images, ctx.owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        return ctx.graphs.backward(images, gradient, ctx.owner), None
