"""Folders that `NVSAdapterPipeline.save_pretrained` writes: telling them from others, and strict checks of them."""

import json
import os
from pathlib import Path

from safetensors import safe_open

from nvsadapter_guidance.adapter_model import AdapterModel
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel, NVSModelConfig

MODEL_INDEX = "model_index.json"
PIPELINE_CLASS = "NVSAdapterPipeline"
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "variant")
"""Options of ``from_pretrained`` that say which files of a repository to fetch, and how."""
_CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")


def saved_config(folder: Path) -> NVSModelConfig:
    """The configuration of a saved pipeline's model.

    Raises:
        InputError: it is missing, damaged or of another version.
    """
    try:
        return NVSModelConfig(**json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["model_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MODEL_INDEX}: model_config is missing or of another version ({error})") from error


def check_tensor_names(folder: Path) -> None:
    """Make sure that every component's file holds exactly its tensors; diffusers draws missing ones at random.

    Raises:
        InputError: names the folder and the first tensor that is missing or surplus.
    """
    blank = NVSModel.blank(saved_config(folder))
    parts = {"vae": blank.vae, "image_encoder": blank.image_encoder, "unet": blank.network.unet}
    for name, module in {**parts, "adapter": AdapterModel.of(blank)}.items():
        files, wanted = sorted((folder / name).glob("*.safetensors")), set(module.state_dict())
        found: set[str] = set()
        for file in files:
            with safe_open(file, "pt") as tensors:
                found.update(tensors.keys())
        for key in sorted(wanted ^ found):
            problem = "missing" if key in wanted else "not known"
            raise InputError(f"{folder / name}: tensor '{key}' is {problem}; save the pipeline again")


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository (``owner/model``) and not of a file or folder."""
    is_file = os.path.exists(name) or name.endswith(_CHECKPOINT_SUFFIXES)
    return name.count("/") == 1 and not is_file and not name.startswith((".", "/", "~"))


def holds_pipeline(folder: Path) -> bool:
    """Whether a folder was written by this class; other pipelines of diffusers hold a base model at most."""
    try:
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") == PIPELINE_CLASS
