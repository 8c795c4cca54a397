"""Which weights to use, and what to say when they are missing."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nvsadapter_guidance.cameras import with_pose_convention
from nvsadapter_guidance.checkpoints.adapter_folder import adapter_config, adapter_folder
from nvsadapter_guidance.checkpoints.loading import load_adapter, load_released
from nvsadapter_guidance.checkpoints.parts import OnBytes
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.released_config import config_beside, released_config
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, MINI_MODEL, NVSModel, NVSModelConfig, read_config
from nvsadapter_guidance.saved_pipeline import holds_pipeline, saved_config
from nvsadapter_guidance.weight_files import (
    RELEASED_CHECKPOINT,
    RELEASED_CONFIG,
    RELEASED_SIZE,
    WEIGHT_FILES,
    checkpoint_folders,
    find_weight_file,
    locate,
)

KEYWORDS = ("auto", "mini", "released")
"""What may stand in place of a path, see `load_model`."""


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
        return WeightsChoice(saved_config(path).family, path, f"saved pipeline {path}")
    if adapter_folder(path) is not None:
        return WeightsChoice("released", path, f"adapter {path} with its base model")
    if path.is_file():
        return WeightsChoice("released", path, f"released checkpoint {path}")
    known = next((file.name for file in WEIGHT_FILES if file.name == path.name), None)
    if known is not None:
        raise InputError(f"{pretrained}: no such file; get it with: 3drec weights download {known}")
    raise InputError(
        f"weights: none at '{pretrained}'; use auto, mini, released, a model folder with {CONFIG_NAME}, a folder with "
        "an adapter, or a checkpoint file"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether weights are a released checkpoint's, which has a YAML file and both raw and averaged weights."""
    return path.is_file() and adapter_folder(path) is None


def model_config(path: Path, config: str | None = None) -> NVSModelConfig:
    """The configuration of the weights at a path of :func:`choose_weights`; no tensor is read.

    Args:
        config: as for `load_model`.

    Raises:
        InputError: a file is damaged or of another model.
    """
    if (path / CONFIG_NAME).is_file():
        return read_config(path / CONFIG_NAME)
    if holds_pipeline(path):
        return saved_config(path)
    if (folder := adapter_folder(path)) is not None:
        return adapter_config(folder)
    return released_config(TensorFile(path), str(path), config_beside(path) if config is None else Path(config))


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
            f"weights: the released ones are not in {folders} or the Hugging Face cache; "
            f"needed are {missing}; get them with: {download_commands()}"
        )
    reason = f"embedded mini model; no {RELEASED_CHECKPOINT} found, get it with: {download_commands()}"
    return WeightsChoice("mini", MINI_MODEL, reason)
