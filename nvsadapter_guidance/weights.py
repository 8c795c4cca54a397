"""Which weights to use, and what to say when they are missing."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nvsadapter_guidance.cameras import with_pose_convention
from nvsadapter_guidance.checkpoints.adapter_folder import adapter_folder
from nvsadapter_guidance.checkpoints.loading import load_adapter, load_released
from nvsadapter_guidance.checkpoints.parts import OnBytes
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, MINI_MODEL, NVSModel
from nvsadapter_guidance.saved_pipeline import MODEL_INDEX, holds_pipeline
from nvsadapter_guidance.weight_files import (
    RELEASED_CHECKPOINT,
    RELEASED_CONFIG,
    RELEASED_SIZE,
    WEIGHT_FILES,
    checkpoint_folders,
    find_weight_file,
    locate,
)


@dataclass
class WeightsChoice:
    """Outcome of :func:`choose_weights`."""

    family: str
    """``mini`` (a folder in our own layout) or ``released``."""
    path: Path
    reason: str
    """One line for people."""


def find_released() -> Path | None:
    """The released checkpoint, if a checkpoints folder or the Hugging Face cache holds it."""
    return find_weight_file(RELEASED_CHECKPOINT)


def download_commands() -> str:
    """The command that fetches the released weights."""
    return "3drec weights download released"


def choose_weights(pretrained: str) -> WeightsChoice:
    """Decide what ``pretrained`` (``auto``, ``mini``, ``released``, or a path) leads to.

    Raises:
        InputError: released weights were asked for and are missing, or a path leads nowhere.
    """
    if pretrained == "mini":
        return WeightsChoice("mini", MINI_MODEL, "embedded mini model, as asked")
    if pretrained in ("auto", "released"):
        return _choose_released(required=pretrained == "released")
    path = locate(pretrained)
    if (path / CONFIG_NAME).is_file():
        return WeightsChoice("mini", path, f"model folder {path}")
    if holds_pipeline(path):
        return WeightsChoice(_family_of_pipeline(path), path, f"saved pipeline {path}")
    if adapter_folder(path) is not None:
        return WeightsChoice("released", path, f"adapter {path} with its base model")
    if path.is_file():
        return WeightsChoice("released", path, f"released checkpoint {path}")
    known = next((file.name for file in WEIGHT_FILES if file.name == path.name), None)
    if known is not None:
        raise InputError(f"{pretrained}: no such file; get it with: 3drec weights download {known}")
    raise InputError(
        f"system.guidance.pretrained: no weights at '{pretrained}'; use auto, mini, released, a model folder with "
        f"{CONFIG_NAME}, a folder with an adapter, or a checkpoint file"
    )


def load_model(
    pretrained: str = "auto",
    *,
    config: str | None = None,
    use_ema: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pose_convention: str | None = None,
    base: str | None = None,
    image_encoder: str | None = None,
    on_bytes: OnBytes | None = None,
) -> NVSModel:
    """Find and load a model, ready for sampling and score distillation.

    Weights are mapped from their files, so on the CPU in float32 they take no memory of their own, and on the way to
    a GPU or to half precision each is held once.

    Args:
        pretrained: ``auto``, ``mini``, ``released``, or a path: released checkpoint, model folder, folder of an
            adapter of ours (also inside a diffusers folder), or saved `NVSAdapterPipeline`.
        config: YAML file of a released checkpoint; None for the one beside it.
        use_ema: take the moving average of a released checkpoint instead of its raw weights.
        dtype: precision of network and image encoder (`NVSModel.to`); None for float32.
        pose_convention: ``training`` or ``released-sampling`` (`cameras.with_pose_convention`); None for training.
        base: of an adapter of ours: file, diffusers folder or hub id of its base model; None to look for it.
        image_encoder: of an adapter of ours: the same of OpenCLIP ViT-H/14.
        on_bytes: told of the size of every tensor that was looked at, for progress.

    Raises:
        InputError: the weights are missing, damaged, malicious or of another model; one line says what to do.
    """
    choice = choose_weights(pretrained)
    if choice.family == "mini" and not holds_pipeline(choice.path):
        model = NVSModel.load(choice.path)
    elif holds_pipeline(choice.path):
        model = _load_pipeline(choice.path)
    elif (folder := adapter_folder(choice.path)) is not None:
        model = load_adapter(folder, base, image_encoder, on_bytes)
    else:
        model = load_released(choice.path, None if config is None else Path(config), use_ema, on_bytes)
    if pose_convention is not None:
        model.convention = with_pose_convention(model.convention, pose_convention)
    return model.to(device=torch.device(device), dtype=dtype or torch.float32)


def _family_of_pipeline(path: Path) -> str:
    """``mini`` or ``released``, by what its weights were trained to see in place of an unconditional support view."""
    config = json.loads((path / MODEL_INDEX).read_text(encoding="utf-8")).get("model_config", {})
    return "released" if config.get("unconditional_support") == "noise" else "mini"


def _load_pipeline(path: Path) -> NVSModel:
    from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline  # it imports this module

    return NVSAdapterPipeline.from_pretrained(path).model


def _choose_released(required: bool) -> WeightsChoice:
    found = find_released()
    if found is not None:
        return WeightsChoice("released", found, f"released weights {found}")
    missing = f"{RELEASED_CHECKPOINT} ({RELEASED_SIZE}) and {RELEASED_CONFIG} (a few kB)"
    if required:
        folders = ", ".join(str(folder) for folder in checkpoint_folders())
        raise InputError(
            f"system.guidance.pretrained: released weights not found in {folders} or the Hugging Face cache; "
            f"needed are {missing}; get them with: {download_commands()}"
        )
    reason = f"embedded mini model; no {RELEASED_CHECKPOINT} found, get it with: {download_commands()}"
    return WeightsChoice("mini", MINI_MODEL, reason)
