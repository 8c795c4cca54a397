"""The released checkpoint's layout: the whole model, the adapter twice (raw and its moving average)."""

from collections.abc import Mapping
from typing import Set

from torch import Tensor

from nvsadapter_guidance.checkpoints import clip
from nvsadapter_guidance.checkpoints.ldm_vae import vae_slots
from nvsadapter_guidance.checkpoints.parts import ADAPTER, IMAGE, TEXT, UNET, VAE, Blueprint, Part
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX
from nvsadapter_guidance.checkpoints.slots import Slot, Slots, plain, prefixed
from nvsadapter_guidance.conversion import adapter_key_map, ema_name, unet_key_map
from nvsadapter_guidance.errors import InputError

VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
BOOKKEEPING = ("denoiser.sigmas", f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates")
"""The table of noise levels and the average's counters; they follow from the configuration."""


def is_released(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of a released NVS-Adapter checkpoint."""
    return f"{UNET_PREFIX}pe_blocks.0.weight" in tensors


def has_average(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a released checkpoint holds the moving average of its adapter."""
    return any(key.startswith(EMA_PREFIX) for key in tensors)


def released_part(tensors: Mapping[str, Tensor], blueprint: Blueprint, source: str, use_ema: bool) -> Part:
    """The whole model from a released checkpoint, with the adapter's average or its raw weights.

    Raises:
        InputError: the average is asked for and the file has none.
    """
    if use_ema and not has_average(tensors):
        raise InputError(f"{source}: holds no moving average (EMA); ask for the raw weights")
    raw, average = adapter_slots(blueprint, use_ema=False), adapter_slots(blueprint, use_ema=True)
    slots = {**frozen_slots(blueprint, tensors), **(average if use_ema else raw)}
    other = raw if use_ema else average
    surplus = {slot.key for slot in other.values()} | frozen_surplus(blueprint, tensors) | set(BOOKKEEPING)
    return Part(tensors, slots, source, surplus)


def adapter_slots(blueprint: Blueprint, use_ema: bool) -> Slots:
    """Places of the adapter's tensors, raw or averaged."""
    network = blueprint.model.network
    names = adapter_key_map(network.adapter, network.unet)
    if use_ema:
        return {ADAPTER + ours: Slot(ema_name(released)) for ours, released in names.items()}
    return plain(names, ADAPTER, UNET_PREFIX)


def frozen_slots(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> Slots:
    """Places of everything that is not the adapter's: UNet, autoencoder, text and image tower."""
    model, text = blueprint.model, blueprint.text_encoder
    if _has_openai_text(tensors):
        text_slots = prefixed(clip.huggingface_text_slots(text, tensors, f"{TEXT_PREFIX}transformer."), TEXT)
    else:
        text_slots = prefixed(clip.openclip_text_slots(text), TEXT, f"{TEXT_PREFIX}model.")
    return {
        **plain(unet_key_map(model.network.unet), UNET, f"{UNET_PREFIX}unet."),
        **prefixed(vae_slots(model.vae), VAE, VAE_PREFIX),
        **text_slots,
        **prefixed(clip.openclip_vision_slots(model.image_encoder), IMAGE, IMAGE_PREFIX),
    }


def frozen_surplus(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> Set[str]:
    """What the towers of a released checkpoint hold beside what is used."""
    image = {f"{IMAGE_PREFIX}{key}" for key in clip.OPENCLIP_VISION_SURPLUS}
    if _has_openai_text(tensors):
        return image | {f"{TEXT_PREFIX}transformer.{key}" for key in clip.HUGGINGFACE_TEXT_SURPLUS}
    return image | {f"{TEXT_PREFIX}model.{key}" for key in clip.openclip_text_surplus(blueprint.text_encoder)}


def _has_openai_text(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(f"{TEXT_PREFIX}transformer.") for key in tensors)
