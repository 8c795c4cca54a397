"""What the network is told besides views: text tokens of a prompt, and images as CLIP wants them.

The released model was trained and is used with the empty prompt, whose tokens are known without a vocabulary file.
Stable Diffusion 1 pads prompts with CLIP's end token and reads the last layer; Stable Diffusion 2 pads with token 0
and reads the layer before the last (here the last one of a tower that was loaded without it), both after the tower's
final norm.
"""

import os
from pathlib import Path
from typing import List

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.weight_files import hub_cache

TOKENIZER = "openai/clip-vit-large-patch14"
"""Where the vocabulary of all CLIP text towers used here is published."""
TOKENIZER_VARIABLE = "THREEDREC_TOKENIZER"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_images(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 size size"]:
    """Images in [-1, 1] resized, mapped to [0, 1] and normalised for CLIP's image tower.

    Bicubic with corners aligned and without antialiasing, as the released model was trained; [0, 1] comes after the
    resize, so overshoot is kept.
    """
    resized = F.interpolate(images, (size, size), mode="bicubic", align_corners=True)
    mean, std = (resized.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((resized + 1.0) / 2.0 - mean) / std


class PromptEncoder:
    """A CLIP text tower that turns prompts into context tokens, on the CPU in the dtype of its weights.

    It is no module: its weights stay where they are (mapped from their file) when a model moves to a GPU.

    Args:
        text_model: its config names the padding token.
        tokenizer: folder or hub id of a CLIP tokenizer; None for ``THREEDREC_TOKENIZER`` or the public one.
    """

    def __init__(self, text_model: CLIPTextModel, tokenizer: str | None = None) -> None:
        self.text_model = text_model
        self.tokenizer = tokenizer or os.environ.get(TOKENIZER_VARIABLE) or TOKENIZER

    @torch.no_grad()
    def __call__(self, prompt: str = "") -> Float[Tensor, "1 tokens dim"]:
        """Context tokens of a prompt, float32; words beyond the tower's length are dropped.

        Raises:
            InputError: the prompt is not empty and no tokenizer is found.
        """
        # Files may hold the tower in half precision; its tokens are computed in full precision all the same.
        exact = {name: weight.float() for name, weight in self.text_model.named_parameters()}
        return torch.func.functional_call(self.text_model, exact, (self.token_ids(prompt),)).last_hidden_state

    def token_ids(self, prompt: str) -> Int[Tensor, "1 tokens"]:
        """Begin, words, end, padding.

        Raises:
            InputError: the prompt is not empty and no tokenizer is found.
        """
        config = self.text_model.config
        length = config.max_position_embeddings
        words = self._words(prompt) if prompt.strip() else []
        ids = [config.bos_token_id, *words[: length - 2], config.eos_token_id]
        return torch.tensor([ids + [config.pad_token_id] * (length - len(ids))])

    def _words(self, prompt: str) -> List[int]:
        advice = (
            f"set {TOKENIZER_VARIABLE} to a folder with vocab.json and merges.txt, or use the empty prompt, which "
            "needs none"
        )
        try:
            # From files that are there: without any, transformers makes a tokenizer of two words and says nothing.
            files = [_vocabulary_file(self.tokenizer, name) for name in ("vocab.json", "merges.txt")]
            tokenizer = CLIPTokenizer.from_pretrained(files[0].parent, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"prompt '{prompt}': no CLIP tokenizer at '{self.tokenizer}'; {advice}") from error
        config = self.text_model.config
        words = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
        if words != (config.vocab_size, config.bos_token_id, config.eos_token_id):
            raise InputError(
                f"prompt '{prompt}': the tokenizer at '{self.tokenizer}' has other words ({len(tokenizer)}) than the "
                f"text encoder ({config.vocab_size}); {advice}"
            )
        return tokenizer(prompt, add_special_tokens=False).input_ids

    @classmethod
    def tokenizer_beside(cls, folder: Path) -> str | None:
        """The tokenizer of a diffusers folder, if it has one."""
        return str(folder / "tokenizer") if (folder / "tokenizer" / "vocab.json").is_file() else None


def _vocabulary_file(tokenizer: str, name: str) -> Path:
    """One of a tokenizer's files in a folder or, for a hub id, in the cache or from the hub."""
    folder = Path(tokenizer).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist")
        return folder / name
    return Path(hf_hub_download(tokenizer, name, cache_dir=hub_cache(), local_files_only=not _may_download()))


def _may_download() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("1", "true", "TRUE", "yes", "ON")
