"""Whole models from files: a released checkpoint, or an adapter of ours with its base model and image encoder."""

import logging
from pathlib import Path
from typing import Optional

from nvsadapter_guidance.checkpoints.adapter_folder import adapter_config, adapter_part, read_model_config
from nvsadapter_guidance.checkpoints.families import family_of_width
from nvsadapter_guidance.checkpoints.image_encoder import ImageEncoder
from nvsadapter_guidance.checkpoints.parts import Blueprint, OnBytes, fill
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.released import has_average, is_released, released_part
from nvsadapter_guidance.checkpoints.released_config import config_beside, released_config
from nvsadapter_guidance.checkpoints.sources import find_base, find_image_encoder
from nvsadapter_guidance.checkpoints.stable_diffusion import StableDiffusion, is_diffusers_folder, is_ldm
from nvsadapter_guidance.encoders import PromptEncoder
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel

log = logging.getLogger(__name__)


def load_released(
    path: Path, config: Optional[Path] = None, use_ema: bool = True, on_bytes: Optional[OnBytes] = None
) -> NVSModel:
    """A released checkpoint as a model on the CPU, its tensors mapped from the file in the precision they have there.

    Args:
        config: its YAML file; None for the one beside it, or what the tensors show.
        use_ema: take the adapter's moving average, which the released sampling script does with ``--use_ema``. A file
            without one is loaded with its raw weights, and a warning says so.

    Raises:
        InputError: the file is damaged, malicious, half downloaded or of another model; one line names what is wrong.
    """
    file = TensorFile(path)
    if not is_released(file):
        what = "Stable Diffusion without an adapter" if is_ldm(file) else "no NVS-Adapter"
        raise InputError(f"{path}: is {what}; give base_query_4_step_200000.ckpt, or the folder of an adapter")
    config = config or config_beside(path)
    blueprint = Blueprint(released_config(file, str(path), config), str(config or path))
    if use_ema and not has_average(file):
        log.warning("%s holds no moving average (EMA): its raw weights are used", path)
        use_ema = False
    return fill(blueprint, [released_part(file, blueprint, str(path), use_ema)], on_bytes=on_bytes)


def load_adapter(
    folder: Path, base: Optional[str] = None, image_encoder: Optional[str] = None, on_bytes: Optional[OnBytes] = None
) -> NVSModel:
    """An adapter of ours with the base model and image encoder that it needs, as `load_released` gives it.

    Args:
        base: file, diffusers folder or hub id; None for the one beside the adapter, or as `sources.find_base` finds.
        image_encoder: the same, as `sources.find_image_encoder` finds.

    Raises:
        InputError: a file is missing, damaged or of another model; one line names what is wrong.
    """
    known = read_model_config(folder)
    family = (family_of_width(known.unet["cross_attention_dim"]) if known else None) or "sd21"
    beside = next((place for place in (folder, folder.parent) if is_diffusers_folder(place)), None)
    model = StableDiffusion(beside if base is None and beside is not None else find_base(family, base))
    tower = ImageEncoder(find_image_encoder(image_encoder, [folder, folder.parent, model.path]))
    blueprint = Blueprint(adapter_config(folder, model, tower), str(folder))
    parts = [*model.parts(blueprint), tower.part(blueprint), adapter_part(folder, blueprint)]
    return fill(blueprint, parts, PromptEncoder.tokenizer_beside(model.path), on_bytes)
