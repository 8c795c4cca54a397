"""Stable Diffusion without an adapter: LDM files, and folders in diffusers layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional

from torch import Tensor

from nvsadapter_guidance.checkpoints import clip
from nvsadapter_guidance.checkpoints.ldm_vae import old_diffusers_slots, vae_slots
from nvsadapter_guidance.checkpoints.parts import TEXT, UNET, VAE, Blueprint, Part
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.slots import Slot, plain, prefixed, shape_of
from nvsadapter_guidance.conversion import ema_name, unet_key_map
from nvsadapter_guidance.errors import InputError

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
OPENCLIP_PREFIX, OPENAI_PREFIX = "cond_stage_model.model.", "cond_stage_model.transformer."
LDM_SURPLUS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
    "scale_factor", "model_ema.decay", "model_ema.num_updates",
)  # fmt: skip
"""Tables of the noise schedule and the average's counters in LDM files; they follow from the configuration."""
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".non_ema")
_TEXT_WIDTH_KEYS = (
    f"{UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)


def is_ldm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of a Stable Diffusion checkpoint in LDM layout."""
    return f"{UNET_PREFIX}time_embed.0.weight" in tensors


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder holds Stable Diffusion in diffusers layout."""
    return (path / "unet" / "config.json").is_file() and (path / "vae" / "config.json").is_file()


class StableDiffusion:
    """An opened base model: its text tower's options, and the parts that it fills.

    Args:
        path: an LDM file or a folder in diffusers layout.

    Raises:
        InputError: it is neither, a file is damaged, or it is a model that predicts something else than noise.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, str(path)
        self.folder = is_diffusers_folder(path)
        if self.folder:
            _check_prediction(path)
            self.unet, self.vae, self.text = (component(path / name) for name in ("unet", "vae", "text_encoder"))
            self.files: List[TensorFile] = [self.unet, self.vae, self.text]
            return
        if path.is_dir():
            raise InputError(f"{path}: is no diffusers folder (no unet/config.json); give one, or an LDM checkpoint")
        self.unet = TensorFile(path)
        self.files = [self.unet]
        if not is_ldm(self.unet):
            raise InputError(f"{path}: is no Stable Diffusion checkpoint (no {UNET_PREFIX}time_embed.0.weight)")

    @property
    def context_width(self) -> int:
        """Channels of a text token, which tells the families apart."""
        for key in _TEXT_WIDTH_KEYS:
            if key in self.unet:
                return shape_of(self.unet, key, 2, self.source)[1]
        raise InputError(f"{self.source}: its UNet has no text attention at the finest level; use SD 1.5 or 2.1 base")

    def text_options(self) -> Dict[str, Any]:
        """Arguments of `CLIPTextConfig`."""
        if self.folder:
            settings = _read_json(self.path / "text_encoder" / "config.json")
            activation = str(settings.get("hidden_act", "quick_gelu"))
            return clip.huggingface_text_options(self.text, "", str(self.text.path), activation)
        if any(key.startswith(OPENAI_PREFIX) for key in self.unet):
            return clip.huggingface_text_options(self.unet, OPENAI_PREFIX, self.source)
        return clip.openclip_text_options(self.unet, OPENCLIP_PREFIX, self.source)

    def parts(self, blueprint: Blueprint) -> List[Part]:
        """UNet, autoencoder and text tower of a blueprint."""
        return self._folder_parts(blueprint) if self.folder else [self._ldm_part(blueprint)]

    def _ldm_part(self, blueprint: Blueprint) -> Part:
        network, text, tensors = blueprint.model.network, blueprint.text_encoder, self.unet
        slots = {
            **plain(unet_key_map(network.unet), UNET, UNET_PREFIX),
            **prefixed(vae_slots(blueprint.model.vae), VAE, VAE_PREFIX),
        }
        # Training checkpoints carry the UNet's average beside it; the published files hold it in its place.
        surplus = {ema_name(name) for name in unet_key_map(network.unet).values()} | set(LDM_SURPLUS)
        if any(key.startswith(OPENAI_PREFIX) for key in tensors):
            slots.update(prefixed(clip.huggingface_text_slots(text, tensors, OPENAI_PREFIX), TEXT))
            surplus |= {f"{OPENAI_PREFIX}{key}" for key in clip.HUGGINGFACE_TEXT_SURPLUS}
        else:
            slots.update(prefixed(clip.openclip_text_slots(text), TEXT, OPENCLIP_PREFIX))
            surplus |= {f"{OPENCLIP_PREFIX}{key}" for key in clip.openclip_text_surplus(text)}
        return Part(tensors, slots, self.source, surplus)

    def _folder_parts(self, blueprint: Blueprint) -> List[Part]:
        model, text = blueprint.model, blueprint.text_encoder
        unet = {name: Slot(name) for name in model.network.unet.state_dict()}
        old = any(".attentions.0.query." in key for key in self.vae)
        vae = old_diffusers_slots(model.vae) if old else {name: Slot(name) for name in model.vae.state_dict()}
        tower = prefixed(clip.huggingface_text_slots(text, self.text), TEXT)
        return [
            Part(self.unet, prefixed(unet, UNET), str(self.unet.path)),
            Part(self.vae, prefixed(vae, VAE), str(self.vae.path)),
            Part(self.text, tower, str(self.text.path), clip.HUGGINGFACE_TEXT_SURPLUS),
        ]


def component(folder: Path) -> TensorFile:
    """The weights of one component of a diffusers or transformers folder; full precision before half.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = find_component(folder)
    if found is None:
        raise InputError(f"{folder}: holds no weights ({_WEIGHT_NAMES[0]}.safetensors or the like); download it again")
    return TensorFile(found)


def find_component(folder: Path) -> Optional[Path]:
    """The file of `component`, None without one."""
    names = [f"{name}{variant}" for variant in _VARIANTS for name in _WEIGHT_NAMES]
    files = [folder / f"{name}.safetensors" for name in names] + [folder / f"{name}.bin" for name in names]
    return next((file for file in files if file.is_file()), None)


def _check_prediction(path: Path) -> None:
    scheduler = path / "scheduler" / "scheduler_config.json"
    kind = _read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else "epsilon"
    if kind != "epsilon":
        raise InputError(f"{path}: predicts '{kind}' (the 768 px model); the adapter joins the base model of 512 px")


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); download the folder again") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no settings; download it again")
    return values
