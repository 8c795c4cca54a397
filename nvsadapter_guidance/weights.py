"""Which weights to use, and what to say when they are missing."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, MINI_MODEL

log = logging.getLogger(__name__)

RELEASED_CHECKPOINT = "base_query_4_step_200000.ckpt"
RELEASED_CONFIG = "base_query_4.yaml"
RELEASED_URL = "https://twg.kakaocdn.net/brainrepo/models/nvsadapter"
RELEASED_SIZE = "about 10 GB"
"""Sum of the float32 tensors: UNet, adapter and its average, autoencoder, both OpenCLIP towers."""


@dataclass
class WeightsChoice:
    """Outcome of :func:`choose_weights`."""

    family: str
    """``mini`` (a folder in our own layout) or ``released``."""
    path: Path
    reason: str
    """One line for people."""


def checkpoint_folders() -> list[Path]:
    """Where released weights are looked for: ``THREEDREC_CHECKPOINTS``, ``./checkpoints``, ``../checkpoints``."""
    given = os.environ.get("THREEDREC_CHECKPOINTS")
    return ([Path(given)] if given else []) + [Path("checkpoints"), Path("../checkpoints")]


def find_released() -> Path | None:
    """The released checkpoint, if a checkpoints folder or the Hugging Face cache holds it."""
    for folder in checkpoint_folders():
        if (folder / RELEASED_CHECKPOINT).is_file():
            return folder / RELEASED_CHECKPOINT
    hub = Path(os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"))
    return next(iter(sorted(hub.expanduser().glob(f"models--*/snapshots/*/{RELEASED_CHECKPOINT}"))), None)


def download_commands() -> str:
    """The commands that fetch the released weights, on one line."""
    return " && ".join(
        ["mkdir -p checkpoints"]
        + [f"wget -c {RELEASED_URL}/{name} -O checkpoints/{name}" for name in (RELEASED_CHECKPOINT, RELEASED_CONFIG)]
    )


def choose_weights(pretrained: str) -> WeightsChoice:
    """Decide what ``pretrained`` (``auto``, ``mini``, ``released``, or a path) leads to.

    Raises:
        InputError: released weights were asked for and are missing, or a path leads nowhere.
    """
    if pretrained == "mini":
        return WeightsChoice("mini", MINI_MODEL, "embedded mini model, as asked")
    if pretrained in ("auto", "released"):
        return _choose_released(required=pretrained == "released")
    path = Path(pretrained)
    if (path / CONFIG_NAME).is_file():
        return WeightsChoice("mini", path, f"model folder {path}")
    if path.is_file():
        return WeightsChoice("released", path, f"released checkpoint {path}")
    raise InputError(
        f"system.guidance.pretrained: no weights at '{pretrained}'; use auto, mini, released, a model folder with "
        f"{CONFIG_NAME}, or a checkpoint file"
    )


def _choose_released(required: bool) -> WeightsChoice:
    found = find_released()
    if found is not None and required:
        return WeightsChoice("released", found, f"released weights {found}")
    if found is not None:
        reason = f"embedded mini model; {found} is there, but this version cannot load released weights yet"
        return WeightsChoice("mini", MINI_MODEL, reason)
    missing = f"{RELEASED_CHECKPOINT} ({RELEASED_SIZE}) and {RELEASED_CONFIG} (a few kB)"
    if required:
        folders = ", ".join(str(folder) for folder in checkpoint_folders())
        raise InputError(
            f"system.guidance.pretrained: released weights not found in {folders} or the Hugging Face cache; "
            f"needed are {missing}; get them with: {download_commands()}"
        )
    reason = f"embedded mini model; no {RELEASED_CHECKPOINT} found, get it with: {download_commands()}"
    return WeightsChoice("mini", MINI_MODEL, reason)
