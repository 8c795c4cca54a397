"""A model without memory, and the files that fill it: every tensor is assigned, none is copied."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from nvsadapter_guidance.checkpoints.slots import Slots, take
from nvsadapter_guidance.encoders import PromptEncoder
from nvsadapter_guidance.model import NVSModel, fill_position_ids
from nvsadapter_guidance.model_config import NVSModelConfig, building, check_config

MODEL, TEXT = "model.", "text_encoder."
"""Prefixes of a blueprint's tensors."""
UNET, ADAPTER = f"{MODEL}network.unet.", f"{MODEL}network.adapter."
VAE, IMAGE = f"{MODEL}vae.", f"{MODEL}image_encoder."
_NO_TOWER = {"num_hidden_layers": 0}
"""Where only an adapter or an image tower is looked at."""
OnBytes = Callable[[int], None]


class Blueprint(nn.Module):
    """A model and the text tower of its empty prompt, on the meta device until `fill`.

    Args:
        source: where the configuration is from, for messages.

    Raises:
        InputError: the configuration is of no model that can be built.
    """

    def __init__(self, config: NVSModelConfig, source: str = "model configuration") -> None:
        super().__init__()
        check_config(config, source)
        with building(source):
            self.model = NVSModel.blank(config)
            with torch.device("meta"):
                self.text_encoder = CLIPTextModel(CLIPTextConfig(**(config.text_encoder or _NO_TOWER)))
        fill_position_ids(self.text_encoder)


@dataclass(frozen=True)
class Part:
    """A file, or several of one layout, that fill some tensors of a blueprint."""

    tensors: Mapping[str, Tensor]
    slots: Slots
    """The blueprint's names to the file's."""
    source: str
    """What to call the file in messages."""
    surplus: Collection[str] = ()
    """Further names that the file may hold."""


def fill(
    blueprint: Blueprint, parts: Sequence[Part], tokenizer: Optional[str] = None, on_bytes: Optional[OnBytes] = None
) -> NVSModel:
    """Give a blueprint its weights, mapped from the files in the precision they have there, and the prompt's tokens.

    Raises:
        InputError: names the file and the first tensor that is missing, not known, of another shape or not finite.
    """
    wanted = blueprint.state_dict()
    for part in parts:
        found = take(part.tensors, part.slots, wanted, part.source, part.surplus, on_bytes=on_bytes)
        blueprint.load_state_dict(found, strict=False, assign=True)
        del found
    model = blueprint.model
    blueprint.requires_grad_(False).eval()
    model.prompt_encoder = PromptEncoder(blueprint.text_encoder, tokenizer)
    model.text_context = nn.Parameter(model.prompt_encoder(""), requires_grad=False)
    return model


def check(parts: Sequence[Part], blueprint: Blueprint, on_bytes: Optional[OnBytes] = None) -> None:
    """Look at every tensor as `fill` does, and keep none.

    Raises:
        InputError: as `fill`.
    """
    wanted = blueprint.state_dict()
    for part in parts:
        take(part.tensors, part.slots, wanted, part.source, part.surplus, on_bytes=on_bytes)
