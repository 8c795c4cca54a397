"""Released checkpoints to our adapter-only layout, and back."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Dict, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nvsadapter_guidance.adapter import CONFIG_NAME, WEIGHTS_NAME
from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.checkpoints.adapter_folder import (
    MODEL_CONFIG_NAME,
    adapter_config,
    adapter_part,
    write_model_config,
)
from nvsadapter_guidance.checkpoints.parts import ADAPTER, Blueprint
from nvsadapter_guidance.checkpoints.reading import STATE_KEY, TensorFile
from nvsadapter_guidance.checkpoints.released import adapter_slots, is_released, released_part
from nvsadapter_guidance.checkpoints.released_config import config_beside, released_config
from nvsadapter_guidance.checkpoints.slots import give, take
from nvsadapter_guidance.errors import InputError, one_line

Say = Callable[[str], None]


def convert_released(
    source: Path,
    output: Path,
    *,
    config: Optional[Path] = None,
    use_ema: bool = True,
    progress: Optional[Say] = None,
) -> Dict[str, int]:
    """Write the adapter of a released checkpoint alone: options, tensors, and what it was trained with.

    The whole checkpoint is checked on the way. What is left out is known elsewhere: the base model and the image
    encoder. Nothing is rounded, so `to_released` gives the same numbers back.

    Args:
        config: the checkpoint's YAML file; None for the one beside it.
        use_ema: write the adapter's moving average instead of its raw weights.
        progress: told in a few words what is being done.

    Returns:
        Sizes in bytes of the files written, by name.

    Raises:
        InputError: the checkpoint cannot be read (as `load_released`) or the folder cannot be written.
    """
    say = progress or _silent
    file = TensorFile(source)
    if not is_released(file):
        raise InputError(f"{source}: holds no released NVS-Adapter; give base_query_4_step_200000.ckpt")
    config = config or config_beside(source)
    model_config = released_config(file, str(source), config)
    blueprint = Blueprint(model_config, str(config or source))
    say(f"checking {source.name}")
    part = released_part(file, blueprint, str(source), use_ema)
    found = take(part.tensors, part.slots, blueprint.state_dict(), part.source, part.surplus)
    own = {name.removeprefix(ADAPTER): value.contiguous() for name, value in found.items() if name.startswith(ADAPTER)}
    del found
    say(f"writing {output}")

    def write(folder: Path) -> None:
        save_file(own, folder / WEIGHTS_NAME, {"average": str(use_ema).lower(), "source": source.name})
        options = NVSAdapterConfig.from_dict(model_config.adapter)
        (folder / CONFIG_NAME).write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_model_config(folder, model_config)

    names = (WEIGHTS_NAME, MODEL_CONFIG_NAME, CONFIG_NAME)
    _write_together(output, names, write)
    return {name: (output / name).stat().st_size for name in names}


def to_released(folder: Path, base: Path, output: Path) -> int:
    """Put an adapter of ours into a released checkpoint, whose other tensors stay bit by bit as they are.

    The adapter takes the place of the raw weights and, where `base` has one, of the moving average, so that the
    released scripts use it with and without ``--use_ema``.

    Args:
        base: a released checkpoint of the same base model and options.
        output: ``.safetensors``, or ``.ckpt`` as the released scripts read it.

    Returns:
        Size in bytes of the file written.

    Raises:
        InputError: a file cannot be read, does not fit, or cannot be written.
    """
    blueprint = Blueprint(adapter_config(folder), str(folder))
    part = adapter_part(folder, blueprint)
    ours = take(part.tensors, part.slots, blueprint.state_dict(), part.source)
    stored = TensorFile(base)
    if not is_released(stored):
        raise InputError(f"{base}: holds no released NVS-Adapter; give the checkpoint to put the adapter into")
    tensors: Dict[str, Tensor] = {name: stored[name] for name in stored}
    for use_ema in (False, True):
        replaced = give(ours, adapter_slots(blueprint, use_ema))
        present = [name for name in replaced if name in tensors]
        if (present and len(present) != len(replaced)) or not (present or use_ema):
            raise InputError(f"{base}: has other adapter layers than {folder}; give a checkpoint with the same options")
        for name in present:
            if tensors[name].shape != replaced[name].shape:
                raise InputError(f"{base}: tensor '{name}' has another shape than in {folder}; give another checkpoint")
            # The average is a copy of its own: files cannot say that two names share their numbers.
            tensors[name] = replaced[name].clone() if use_ema else replaced[name]
    tensors = {name: value.contiguous() for name, value in tensors.items()}

    def write(scratch: Path) -> None:
        if output.suffix == ".safetensors":
            save_file(tensors, scratch / output.name)
        else:
            torch.save({STATE_KEY: tensors}, scratch / output.name)

    _write_together(output.parent, (output.name,), write)
    return output.stat().st_size


def _write_together(folder: Path, names: tuple[str, ...], write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder and move its files, or nothing, into place."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        (scratch / "new").touch()
        permissions = (scratch / "new").stat().st_mode
        write(scratch)
        for name in names:
            (scratch / name).chmod(permissions)  # safetensors writes for the owner alone
            os.replace(scratch / name, folder / name)
        new = []
    except (OSError, SafetensorError, RuntimeError) as error:  # the last from torch, whose writer has no other
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{folder}: cannot be written ({reason or one_line(error)}); free some space") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            for place in new:
                place.rmdir()


def _silent(text: str) -> None:
    pass
