"""Everything a set of weights needs to imagine views: autoencoder, image encoder, multi-view UNet, noise schedule.

One class serves every size. The embedded model is built from a configuration file and a file of eight-bit weights;
released weights fill the same class at full size.
"""

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from nvsadapter_guidance.adapter import NVSAdapter, NVSAdapterConfig
from nvsadapter_guidance.cameras import camera_convention, look_at
from nvsadapter_guidance.cuda_graphs import GraphCache
from nvsadapter_guidance.encoders import PromptEncoder, clip_images
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model_config import NVSModelConfig, building, read_config
from nvsadapter_guidance.quantise import dequantise_state_dict, quantise_state_dict
from nvsadapter_guidance.resize import resize_bilinear
from nvsadapter_guidance.schedule import NoiseSchedule
from nvsadapter_guidance.unet import MultiViewUNet

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
HALF_PRECISION = ("vae.",)
"""Eight bits cost the autoencoder 0.9 dB on training images, and sixteen cost 1.6 MB."""
MINI_MODEL = Path(__file__).parent / "pretrained" / "mini"


class NVSModel(nn.Module):
    """The networks of one set of weights and the conventions they were trained with.

    Images are ``(B, 3, H, W)`` in [-1, 1]; poses are azimuth and elevation in degrees and distance in world units.
    """

    def __init__(self, config: NVSModelConfig) -> None:
        super().__init__()
        self.config = config
        unet = UNet2DConditionModel.from_config(config.unet)
        self.network = MultiViewUNet(unet, NVSAdapter.inject(unet, NVSAdapterConfig.from_dict(config.adapter)))
        self.vae = AutoencoderKL.from_config(config.vae)
        self.image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.image_encoder))
        width = config.unet["cross_attention_dim"]
        self.text_context = nn.Parameter(0.02 * torch.randn(1, config.text_tokens, width))
        self.prompt_encoder: PromptEncoder | None = None
        with torch.device("cpu"):  # a table, not a weight: it has values even where weights are yet to come
            self.schedule = NoiseSchedule(**config.schedule)
        self.convention = camera_convention(self.network.adapter.config.camera_convention)
        self.pixels_per_call: int | None = None
        """Image pixels that the autoencoder takes at a time, see `memory.MemoryPlan`; None for all of a batch."""
        self.graphs = GraphCache()
        """CUDA graphs of predictions; off unless the user of the model switches them on."""

    @classmethod
    def blank(cls, config: NVSModelConfig) -> "NVSModel":
        """A model whose weights take no memory, to be filled by ``load_state_dict(..., assign=True)``."""
        with torch.device("meta"):
            model = cls(config)
        fill_position_ids(model.image_encoder)
        return model

    @property
    def num_query(self) -> int:
        """Query views that the model was trained to imagine together."""
        return self.network.adapter.config.num_query

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text_context.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the network computes in."""
        return self.network.unet.conv_in.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> "NVSModel":
        """As ``Module.to``; a dtype changes the network and the image encoder alone.

        The autoencoder stays in float32, as in training, and so do the ray convolutions, whose input has frequencies
        that half precision cannot hold.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            # Tensor by tensor, converted on the way: no device ever holds the network twice or in full precision.
            rays = self.network.adapter.ray_convs
            self.network.adapter.ray_convs = nn.ModuleList()
            exact = torch.float32
            for module, precision in (
                (self.network, dtype), (self.image_encoder, dtype), (rays, exact), (self.vae, exact),
            ):  # fmt: skip
                # Not the method of diffusers' models, which warns of casts that are meant here.
                nn.Module.to(module, device=device, dtype=precision, non_blocking=non_blocking)
            self.network.adapter.ray_convs = rays
            self.text_context.data = self.text_context.data.to(dtype)
        if device is not None:
            super().to(device, non_blocking=non_blocking)
        if self.device.type == "cuda" and self.dtype.itemsize == 2:
            # The layout in which tensor cores take the inputs of convolutions.
            convolutions = (module for module in self.network.unet.modules() if isinstance(module, nn.Conv2d))
            for layer in convolutions:
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
            self.graphs.search = True
        return self

    def resize(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Bring images to the model's resolution (bilinear, antialiased only when shrinking)."""
        size = self.config.image_size
        if images.shape[-2:] == (size, size):
            return images
        return resize_bilinear(images, size)

    def encode(
        self, images: Float[Tensor, "B 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Latents of images at the model's resolution: a sample of the posterior, or its mean without a generator.

        With more than ``pixels_per_call`` the parts of the batch follow each other, and a backward pass encodes each
        part again (Chen et al. 2016, arXiv 1604.06174): one part's activations are held at a time, none in between.
        """
        parts = images.split(self._images_per_call(images.shape[-2] * images.shape[-1]))
        if len(parts) > 1 and images.requires_grad and torch.is_grad_enabled():
            moments = [checkpoint(self._moments, p, use_reentrant=False, preserve_rng_state=False) for p in parts]
        else:
            moments = [self._moments(part) for part in parts]
        return self.draw_latents(torch.cat(moments), generator)

    def draw_latents(
        self, moments: Float[Tensor, "B 2C h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Latents with the mean and the logarithmic variance that the encoder found; the mean without a generator."""
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mean
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            latents = latents + posterior.std * noise
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of latents, clamped to [-1, 1]."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.latent_stride**2
        parts = (latents / self.vae.config.scaling_factor).split(self._images_per_call(pixels))
        return torch.cat([self.vae.decode(part).sample.clamp(-1.0, 1.0) for part in parts])

    def _moments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2C h w"]:
        """Mean and logarithmic variance of the autoencoder's posterior."""
        return self.vae.encode(images).latent_dist.parameters

    def _images_per_call(self, pixels: int) -> int:
        """How many images of so many pixels the autoencoder takes at a time."""
        return 2**31 if self.pixels_per_call is None else max(1, self.pixels_per_call // pixels)

    def text_tokens(self, prompt: str = "") -> Float[Tensor, "1 tokens dim"]:
        """What stands for the text of a prompt, in the network's precision; of the empty one it was computed once.

        Raises:
            InputError: the prompt is not empty and no tokenizer is found.
        """
        if not prompt.strip():
            return self.text_context
        if self.prompt_encoder is None:
            log.warning("prompt '%s' is ignored: the %s model has no text encoder", prompt, self.config.name)
            return self.text_context
        return self.prompt_encoder(prompt).to(self.text_context)

    def semantic_tokens(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 D"]:
        """The single image token of each support image."""
        if self.config.image_preprocessing == "clip":
            images = clip_images(images, self.image_encoder.config.image_size)
        return self.image_encoder(pixel_values=images.to(self.image_encoder.dtype)).image_embeds[:, None]

    def ray_embedding(
        self,
        azimuth: Float[Tensor, "B views"],
        elevation: Float[Tensor, "B views"],
        distance: Float[Tensor, "B views"],
    ) -> Float[Tensor, "B views R h w"]:
        """Embedding of every view's rays relative to view 0, the support view."""
        c2w = look_at(azimuth, elevation, distance, self.convention)
        size = self.config.image_size
        embedding = self.network.adapter.config.rays
        return embedding(c2w, self.config.fov_deg, (size, size), self.latent_stride, self.convention)

    def unconditional_support_latents(
        self, like: Float[Tensor, "B 1 C h w"], generator: torch.Generator | None
    ) -> Float[Tensor, "B 1 C h w"]:
        """What the unconditional branch sees in place of the support view."""
        if self.config.unconditional_support == "zeros":
            return torch.zeros_like(like)
        # Drawn in float32, so that a seed gives the same noise in every precision.
        return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and the eight-bit weights into ``folder``, both or none.

        Raises:
            InputError: they cannot be written.
        """
        self.config.vae["scaling_factor"] = self.vae.config.scaling_factor
        text = json.dumps(dataclasses.asdict(self.config), indent=1) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                save_file(quantise_state_dict(self.state_dict(), half=HALF_PRECISION), Path(scratch) / WEIGHTS_NAME)
                (Path(scratch) / CONFIG_NAME).write_text(text)
                for name in (WEIGHTS_NAME, CONFIG_NAME):
                    os.replace(Path(scratch) / name, folder / name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: a model cannot be written there ({error}); choose another folder") from error

    @classmethod
    def load(cls, folder: Path = MINI_MODEL) -> "NVSModel":
        """Read a folder written by :meth:`save`, strictly.

        Raises:
            InputError: a file is missing, damaged, or does not fit the configuration.
        """
        config = read_config(folder / CONFIG_NAME)
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            raise InputError(f"{weights}: no such file; a model folder needs {CONFIG_NAME} and {WEIGHTS_NAME}")
        try:
            packed = load_file(weights)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{weights}: not a readable safetensors file ({error}); copy it again") from error
        with building(str(folder / CONFIG_NAME)):
            model = cls(config)
        try:
            model.load_state_dict(dequantise_state_dict(packed, str(weights)), strict=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(f"{weights}: does not fit {CONFIG_NAME} beside it: {first}") from error
        return model.eval().requires_grad_(False)


def fill_position_ids(tower: nn.Module) -> None:
    """Give a CLIP tower on the meta device its table of positions, the one tensor that no file holds."""
    for module in tower.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.register_buffer("position_ids", torch.arange(ids.shape[-1]).expand(1, -1), persistent=False)
