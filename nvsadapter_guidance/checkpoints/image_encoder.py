"""The image encoder in files of its own: OpenCLIP's, or a folder of `transformers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Tuple

from torch import Tensor

from nvsadapter_guidance.checkpoints import clip
from nvsadapter_guidance.checkpoints.families import IMAGE_ENCODER_FILES
from nvsadapter_guidance.checkpoints.parts import IMAGE, Blueprint, Part
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX
from nvsadapter_guidance.checkpoints.slots import Slot, prefixed
from nvsadapter_guidance.checkpoints.stable_diffusion import component, find_component
from nvsadapter_guidance.errors import InputError

_OPENCLIP_REST = ("transformer.", *clip.OPENCLIP_VISION_SURPLUS)
_HUGGINGFACE_REST = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


def is_image_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Whether names are those of a CLIP model with an image tower."""
    return "visual.conv1.weight" in tensors or "visual_projection.weight" in tensors


class ImageEncoder:
    """An opened CLIP image tower.

    Args:
        path: an OpenCLIP file, a released checkpoint (its tower is taken), or a folder of `transformers`; folders of
            the hub that hold both layouts are read in the latter.

    Raises:
        InputError: it is neither, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.prefix = path, ""
        if path.is_dir():
            loose = next((path / name for name in IMAGE_ENCODER_FILES if (path / name).is_file()), None)
            self.file = TensorFile(loose) if loose and not find_component(path) else component(path)
        else:
            self.file = TensorFile(path)
        if f"{IMAGE_PREFIX}visual.conv1.weight" in self.file:
            self.prefix = IMAGE_PREFIX
        self.openclip = f"{self.prefix}visual.conv1.weight" in self.file
        if not self.openclip and "visual_projection.weight" not in self.file:
            raise InputError(f"{self.file.path}: is no CLIP image encoder; give OpenCLIP ViT-H/14 or its folder")

    def options(self) -> Dict[str, Any]:
        """Arguments of `CLIPVisionConfig`."""
        if self.openclip:
            return clip.openclip_vision_options(self.file, self.prefix, str(self.file.path))
        return clip.huggingface_vision_options(self.file, str(self.file.path))

    def part(self, blueprint: Blueprint) -> Part:
        """The image tower of a blueprint."""
        encoder = blueprint.model.image_encoder
        rest: Tuple[str, ...]
        if self.openclip:
            slots = prefixed(clip.openclip_vision_slots(encoder), IMAGE, self.prefix)
            rest = _OPENCLIP_REST
        else:
            slots = prefixed({name: Slot(name) for name in encoder.state_dict()}, IMAGE)
            rest = _HUGGINGFACE_REST
        if self.prefix:  # the rest of a released checkpoint has been, or will be, looked at elsewhere
            surplus = {key for key in self.file if not key.startswith(f"{self.prefix}visual.")}
        else:
            surplus = {key for key in self.file if key.startswith(rest)}
        return Part(self.file, slots, str(self.file.path), surplus)
