"""The adapter as a component of a diffusers pipeline, with files of its own."""

from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from nvsadapter_guidance.adapter import NVSAdapter, NVSAdapterConfig
from nvsadapter_guidance.model import NVSModel


class AdapterModel(ModelMixin, ConfigMixin):
    """An adapter's layers, and the text tokens that every view is given.

    The UNet is a component of its own: ``AdapterModel(...).adapter.attach(unet)`` joins them.

    Args:
        adapter_config: arguments of `NVSAdapterConfig`.
        unet_config: configuration of the UNet it is for, which gives names and widths of its blocks.
        text_tokens: how many tokens stand in place of text.
    """

    # Ray embeddings hold frequencies that half precision cannot.
    _keep_in_fp32_modules = ["ray_convs"]

    @register_to_config
    def __init__(self, adapter_config: dict[str, Any], unet_config: dict[str, Any], text_tokens: int) -> None:
        super().__init__()
        with torch.device("meta"):
            blueprint = UNet2DConditionModel.from_config(unet_config)
        self.adapter = NVSAdapter(NVSAdapterConfig.from_dict(adapter_config), blueprint)
        self.text_context = nn.Parameter(torch.zeros(1, text_tokens, unet_config["cross_attention_dim"]))

    @classmethod
    def of(cls, model: NVSModel) -> "AdapterModel":
        """The adapter of a model; tensors are shared, not copied."""
        with torch.device("meta"):
            component = cls(model.config.adapter, model.config.unet, model.text_context.shape[1])
        component.adapter, component.text_context = model.network.adapter, model.text_context
        return component.eval()
