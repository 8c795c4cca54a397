"""The model that is trained: base, fresh adapter, what of it learns, and how much that is."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from diffusers import ControlNetModel
from torch import nn

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints.families import FAMILIES, full_size_config
from nvsadapter_guidance.checkpoints.image_encoder import ImageEncoder
from nvsadapter_guidance.checkpoints.parts import Blueprint, fill
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.slots import Slot, take
from nvsadapter_guidance.checkpoints.sources import find_base, find_image_encoder
from nvsadapter_guidance.checkpoints.stable_diffusion import StableDiffusion
from nvsadapter_guidance.controlnet import build_controlnet
from nvsadapter_guidance.conversion import controlnet_key_map
from nvsadapter_guidance.encoders import PromptEncoder
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.full_size import random_model
from nvsadapter_guidance.model import CONFIG_NAME, MINI_MODEL, NVSModel, NVSModelConfig, read_config
from nvsadapter_guidance.training.adapter.config import ModelOptions
from nvsadapter_guidance.weight_files import locate


def model_config(options: ModelOptions) -> NVSModelConfig:
    """The configuration of base and adapter together; reads no weights.

    Raises:
        InputError: the base is not known, its folder is damaged, or an adapter option is bad.
    """
    if options.base in FAMILIES:
        config = full_size_config(options.base, **options.adapter)
    else:
        config = read_config(_base_folder(options) / CONFIG_NAME)
        given = {**config.adapter, **options.adapter}
        config.adapter = NVSAdapterConfig.from_dict(given, "model.adapter").to_dict()
    if options.controlnet and options.base != "sd15":
        raise InputError(
            f"model.controlnet: published ControlNets are for sd15, the base is {options.base}; add "
            "configs/adapter/sd15.yaml before configs/adapter/controlnet.yaml"
        )
    return config


def blank_model(options: ModelOptions) -> NVSModel:
    """The model without memory (on the meta device), with gradients where training has them; for counting."""
    model = NVSModel.blank(model_config(options))
    if options.controlnet:
        with torch.device("meta"):
            model.network.controlnet = build_controlnet(model.network.unet)
    select_trainable(model, options)
    return model


def build_model(options: ModelOptions, seed: int) -> NVSModel:
    """The model with the base's weights and an adapter that is fresh, or read from `adapter_from`; float32, on the CPU.

    Raises:
        InputError: weights are missing, damaged or of another model; says what to do.
    """
    config = model_config(options)
    if options.random_weights:
        model = random_model(config, seed=seed)
    elif options.base in FAMILIES:
        model = _with_stable_diffusion(options, config)
    else:
        model = _with_model_folder(options, config)
    adapter = model.network.adapter
    if options.adapter_from is None:
        adapter.reset_parameters(torch.Generator().manual_seed(seed))
    else:
        _load_adapter(adapter, locate(options.adapter_from))
    if options.controlnet:
        model.network.controlnet = _controlnet(options, model)
    model.to(dtype=torch.float32)
    select_trainable(model, options)
    if options.gradient_checkpointing:
        model.network.unet.enable_gradient_checkpointing()
    return model


def select_trainable(model: NVSModel, options: ModelOptions) -> None:
    """Switch gradients on for the adapter (its inert layers excepted) and in full fine-tuning for the UNet."""
    model.requires_grad_(False).eval()
    model.network.adapter.requires_grad_(True)
    model.network.adapter.freeze_inert()
    if options.full_finetune:
        model.network.unet.requires_grad_(True)
        if options.adapter.get("imgemb_to_text") or model.config.text_tokens == 1:
            _freeze_text_queries(model)
    model.network.train()


def trainable(model: NVSModel) -> Dict[str, nn.Parameter]:
    """Parameters that learn, by name in the network: first the adapter's, then the base's."""
    named = [(name, value) for name, value in model.network.named_parameters() if value.requires_grad]
    return dict(sorted(named, key=lambda item: not item[0].startswith("adapter.")))


def parameter_groups(model: NVSModel) -> Tuple[List[nn.Parameter], List[nn.Parameter]]:
    """What learns at the full rate (adapter) and what at the base's rate (UNet)."""
    named = trainable(model)
    adapter = [value for name, value in named.items() if name.startswith("adapter.")]
    return adapter, [value for name, value in named.items() if not name.startswith("adapter.")]


def stored_names(model: NVSModel) -> List[str]:
    """Tensors of the network that a checkpoint holds: the whole adapter, and what else learns."""
    learning = set(trainable(model))
    return [name for name in model.network.state_dict() if name.startswith("adapter.") or name in learning]


def _base_folder(options: ModelOptions) -> Path:
    folder = MINI_MODEL if options.base == "mini" else locate(options.base)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"model.base '{options.base}' is unknown; use {', '.join(FAMILIES)}, mini, or a folder with {CONFIG_NAME}"
        )
    return folder


def _with_stable_diffusion(options: ModelOptions, config: NVSModelConfig) -> NVSModel:
    base = StableDiffusion(find_base(options.base, options.base_weights))
    tower = ImageEncoder(find_image_encoder(options.image_encoder, [base.path]))
    width = config.unet["cross_attention_dim"]
    if base.context_width != width:
        raise InputError(f"{base.path}: has text tokens of {base.context_width} channels, {options.base} has {width}")
    config.text_encoder = base.text_options()
    config.text_tokens = config.text_encoder["max_position_embeddings"]
    config.image_encoder = tower.options()
    blueprint = Blueprint(config)
    blueprint.model.network.adapter.to_empty(device="cpu")
    return fill(blueprint, [*base.parts(blueprint), tower.part(blueprint)], PromptEncoder.tokenizer_beside(base.path))


def _with_model_folder(options: ModelOptions, config: NVSModelConfig) -> NVSModel:
    """The folder's autoencoder, image encoder, UNet and constant text, with layers for another adapter."""
    stored = NVSModel.load(_base_folder(options)).state_dict()
    model = NVSModel(config)
    own = {name: value for name, value in stored.items() if not name.startswith("network.adapter.")}
    missing, surplus = model.load_state_dict(own, strict=False)
    wrong = [name for name in missing if not name.startswith("network.adapter.")] + surplus
    if wrong:
        raise InputError(f"model.base '{options.base}': tensor '{wrong[0]}' does not fit its config.json")
    return model


def _load_adapter(adapter: NVSAdapter, folder: Path) -> None:
    from nvsadapter_guidance.adapter import CONFIG_NAME as OPTIONS_NAME
    from nvsadapter_guidance.adapter import WEIGHTS_NAME

    saved = NVSAdapterConfig.load(folder / OPTIONS_NAME)
    for field in dataclasses.fields(NVSAdapterConfig):
        ours, theirs = getattr(adapter.config, field.name), getattr(saved, field.name)
        if ours != theirs and field.name not in ("num_query", "zero_init"):
            raise InputError(
                f"{folder}: was trained with {field.name} {theirs}, model.adapter says {ours}; make them agree"
            )
    file = TensorFile(folder / WEIGHTS_NAME)
    adapter.load_strict({name: file[name] for name in file}, str(file.path))


def _controlnet(options: ModelOptions, model: NVSModel) -> ControlNetModel:
    network = build_controlnet(model.network.unet).eval().requires_grad_(False)
    if options.random_weights:
        return network
    if options.controlnet_weights is None:
        raise InputError("model.controlnet_weights: missing; give control_sd15_depth.pth or a diffusers folder")
    path = locate(options.controlnet_weights)
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.safetensors"))), path / "diffusion_pytorch_model.safetensors")
    file = TensorFile(path)
    slots = _controlnet_slots(network, file)
    # The published files hold the base model too; it is read from its own file.
    surplus = {name for name in file if slots and not name.startswith("control_model.")}
    network.load_state_dict(take(file, slots, network.state_dict(), str(path), surplus))
    return network


def _controlnet_slots(network: ControlNetModel, file: TensorFile) -> Dict[str, Slot]:
    if "controlnet_cond_embedding.conv_in.weight" in file:
        return {name: Slot(name) for name in network.state_dict()}
    prefix = "control_model." if any(name.startswith("control_model.") for name in file) else ""
    return {ours: Slot(prefix + ldm) for ours, ldm in controlnet_key_map(network).items()}


def _freeze_text_queries(model: NVSModel) -> None:
    # Softmax over one token is constant: queries and keys of text attention get no gradient.
    for attention in _text_attentions(model):
        for name in ("to_q", "to_k"):
            layer: Optional[nn.Module] = getattr(attention, name)
            if layer is not None:
                layer.requires_grad_(False)


def _text_attentions(model: NVSModel) -> Iterator[nn.Module]:
    for path in model.network.adapter.block_adapters():
        yield model.network.unet.get_submodule(f"{path}.attn2")
