"""CLIP towers in OpenCLIP files and in Hugging Face files, for the `transformers` classes.

Sizes are read off the tensors. OpenCLIP stacks the projections of queries, keys and values, and applies its output
projection from the other side; everything else is only called differently.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Dict, List

from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from nvsadapter_guidance.checkpoints.slots import Slot, Slots, shape_of
from nvsadapter_guidance.errors import InputError

_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_VISION = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_HEAD_WIDTH = {1280: 80}
"""Channels per attention head where they are not 64: the image tower of ViT-H/14."""
_SKIPPED_LAYERS = 1
"""Stable Diffusion 2 reads the text tower before its last layer."""


def openclip_text_slots(model: CLIPTextModel) -> Slots:
    """Our names of a text tower to places in an OpenCLIP file."""
    names = [(name, name.removeprefix("text_model.")) for name in model.state_dict()]
    return {ours: _openclip_slot(bare, _TEXT, "transformer.resblocks.") for ours, bare in names}


def openclip_vision_slots(model: CLIPVisionModelWithProjection) -> Slots:
    """Our names of an image tower to places in an OpenCLIP file."""
    slots = {}
    for name in model.state_dict():
        if name == "visual_projection.weight":
            slots[name] = Slot("visual.proj", transpose=True)
        else:
            slots[name] = _openclip_slot(name, _VISION, "visual.transformer.resblocks.")
    return slots


def openclip_text_surplus(model: CLIPTextModel) -> List[str]:
    """What a text tower of Stable Diffusion 2 holds and does not use: its last layer and the joint projection."""
    layer = f"transformer.resblocks.{model.config.num_hidden_layers}."
    last = [f"{layer}{name}.{kind}" for name in _LAYER.values() for kind in ("weight", "bias")]
    return ["text_projection", "logit_scale", f"{layer}attn.in_proj_weight", f"{layer}attn.in_proj_bias", *last]


OPENCLIP_VISION_SURPLUS = (
    "positional_embedding",
    "text_projection",
    "logit_scale",
    "token_embedding.weight",
    "ln_final.weight",
    "ln_final.bias",
)
"""Remains of the text tower beside the image tower of the released checkpoint."""


def huggingface_text_slots(model: CLIPTextModel, tensors: Mapping[str, Tensor], prefix: str = "") -> Slots:
    """Our names of a text tower to places in the Hugging Face file `tensors`, at `prefix`."""
    root = _text_root(tensors, prefix)
    return {name: Slot(root + name.removeprefix("text_model.")) for name in model.state_dict()}


HUGGINGFACE_TEXT_SURPLUS = ("text_model.embeddings.position_ids", "embeddings.position_ids")
"""A table of positions that old versions of `transformers` wrote."""


def openclip_text_options(tensors: Mapping[str, Tensor], prefix: str, source: str) -> Dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the OpenCLIP text tower at `prefix`, as Stable Diffusion 2 uses it."""
    vocabulary, width = shape_of(tensors, f"{prefix}token_embedding.weight", 2, source)
    layers = _count_layers(tensors, f"{prefix}transformer.resblocks.")
    return {
        **_text_options(vocabulary, width, layers - _SKIPPED_LAYERS, source),
        "max_position_embeddings": shape_of(tensors, f"{prefix}positional_embedding", 2, source)[0],
        "intermediate_size": shape_of(tensors, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2, source)[0],
        "hidden_act": "gelu",
        "pad_token_id": 0,
    }


def huggingface_text_options(
    tensors: Mapping[str, Tensor], prefix: str, source: str, hidden_act: str = "quick_gelu"
) -> Dict[str, Any]:
    """Arguments of `CLIPTextConfig` for the Hugging Face text tower at `prefix`.

    OpenAI's tower (Stable Diffusion 1) has the activation "quick_gelu" and pads with the end token; OpenCLIP's
    (Stable Diffusion 2, exported without its last layer) has "gelu" and pads with zeros.
    """
    start = _text_root(tensors, prefix)
    vocabulary, width = shape_of(tensors, f"{start}embeddings.token_embedding.weight", 2, source)
    options = _text_options(vocabulary, width, _count_layers(tensors, f"{start}encoder.layers."), source)
    return {
        **options,
        "max_position_embeddings": shape_of(tensors, f"{start}embeddings.position_embedding.weight", 2, source)[0],
        "intermediate_size": shape_of(tensors, f"{start}encoder.layers.0.mlp.fc1.weight", 2, source)[0],
        "hidden_act": hidden_act,
        "pad_token_id": options["eos_token_id"] if hidden_act == "quick_gelu" else 0,
    }


def openclip_vision_options(tensors: Mapping[str, Tensor], prefix: str, source: str) -> Dict[str, Any]:
    """Arguments of `CLIPVisionConfig` for the OpenCLIP image tower at `prefix`."""
    width, _, patch, _ = shape_of(tensors, f"{prefix}visual.conv1.weight", 4, source)
    positions = shape_of(tensors, f"{prefix}visual.positional_embedding", 2, source)[0]
    return _vision_options(
        width,
        patch,
        positions,
        _count_layers(tensors, f"{prefix}visual.transformer.resblocks."),
        shape_of(tensors, f"{prefix}visual.transformer.resblocks.0.mlp.c_fc.weight", 2, source)[0],
        shape_of(tensors, f"{prefix}visual.proj", 2, source)[1],
        source,
    )


def huggingface_vision_options(tensors: Mapping[str, Tensor], source: str) -> Dict[str, Any]:
    """Arguments of `CLIPVisionConfig` for a Hugging Face image tower."""
    start = "vision_model."
    width, _, patch, _ = shape_of(tensors, f"{start}embeddings.patch_embedding.weight", 4, source)
    positions = shape_of(tensors, f"{start}embeddings.position_embedding.weight", 2, source)[0]
    return _vision_options(
        width,
        patch,
        positions,
        _count_layers(tensors, f"{start}encoder.layers."),
        shape_of(tensors, f"{start}encoder.layers.0.mlp.fc1.weight", 2, source)[0],
        shape_of(tensors, "visual_projection.weight", 2, source)[0],
        source,
    )


def _text_root(tensors: Mapping[str, Tensor], prefix: str) -> str:
    # Versions of `transformers` differ in whether the tower is a module inside its model.
    nested = f"{prefix}text_model."
    return nested if any(key.startswith(nested) for key in tensors) else prefix


def _text_options(vocabulary: int, width: int, layers: int, source: str) -> Dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width, source),
        # The last two words of CLIP's vocabulary.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _vision_options(
    width: int, patch: int, positions: int, layers: int, inner: int, projection: int, source: str
) -> Dict[str, Any]:
    side = math.isqrt(positions - 1)
    if side < 1 or side**2 != positions - 1:
        raise InputError(f"{source}: its image tower has {positions} positions, one and a square are needed")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width, source),
        "image_size": patch * side,
        "patch_size": patch,
        "projection_dim": projection,
        "hidden_act": "gelu",
    }


def _heads(width: int, source: str) -> int:
    heads = max(1, width // _HEAD_WIDTH.get(width, 64))
    if width % heads:
        raise InputError(f"{source}: {width} channels cannot be divided into attention heads; give another file")
    return heads


def _count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    # No tower has a hundred layers; names with larger numbers are refused later as not known.
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,2})\.")
    return max((int(match.group(1)) + 1 for match in map(pattern.match, tensors) if match), default=0)


def _openclip_slot(name: str, fixed: Dict[str, str], blocks: str) -> Slot:
    if name in fixed:
        return Slot(fixed[name])
    match = re.match(r"(?:vision_model\.)?encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
    if match is None:
        raise InputError(f"CLIP: tensor '{name}' has no place in an OpenCLIP file; use a CLIP tower")
    layer, module, kind = match.groups()
    if module in _LAYER:
        return Slot(f"{blocks}{layer}.{_LAYER[module]}.{kind}")
    third = ("q", "k", "v").index(module.removeprefix("self_attn.")[0])
    return Slot(f"{blocks}{layer}.attn.in_proj_{kind}", third=third)
