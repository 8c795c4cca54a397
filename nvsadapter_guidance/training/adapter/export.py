"""From a training checkpoint to weights that `load_model` reads."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Dict

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvsadapter_guidance.adapter import CONFIG_NAME, WEIGHTS_NAME
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints.adapter_folder import write_model_config
from nvsadapter_guidance.checkpoints.families import FAMILIES
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModelConfig
from nvsadapter_guidance.training.adapter.config import ModelOptions
from nvsadapter_guidance.training.adapter.module import FORMAT
from nvsadapter_guidance.training.adapter.network import build_model

PREFIX = "adapter."


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """A checkpoint of a run, its tensors mapped from the file.

    Raises:
        InputError: it is missing, damaged, or of something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a file of a run's checkpoints/") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is no whole checkpoint of adapter training ({cause}); take another one") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: is no checkpoint of adapter training; give a file of checkpoints/")
    return checkpoint


def network_tensors(checkpoint: Dict[str, Any], use_ema: bool) -> Dict[str, Tensor]:
    """The network's tensors that a checkpoint holds; of those that were trained the average, when `use_ema`."""
    tensors = dict(checkpoint["state_dict"])
    if use_ema:
        tensors.update(checkpoint["ema"]["tensors"])
    return tensors


def export_checkpoint(path: Path, output: Path, use_ema: bool = True) -> Path:
    """Write the weights of a checkpoint in the layout that fits what was trained.

    An adapter on a frozen Stable Diffusion becomes an adapter folder; together with a fine-tuned base it becomes a
    saved pipeline, and on another base a folder in our model layout (eight bits).

    Args:
        use_ema: the moving average instead of the last weights.

    Returns:
        `output`.

    Raises:
        InputError: the checkpoint cannot be read, its base is not found, or the folder cannot be written.
    """
    checkpoint = read_checkpoint(path)
    options = ModelOptions(**checkpoint["config"]["model"])
    tensors = network_tensors(checkpoint, use_ema)
    try:
        scratch = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        if options.base in FAMILIES and not options.full_finetune:
            _write_adapter(scratch, tensors, NVSModelConfig(**checkpoint["model_config"]), path.name, use_ema)
        else:
            _write_model(scratch, tensors, options, checkpoint["config"]["seed"])
        if output.exists():
            shutil.rmtree(output)
        os.replace(scratch, output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); free some space") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output


def _write_adapter(
    folder: Path, tensors: Dict[str, Tensor], config: NVSModelConfig, source: str, use_ema: bool
) -> None:
    own = {name.removeprefix(PREFIX): value.contiguous() for name, value in tensors.items() if name.startswith(PREFIX)}
    save_file(own, folder / WEIGHTS_NAME, {"average": str(use_ema).lower(), "source": source})
    options = NVSAdapterConfig.from_dict(config.adapter)
    (folder / CONFIG_NAME).write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
    write_model_config(folder, config)


def _write_model(folder: Path, tensors: Dict[str, Tensor], options: ModelOptions, seed: int) -> None:
    from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline

    model = build_model(options, seed)
    model.network.controlnet = None
    model.network.load_state_dict(tensors, strict=False)
    if options.base in FAMILIES:
        NVSAdapterPipeline.from_model(model).save_pretrained(folder)
    else:
        model.save(folder)
