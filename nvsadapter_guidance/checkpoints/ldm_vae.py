"""Names of autoencoder weights in LDM files (``first_stage_model.*``) and in diffusers' ``AutoencoderKL``."""

from typing import Any, Dict

from diffusers import AutoencoderKL

from nvsadapter_guidance.checkpoints.slots import Slot, Slots

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""What diffusers called the same layers before its version 0.18; many folders on the hub still do."""


def vae_slots(vae: AutoencoderKL) -> Slots:
    """Our names to places in an LDM file, below ``first_stage_model.``."""
    levels = len(vae.config.block_out_channels)
    return {name: _slot(name, levels) for name in vae.state_dict()}


def old_diffusers_slots(vae: AutoencoderKL) -> Slots:
    """Our names to places in a diffusers file whose attention layers have their old names."""
    slots = {}
    for name in vae.state_dict():
        slots[name] = Slot(name)
        for new, old in _OLD_ATTENTION.items():
            if f".attentions.0.{new}." in name:
                slots[name] = Slot(name.replace(f".{new}.", f".{old}."), pointwise=name.endswith("weight"))
    return slots


def vae_options_from_ldm(options: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of `AutoencoderKL` for the ``ddconfig`` of an LDM autoencoder."""
    channels = [options["ch"] * multiplier for multiplier in options["ch_mult"]]
    return {
        "in_channels": options["in_channels"],
        "out_channels": options["out_ch"],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": options["num_res_blocks"],
        "latent_channels": options["z_channels"],
        "sample_size": options["resolution"],
    }


def _slot(name: str, levels: int) -> Slot:
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return Slot(name)
    rest = rest.replace("conv_norm_out.", "norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
    if rest.startswith("mid_block.attentions.0."):
        layer = rest.removeprefix("mid_block.attentions.0.")
        ours = next(key for key in _ATTENTION if layer.startswith(f"{key}."))
        pointwise = ours != "group_norm" and layer.endswith(".weight")
        return Slot(f"{side}.mid.attn_1.{_ATTENTION[ours]}{layer[len(ours) :]}", pointwise=pointwise)
    parts = rest.split(".")
    if parts[0] == "mid_block":
        return Slot(f"{side}.mid.block_{int(parts[2]) + 1}.{'.'.join(parts[3:])}")
    if parts[0] == "down_blocks":
        return Slot(f"{side}.down.{parts[1]}.{_inside(parts)}")
    if parts[0] == "up_blocks":
        # LDM counts the decoder's levels from the finest one.
        return Slot(f"{side}.up.{levels - 1 - int(parts[1])}.{_inside(parts)}")
    return Slot(f"{side}.{rest}")


def _inside(parts: list[str]) -> str:
    if parts[2] == "resnets":
        return f"block.{parts[3]}.{'.'.join(parts[4:])}"
    kind = "downsample" if parts[2] == "downsamplers" else "upsample"
    return f"{kind}.{'.'.join(parts[4:])}"
