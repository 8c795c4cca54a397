"""Names of weights in released checkpoints (LDM layout) and in ours (diffusers layout), both ways.

Released keys here are those below ``model.diffusion_model.``: ``unet.*`` holds the UNet and, inside its transformer
blocks, the adapter's layers; ``pe_blocks.*`` the ray convolutions; ``control_model.*`` an optional ControlNet. Names
are derived from the modules at hand, so any depth, number of levels and kind of projection converts; no tensor is
reshaped.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.state import check_tensors

KeyMap = Dict[str, str]

_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ADAPTER_NAMES = {
    "composer.tokens": "support_emb",
    "composer.gather.": "support_query_attn.",
    "composer.spread.": "query_out_attn.",
    "composer.joint.": "query_attn.",
    "view_attn.": "cross_view_attn_module.",
    "image_attn.": "image_attn_module.",
}


@dataclass(frozen=True)
class ReleasedWeights:
    """A released network, taken apart and renamed for our modules."""

    unet: Dict[str, Tensor]
    adapter: Dict[str, Tensor]
    controlnet: Dict[str, Tensor]


def from_released(
    tensors: Mapping[str, Tensor],
    unet: UNet2DConditionModel,
    adapter: NVSAdapter,
    controlnet: Optional[ControlNetModel] = None,
    source: str = "checkpoint",
) -> ReleasedWeights:
    """State dicts for our modules from released tensors (keys below ``model.diffusion_model.``).

    The modules only give names and shapes, so they may lie on the meta device.

    Raises:
        InputError: names `source` and the first tensor that is missing, surplus or of another shape.
    """
    names = released_names(unet, adapter, controlnet)
    modules: Dict[str, Optional[nn.Module]] = {"unet": unet, "adapter": adapter, "controlnet": controlnet}
    wanted = {}
    parts: Dict[str, Dict[str, Tensor]] = {}
    for part, module in modules.items():
        parts[part] = {}
        own = {} if module is None else module.state_dict()
        wanted.update({released: own[ours] for ours, released in names[part].items()})
    check_tensors(tensors, wanted, source)
    for part, mapping in names.items():
        parts[part] = {ours: tensors[released] for ours, released in mapping.items()}
    return ReleasedWeights(**parts)


def to_released(
    unet: UNet2DConditionModel, adapter: NVSAdapter, controlnet: Optional[ControlNetModel] = None
) -> Dict[str, Tensor]:
    """Inverse of `from_released`: all tensors of our modules under released names."""
    names = released_names(unet, adapter, controlnet)
    modules: Dict[str, Optional[nn.Module]] = {"unet": unet, "adapter": adapter, "controlnet": controlnet}
    tensors = {}
    for part, module in modules.items():
        own = {} if module is None else module.state_dict()
        tensors.update({released: own[ours] for ours, released in names[part].items()})
    return tensors


def released_names(
    unet: UNet2DConditionModel, adapter: NVSAdapter, controlnet: Optional[ControlNetModel] = None
) -> Dict[str, KeyMap]:
    """Our names to released names, for the parts "unet", "adapter" and "controlnet"."""
    control = {} if controlnet is None else controlnet_key_map(controlnet)
    return {
        "unet": {ours: f"unet.{ldm}" for ours, ldm in unet_key_map(unet).items()},
        "adapter": adapter_key_map(adapter, unet),
        "controlnet": {ours: f"control_model.{ldm}" for ours, ldm in control.items()},
    }


def unet_key_map(unet: UNet2DConditionModel) -> KeyMap:
    """Diffusers names of a UNet's tensors to the LDM names (``input_blocks.*`` and so on)."""
    modules = {**_encoder_modules(unet.config), **_decoder_modules(unet.config)}
    return {key: _rename(key, modules) for key in unet.state_dict()}


def adapter_key_map(adapter: NVSAdapter, unet: UNet2DConditionModel) -> KeyMap:
    """Our names of an adapter's tensors to released names."""
    modules = {**_encoder_modules(unet.config), **_decoder_modules(unet.config)}
    names = {key: key.replace("ray_convs.", "pe_blocks.") for key in adapter.state_dict()}
    for path in adapter.block_adapters():
        block = f"unet.{_rename(path, modules)}."
        for key in adapter.state_dict():
            if key.startswith(f"{path}."):
                names[key] = block + released_block_name(key[len(path) + 1 :])
    return names


def controlnet_key_map(controlnet: ControlNetModel) -> KeyMap:
    """Diffusers names of a ControlNet's tensors to the names of the original ControlNet."""
    modules = _encoder_modules(controlnet.config)
    hint = controlnet.controlnet_cond_embedding
    modules["controlnet_cond_embedding.conv_in"] = "input_hint_block.0"
    for index in range(len(hint.blocks)):
        modules[f"controlnet_cond_embedding.blocks.{index}"] = f"input_hint_block.{2 + 2 * index}"
    modules["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 + 2 * len(hint.blocks)}"
    for index in range(len(controlnet.controlnet_down_blocks)):
        modules[f"controlnet_down_blocks.{index}"] = f"zero_convs.{index}.0"
    modules["controlnet_mid_block"] = "middle_block_out.0"
    return {key: _rename(key, modules) for key in controlnet.state_dict()}


def released_block_name(key: str) -> str:
    """Released name of an adapter tensor, both relative to its transformer block.

    Raises:
        InputError: the tensor is none of the adapter's.
    """
    for ours, released in _ADAPTER_NAMES.items():
        if key.startswith(ours):
            return (released + key[len(ours) :]).replace("to_out.", "to_out.0.")
    raise InputError(f"adapter: tensor '{key}' has no place in a released checkpoint")


def ema_name(released_key: str) -> str:
    """Name of the moving average of a released adapter tensor (key below ``model.diffusion_model.``)."""
    return "model_ema." + f"diffusion_model.{released_key}".replace(".", "")


def unet_options_from_ldm(options: Mapping[str, Any], sample_size: Optional[int] = None) -> Dict[str, Any]:
    """Arguments of `UNet2DConditionModel` for the options of an LDM UNet (names as in its YAML files).

    Raises:
        InputError: neither heads nor channels per head are given.
    """
    multipliers = list(options["channel_mult"])
    channels = [options["model_channels"] * multiplier for multiplier in multipliers]
    has_attention = [2**level in options["attention_resolutions"] for level in range(len(channels))]
    layers = _per_level(options["num_res_blocks"], len(channels))
    depths = _per_level(options.get("transformer_depth", 1), len(channels))
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)]
    return {
        "sample_size": sample_size,
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": tuple(channels),
        "layers_per_block": _collapse(layers),
        "transformer_layers_per_block": _collapse(depths),
        "cross_attention_dim": options["context_dim"],
        # diffusers calls the number of heads "attention_head_dim" here.
        "attention_head_dim": _collapse([_heads(options, width) for width in channels]),
        "use_linear_projection": bool(options.get("use_linear_in_transformer", False)),
    }


def _heads(options: Mapping[str, Any], width: int) -> int:
    head_channels, heads = options.get("num_head_channels", -1), options.get("num_heads", -1)
    if head_channels not in (-1, None):
        return width // int(head_channels)
    if heads in (-1, None):
        raise InputError("LDM UNet options: give num_heads or num_head_channels")
    return int(heads)


def _collapse(values: Sequence[int]) -> Union[int, Tuple[int, ...]]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _per_level(value: Union[int, Sequence[int]], levels: int) -> List[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def _encoder_modules(config: Any) -> KeyMap:
    """Module prefixes of time embedding, input blocks and middle block, ours to LDM's."""
    levels = len(config.block_out_channels)
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    index = 1
    for level, layers in enumerate(_per_level(config.layers_per_block, levels)):
        for layer in range(layers):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{index}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if level < levels - 1:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    return modules


def _decoder_modules(config: Any) -> KeyMap:
    """Module prefixes of output blocks and the output layer, ours to LDM's."""
    levels = len(config.block_out_channels)
    modules = {"conv_norm_out": "out.0", "conv_out": "out.2"}
    index = 0
    for block, layers in enumerate(reversed(_per_level(config.layers_per_block, levels))):
        for layer in range(layers + 1):
            modules[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{index}.0"
            modules[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        if block < levels - 1:
            position = 2 if "CrossAttn" in config.up_block_types[block] else 1
            modules[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{position}.conv"
    return modules


def _rename(key: str, modules: KeyMap) -> str:
    prefix, rest = _split(key, modules)
    if ".resnets." in prefix:
        name, rest = rest.split(".", 1)
        rest = f"{_RESNET_NAMES[name]}.{rest}"
    return f"{modules[prefix]}.{rest}"


def _split(key: str, modules: KeyMap) -> Tuple[str, str]:
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in modules:
            return prefix, ".".join(parts[end:])
    raise InputError(f"unet: tensor '{key}' has no place in a released checkpoint; use a SD 1.x or 2.x UNet")
