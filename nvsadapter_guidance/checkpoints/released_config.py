"""The released project's YAML files (``base_query_4.yaml``) as our configuration of a model."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from torch import Tensor

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints import clip
from nvsadapter_guidance.checkpoints.families import family_of_width, full_size_config
from nvsadapter_guidance.checkpoints.ldm_vae import vae_options_from_ldm
from nvsadapter_guidance.checkpoints.slots import shape_of
from nvsadapter_guidance.conversion import unet_options_from_ldm
from nvsadapter_guidance.errors import InputError, one_line
from nvsadapter_guidance.model_config import NVSModelConfig

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "conditioner.conditioners.2.embedders.0."
IMAGE_PREFIX = "conditioner.conditioners.3.embedders.0.model."
_LATENT_SIDE = 32
_TRAINED_OPTIONS = {
    "view_attn_mode": "view_attn_mode",
    "image_attn_mode": "image_attn_mode",
    "query_composer_mode": "query_composer_mode",
    "query_emb_scale": "query_emb_scale",
    "imgemb_to_text": "imgemb_to_text",
    "num_query": "num_query",
    "image_context_dim": "image_context_dim",
    "latent_resolution": "latent_resolution",
    "max_timesteps": "num_train_timesteps",
}


def released_config(tensors: Mapping[str, Tensor], source: str, yaml_path: Optional[Path] = None) -> NVSModelConfig:
    """The configuration of a released checkpoint.

    What its YAML file says is taken from there; without one, the released defaults are taken and what tensors show
    (family, learned tokens, kind of ray embedding) is read off them. Sizes of the CLIP towers are always read off.

    Raises:
        InputError: the file is no released checkpoint, or the YAML cannot be read or is of another model.
    """
    network = {} if yaml_path is None else _network_options(yaml_path)
    side = network.get("latent_resolution", _LATENT_SIDE)
    if type(side) is not int or side < 1:
        raise InputError(f"{yaml_path}: latent_resolution is {side!r:.60}; it must be a whole number above 0")
    adapter = _adapter_from_tensors(tensors, side, source)
    adapter.update({ours: network[name] for name, ours in _TRAINED_OPTIONS.items() if name in network})
    text = _text_options(tensors, source)
    config = full_size_config(_family(tensors, text["hidden_size"], source))
    config.image_encoder = clip.openclip_vision_options(tensors, IMAGE_PREFIX, source)
    config.text_encoder, config.text_tokens = text, text["max_position_embeddings"]
    if yaml_path is not None:
        adapter["ray_embedding"] = _ray_kind(yaml_path)
        if (unet := _mapping(network, "sd_config", yaml_path).get("params")) is not None:
            config.unet = _convert(unet_options_from_ldm, unet, "sd_config", yaml_path)
        if (vae := _section(yaml_path, "first_stage_config", "params", "ddconfig")) is not None:
            config.vae.update(_convert(vae_options_from_ldm, vae, "ddconfig", yaml_path))
            config.image_size = config.vae["sample_size"]
    options = _convert(NVSAdapterConfig.from_dict, adapter, "network_config", yaml_path or Path(source))
    config.adapter = options.to_dict()
    return config


def config_beside(checkpoint: Path) -> Optional[Path]:
    """The YAML of a checkpoint by the released naming (``x_step_000.ckpt`` goes with ``x.yaml``), if it is there."""
    stem = re.sub(r"_step_\d+$", "", checkpoint.stem)
    places = [checkpoint.with_name(f"{name}.yaml") for name in (stem, checkpoint.stem)]
    return next((place for place in places if place.is_file()), None)


def read_yaml(path: Path) -> Dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the checkpoint's YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not YAML ({one_line(error)}); download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no settings; give the checkpoint's YAML file")
    return values


def _section(path: Path, *names: str) -> Any:
    value: Any = read_yaml(path)
    for name in ("model", "params", *names):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _network_options(path: Path) -> Dict[str, Any]:
    options = _section(path, "network_config", "params")
    if not isinstance(options, dict):
        raise InputError(f"{path}: has no model.params.network_config; give the checkpoint's YAML file")
    return options


def _convert(convert: Callable[[Dict[str, Any]], Any], options: Dict[str, Any], name: str, path: Path) -> Any:
    try:
        return convert(options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path}: {name} lacks {error}; give the checkpoint's YAML file") from error
    except (TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{path}: {name} is damaged ({one_line(error)}); give the checkpoint's YAML file") from error


def _ray_kind(path: Path) -> str:
    for conditioner in _list(_section(path, "conditioner_config", "params", "conditioners_config")):
        for embedder in _list(_mapping(conditioner, "params", path).get("emb_models")):
            options = _mapping(embedder, "params", path)
            target = str(embedder.get("target", ""))
            if target.endswith("ExtrinsicEmbedder"):
                return "extrinsic"
            if target.endswith("RayPosConditionEmbedder"):
                return "plucker" if options.get("use_plucker", True) else "rayo_rayd"
    return "plucker"


def _mapping(options: Any, name: str, path: Path) -> Dict[str, Any]:
    """The settings called `name`, none where there are none."""
    value = options.get(name, {}) if isinstance(options, dict) else None
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} holds no settings; give the checkpoint's YAML file")
    return value


def _list(value: Any) -> List[Any]:
    return value if isinstance(value, list) else []


def _family(tensors: Mapping[str, Tensor], width: int, source: str) -> str:
    linear = f"{UNET_PREFIX}unet.input_blocks.1.1.proj_in.weight"
    # Sizes that are neither family's come from the YAML file; then the kind of projection decides on the name.
    kind = "sd21" if linear in tensors and tensors[linear].ndim == 2 else "sd15"
    return family_of_width(width) or kind


def _text_options(tensors: Mapping[str, Tensor], source: str) -> Dict[str, Any]:
    if any(key.startswith(f"{TEXT_PREFIX}transformer.text_model.") for key in tensors):
        return clip.huggingface_text_options(tensors, f"{TEXT_PREFIX}transformer.", source)
    return clip.openclip_text_options(tensors, f"{TEXT_PREFIX}model.", source)


def _adapter_from_tensors(tensors: Mapping[str, Tensor], side: int, source: str) -> Dict[str, Any]:
    rays = shape_of(tensors, f"{UNET_PREFIX}pe_blocks.0.weight", 4, source)[1]
    names = [name for name in tensors if ".transformer_blocks." in name]
    tokens = max((shape_of(tensors, name, 3, source)[1] for name in names if name.endswith(".support_emb")), default=0)
    joint = any(".query_attn." in name for name in names)
    return {
        "ray_embedding": "extrinsic" if rays == 16 * 31 else "plucker",
        "image_attn_mode": "query_only" if any(".image_attn_module." in name for name in names) else None,
        "query_composer_mode": "learnable_emb" if tokens else "all_to_all" if joint else None,
        "query_emb_scale": tokens / side**2 if tokens else 1.0,
        "latent_resolution": side,
    }
