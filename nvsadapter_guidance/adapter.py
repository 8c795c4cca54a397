"""The NVS-Adapter's layers, and how they join an existing Stable Diffusion UNet.

Jeong et al. 2024, "NVS-Adapter: Plug-and-Play Novel View Synthesis from a Single Image". The adapter owns its
parameters; the UNet keeps its own under unchanged paths. State-dict keys of the adapter are the UNet's block paths,
e.g. ``down_blocks.0.attentions.1.transformer_blocks.0.view_attn.to_q.weight``, plus ``ray_convs.<level>.*``.
"""

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.attention import MultiHeadAttention
from nvsadapter_guidance.blocks import BlockAdapter, NVSTransformerBlock, check_supported
from nvsadapter_guidance.composer import JointComposer, LearnableTokenComposer
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.state import load_strict

CONFIG_NAME = "nvs_adapter.json"
WEIGHTS_NAME = "nvs_adapter.safetensors"

_LEVEL = re.compile(r"^(down_blocks|up_blocks)\.(\d+)\.|^(mid_block)\.")


class NVSAdapter(nn.Module):
    """All layers of an adapter: one `BlockAdapter` per transformer block and one ray convolution per UNet level.

    Build it with `inject` or `from_pretrained`.
    """

    def __init__(self, config: NVSAdapterConfig, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.config = config
        unet_config: Any = unet.config
        channels = list(unet_config.block_out_channels)
        # Levels without transformer blocks keep an (inert) convolution, as released checkpoints have one there too.
        self.ray_convs = nn.ModuleList(
            nn.Conv2d(config.posemb_dim, out, kernel_size=2**level, stride=2**level)
            for level, out in enumerate(channels)
        )
        blocks: List[BlockAdapter] = []
        for path, block in _transformer_blocks(unet).items():
            dim, attention = block.norm1.normalized_shape[0], block.attn1
            level = level_of_path(path, len(channels))
            blocks.append(BlockAdapter(config, path, level, dim, attention.heads, attention.inner_dim))
            _graft(self, path, blocks[-1])
        self.levels = sorted({block.level for block in blocks})

    @classmethod
    def inject(
        cls,
        unet: UNet2DConditionModel,
        config: NVSAdapterConfig,
        generator: Optional[torch.Generator] = None,
        freeze_base: bool = True,
    ) -> "NVSAdapter":
        """Build a fresh adapter and plug it into `unet`, in place.

        Every transformer block is replaced by one that shares its modules; base weights are untouched. The adapter
        lies on the device and in the dtype of the UNet.

        Args:
            generator: of the initial weights (CPU); seeded with 0 when None.
            freeze_base: switch gradients of the UNet's own parameters off.

        Raises:
            InputError: the UNet has no transformer block, one of an unsupported kind, or already has an adapter.
        """
        _check_unet(unet)
        adapter = cls(config, unet)
        reference = next(unet.parameters())
        if not reference.is_meta:  # there, weights are yet to come
            adapter.reset_parameters(generator)
        adapter.to(device=reference.device, dtype=reference.dtype)
        if freeze_base:
            unet.requires_grad_(False)
        adapter.attach(unet)
        adapter.freeze_inert()
        return adapter

    @classmethod
    def from_pretrained(cls, unet: UNet2DConditionModel, folder: Union[str, Path]) -> "NVSAdapter":
        """Plug an adapter saved by `save_pretrained` into `unet`.

        Raises:
            InputError: a file is missing or damaged, or a tensor is missing, surplus or of another shape (named).
        """
        folder = Path(folder)
        config = NVSAdapterConfig.load(folder / CONFIG_NAME)
        path = folder / WEIGHTS_NAME
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); save the adapter again") from error
        adapter = cls.inject(unet, config)
        adapter.load_strict(tensors, str(path))
        return adapter

    def save_pretrained(self, folder: Union[str, Path], dtype: Optional[torch.dtype] = None) -> None:
        """Write the adapter alone, config and tensors; `dtype` None keeps the tensors' own."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_file(tensors, Path(scratch) / WEIGHTS_NAME)
            (Path(scratch) / CONFIG_NAME).write_text(text, encoding="utf-8")
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(Path(scratch) / name, folder / name)

    def load_strict(self, tensors: Dict[str, Tensor], source: str) -> None:
        """Load every tensor of the adapter and nothing else.

        Raises:
            InputError: names `source` and the first key that is missing, surplus or of another shape.
        """
        load_strict(self, tensors, source)

    def block_adapters(self) -> Dict[str, BlockAdapter]:
        """The adapter's part of every transformer block, by the block's path in the UNet."""
        return {module.path: module for module in self.modules() if isinstance(module, BlockAdapter)}

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Replace the transformer blocks of `unet` by blocks that use this adapter."""
        for path, block_adapter in self.block_adapters().items():
            parent_path, name = path.rsplit(".", 1)
            base: Any = unet.get_submodule(path)
            unet.get_submodule(parent_path)._modules[name] = NVSTransformerBlock(base, block_adapter)

    def positional_features(
        self, ray_embedding: Float[Tensor, "rows channels h w"]
    ) -> Dict[int, Float[Tensor, "rows tokens dim"]]:
        """Positional tokens of every level that has transformer blocks, from the embedding of the full grid."""
        features = {}
        for level in self.levels:
            conv: Any = self.ray_convs[level]
            features[level] = conv(ray_embedding.to(conv.weight.dtype)).flatten(2).transpose(1, 2)
        return features

    def reset_parameters(self, generator: Optional[torch.Generator] = None) -> None:
        """Draw initial weights: tokens N(0, 1), other layers torch's uniform default, output layers zero."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                _reset_uniform(module, generator)
            elif isinstance(module, LearnableTokenComposer):
                _fill(module.tokens, torch.randn(module.tokens.shape, generator=generator))
        if self.config.zero_init:
            for block in self.block_adapters().values():
                for attention in _residual_attentions(block):
                    nn.init.zeros_(attention.to_out.weight)
                    nn.init.zeros_(attention.to_out.bias)

    def trainable_parameters(self) -> List[nn.Parameter]:
        """Parameters that the output depends on, thus the ones to optimise; `freeze_inert` explains the others."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def freeze_inert(self) -> None:
        """Switch gradients off where there are none, so that distributed training does not wait for them.

        Inert are: ray convolutions of levels without transformer blocks, queries and keys of image attention (it
        has one token), all of it when the image token replaces the text, and the released no-op composer. They exist
        because released checkpoints hold them.
        """
        for level, conv in enumerate(self.ray_convs):
            if level not in self.levels:
                conv.requires_grad_(False)
        for block in self.block_adapters().values():
            if block.image_attn is not None:
                block.image_attn.to_q.requires_grad_(False)
                block.image_attn.to_k.requires_grad_(False)
                if self.config.imgemb_to_text:
                    block.image_attn.requires_grad_(False)
            if isinstance(block.composer, JointComposer) and not block.composer.active:
                block.composer.requires_grad_(False)


def level_of_path(path: str, num_levels: int) -> int:
    """UNet level (0 is the full grid) of a block path; the middle block belongs to the last level."""
    match = _LEVEL.match(path)
    if match is None:
        raise InputError(f"unet: block '{path}' lies outside down, middle and up blocks; use a diffusers UNet")
    if match.group(3):
        return num_levels - 1
    index = int(match.group(2))
    return index if match.group(1) == "down_blocks" else num_levels - 1 - index


def _transformer_blocks(unet: UNet2DConditionModel) -> Dict[str, Any]:
    kinds = (BasicTransformerBlock, NVSTransformerBlock)
    return {path: module for path, module in unet.named_modules() if isinstance(module, kinds)}


def _check_unet(unet: UNet2DConditionModel) -> None:
    blocks = _transformer_blocks(unet)
    if not blocks:
        raise InputError("unet: has no transformer block for the adapter to join; use a UNet with cross-attention")
    for path, block in blocks.items():
        if isinstance(block, NVSTransformerBlock):
            raise InputError(f"unet: block '{path}' already has an adapter; load a fresh UNet first")
        check_supported(block, path)


def _graft(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    root.add_module(name, module)


def _residual_attentions(block: BlockAdapter) -> List[MultiHeadAttention]:
    attentions = [block.view_attn]
    if block.image_attn is not None:
        attentions.append(block.image_attn)
    if isinstance(block.composer, (LearnableTokenComposer, JointComposer)):
        attentions.append(block.composer.out)
    return attentions


def _reset_uniform(layer: Union[nn.Linear, nn.Conv2d], generator: torch.Generator) -> None:
    bound = 1.0 / math.sqrt(layer.weight[0].numel())
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            _fill(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
