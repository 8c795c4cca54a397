"""From a name that people give (a path, or a repository of the Hugging Face hub) to files on this machine."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from nvsadapter_guidance.checkpoints.families import FAMILIES, IMAGE_ENCODER_FILES, IMAGE_ENCODER_IDS
from nvsadapter_guidance.checkpoints.stable_diffusion import find_component, is_diffusers_folder
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.weight_files import checkpoint_folders, find_weight_file, hub_cache

BASE_VARIABLE, IMAGE_ENCODER_VARIABLE = "THREEDREC_BASE_MODEL", "THREEDREC_IMAGE_ENCODER"


def resolve(name: str, role: str) -> Path:
    """A path as it is, or the folder of a hub repository that was downloaded before.

    Args:
        role: what the name is of, for messages.

    Raises:
        InputError: there is nothing of that name.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    cached = _cached(name)
    if cached is None:
        raise InputError(
            f"{role}: nothing at '{name}', neither a path nor a downloaded hub repository; "
            f"for the latter run: hf download {name}"
        )
    return cached


def find_base(family: str, given: str | None = None) -> Path:
    """The base model: as given, from ``THREEDREC_BASE_MODEL``, from a checkpoints folder, or from the hub's cache.

    Raises:
        InputError: it is nowhere; says what to download.
    """
    named = given or os.environ.get(BASE_VARIABLE)
    if named:
        return resolve(named, "base model")
    about = FAMILIES[family]
    found = next((path for path in map(find_weight_file, about.files) if path is not None), None)
    found = found or next((path for path in _downloaded(about.hub_ids) if is_diffusers_folder(path)), None)
    if found is None:
        raise InputError(
            f"base model: {about.title} not found in {_places()}; run: 3drec weights download {family} "
            f"(or set {BASE_VARIABLE} to a file, a diffusers folder or a hub id)"
        )
    return found


def find_image_encoder(given: str | None = None, beside: Sequence[Path] = ()) -> Path:
    """The image encoder: as given, from ``THREEDREC_IMAGE_ENCODER``, beside other weights, or as `find_base`.

    Args:
        beside: folders whose ``image_encoder`` is looked at, and files that hold one.

    Raises:
        InputError: it is nowhere; says what to download.
    """
    named = given or os.environ.get(IMAGE_ENCODER_VARIABLE)
    if named:
        return resolve(named, "image encoder")
    for folder in beside:
        if find_component(folder / "image_encoder") is not None:
            return folder / "image_encoder"
    loose = [folder / name for folder in checkpoint_folders() for name in IMAGE_ENCODER_FILES]
    found = next((path for path in loose if path.is_file()), None)
    found = found or next(iter(_downloaded(IMAGE_ENCODER_IDS)), None)
    if found is None:
        raise InputError(
            f"image encoder: OpenCLIP ViT-H/14 not found in {_places()}; run: 3drec weights download clip "
            f"(or set {IMAGE_ENCODER_VARIABLE} to a file, a folder or a hub id)"
        )
    return found


def _downloaded(hub_ids: Sequence[str]) -> list[Path]:
    return [path for path in map(_cached, hub_ids) if path is not None]


def _cached(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, cache_dir=hub_cache(), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _places() -> str:
    return f"{', '.join(str(folder) for folder in checkpoint_folders())} or the Hugging Face cache"
