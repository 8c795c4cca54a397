"""A plain ControlNet beside the adapted UNet (Zhang et al. 2023): its residuals are added on support and query rows.

The control model has no adapter layers. It sees the same latents, timesteps and text tokens as the UNet, and one
control image per view, the support view included; control images are never dropped for unconditional samples.
"""

from typing import Any, List, Optional, Tuple

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor

from nvsadapter_guidance.errors import InputError

Residuals = Tuple[List[Tensor], Tensor]


def build_controlnet(
    unet: UNet2DConditionModel,
    hint_channels: int = 3,
    num_heads: Optional[int] = None,
    use_linear_projection: Optional[bool] = None,
) -> ControlNetModel:
    """A fresh ControlNet that fits `unet`: same levels, attention and text width; output layers zero.

    Args:
        hint_channels: channels of the control image, whose sides are 8 times the latents'.
        num_heads: attention heads at every level; None: as in the UNet.
        use_linear_projection: linear or 1x1 convolution projections; None: as in the UNet.

    Raises:
        InputError: the UNet's levels have different numbers of layers, which ControlNet classes do not support.
    """
    config: Any = unet.config
    layers = config.layers_per_block
    if not isinstance(layers, int):
        if len(set(layers)) != 1:
            raise InputError(f"unet: layers_per_block {layers} differ between levels; a ControlNet needs one number")
        layers = layers[0]
    linear = config.use_linear_projection if use_linear_projection is None else use_linear_projection
    return ControlNetModel(
        in_channels=config.in_channels,
        conditioning_channels=hint_channels,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        down_block_types=config.down_block_types,
        mid_block_type=config.mid_block_type,
        block_out_channels=config.block_out_channels,
        layers_per_block=layers,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        cross_attention_dim=config.cross_attention_dim,
        transformer_layers_per_block=config.transformer_layers_per_block,
        attention_head_dim=config.attention_head_dim if num_heads is None else num_heads,
        use_linear_projection=linear,
    )


def control_residuals(
    controlnet: ControlNetModel,
    latents: Float[Tensor, "rows c h w"],
    timesteps: Shaped[Tensor, "rows"],
    text: Float[Tensor, "rows tokens dim"],
    images: Float[Tensor, "rows hint_channels height width"],
    scale: float = 1.0,
) -> Residuals:
    """What is added to every skip connection and to the middle block's output.

    Args:
        images: control images in the rows' order, height and width 8 times the latents'.
        scale: factor on all residuals; 1 as released.
    """
    down, middle = controlnet(
        latents,
        timesteps,
        encoder_hidden_states=text,
        controlnet_cond=images,
        conditioning_scale=scale,
        return_dict=False,
    )
    return list(down), middle
