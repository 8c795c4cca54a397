"""Our layout of an adapter: its own tensors, its options, and what it was trained with.

A folder holds ``nvs_adapter.safetensors``, ``nvs_adapter.json`` (`NVSAdapterConfig`) and, when it was converted from a
released checkpoint, ``nvs_model.json`` (`NVSModelConfig`). The base model and the image encoder are not in it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Optional

from nvsadapter_guidance.adapter import CONFIG_NAME, WEIGHTS_NAME, NVSAdapter
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints.families import family_of_width, full_size_config
from nvsadapter_guidance.checkpoints.image_encoder import ImageEncoder
from nvsadapter_guidance.checkpoints.parts import ADAPTER, Blueprint, Part
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.slots import Slot
from nvsadapter_guidance.checkpoints.stable_diffusion import StableDiffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model_config import NVSModelConfig, read_config

MODEL_CONFIG_NAME = "nvs_model.json"


def adapter_folder(path: Path) -> Optional[Path]:
    """The adapter's folder for a path to it or to its weights; None where there is no adapter."""
    folder = path.parent if path.name == WEIGHTS_NAME else path
    places = (folder, folder / "adapter", folder / "nvs_adapter")
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


def write_model_config(folder: Path, config: NVSModelConfig) -> None:
    """Write `nvs_model.json` beside an adapter."""
    (folder / MODEL_CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")


def read_model_config(folder: Path) -> Optional[NVSModelConfig]:
    """The configuration beside an adapter; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / MODEL_CONFIG_NAME
    return read_config(path) if path.is_file() else None


def adapter_config(
    folder: Path, base: Optional[StableDiffusion] = None, image_encoder: Optional[ImageEncoder] = None
) -> NVSModelConfig:
    """The configuration of the model that an adapter makes with a base model and an image encoder.

    Without ``nvs_model.json`` it is that of a released model, for the family of the base (SD 2.1 when None).

    Raises:
        InputError: a file is damaged, or the base is of a family the adapter is not for.
    """
    options = NVSAdapterConfig.load(folder / CONFIG_NAME)
    config = read_model_config(folder)
    if config is None:
        family = "sd21" if base is None else family_of_width(base.context_width)
        if family is None:
            raise InputError(f"{folder}: the base model given is neither SD 1.5 nor SD 2.1; give one of them")
        config = full_size_config(family)
    if base is not None:
        width = config.unet["cross_attention_dim"]
        if base.context_width != width:
            raise InputError(
                f"{base.path}: has text tokens of {base.context_width} channels, the adapter in {folder} is for a base "
                f"model with {width}; give that base model"
            )
        config.text_encoder = base.text_options()
        config.text_tokens = config.text_encoder["max_position_embeddings"]
    if image_encoder is not None:
        config.image_encoder = image_encoder.options()
    config.adapter = options.to_dict()
    return config


def adapter_part(folder: Path, blueprint: Blueprint) -> Part:
    """The adapter's tensors.

    Raises:
        InputError: the file is missing or damaged.
    """
    adapter: NVSAdapter = blueprint.model.network.adapter
    slots = {ADAPTER + name: Slot(name) for name in adapter.state_dict()}
    path = folder / WEIGHTS_NAME
    return Part(TensorFile(path), slots, str(path))
