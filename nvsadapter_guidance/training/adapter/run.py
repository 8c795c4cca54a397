"""A training run from a configuration: devices, folder, Trainer."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.adapter.callbacks import (
    MetricsFile,
    StepCheckpoint,
    ValidateAverage,
    ViewSheets,
    checkpoints,
)
from nvsadapter_guidance.training.adapter.config import TrainConfig, TrainerOptions
from nvsadapter_guidance.training.adapter.config_files import dump_config
from nvsadapter_guidance.training.adapter.data import AdapterData, ViewRequest
from nvsadapter_guidance.training.adapter.export import export_checkpoint, read_checkpoint
from nvsadapter_guidance.training.adapter.module import AdapterTraining
from nvsadapter_guidance.training.adapter.network import build_model, trainable

log = logging.getLogger(__name__)

RESUME_NEWEST = "auto"
ADAPTER_FOLDER = "adapter"
_DISTURBING = ("lightning.pytorch", "lightning.fabric")


class AtomicFile(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and that hold tensors and plain values alone."""

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        """Write beside `path`, then rename."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Optional[bool] = None
    ) -> Dict[str, Any]:
        """Read, without running anything that the file might hold."""
        return read_checkpoint(Path(path))


def run_folder(config: TrainConfig) -> Path:
    """Where a run writes."""
    return Path(config.output).expanduser() / config.name


def train(config: TrainConfig, resume: Optional[str] = None) -> Path:
    """Train, and write the adapter that came of it.

    The run's folder gets `config.yaml`, `metrics.jsonl`, `tensorboard/`, `images/`, `checkpoints/` and, at the end,
    `adapter/` (or what `export_checkpoint` makes of it) of the moving average.

    Args:
        resume: a checkpoint, or "auto" for the newest of the run's folder (from the beginning where there is none);
            None begins anew.

    Returns:
        The run's folder.

    Raises:
        InputError: a file is missing or does not fit; the folder holds another run.
        KeyboardInterrupt: the run was told to stop, and has written a checkpoint.
    """
    if rank_zero_only.rank != 0:
        logging.getLogger("nvsadapter_guidance").setLevel(logging.WARNING)
    folder = run_folder(config)
    checkpoint = _choose_checkpoint(folder, resume)
    hardware = choose_hardware(config.trainer)
    model = build_model(config.model, config.seed)
    size, num_query = model.config.image_size, model.num_query
    request = ViewRequest(config.data, num_query, size, config.model.controlnet, config.seed)
    data = AdapterData(request, config.trainer.val_batches)
    module = AdapterTraining(model, config)
    if checkpoint is not None:
        data.samples_seen = int(read_checkpoint(checkpoint)["samples_seen"])
    _prepare_folder(folder, config)
    counts = trainable(model)
    log.info("%d parameters in %d tensors are trained", sum(p.numel() for p in counts.values()), len(counts))
    stopper = StepCheckpoint(folder, config.trainer.checkpoint_every_steps, config.trainer.checkpoint_keep)
    trainer = make_trainer(config, folder, hardware, data, stopper)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if stopper.stopped:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        output = export_checkpoint(checkpoints(folder)[-1], folder / ADAPTER_FOLDER)
        log.info("wrote %s", output)
    return folder


def make_trainer(
    config: TrainConfig, folder: Path, hardware: Dict[str, Any], data: AdapterData, stopper: StepCheckpoint
) -> Trainer:
    """Lightning's Trainer with our callbacks."""
    options = config.trainer
    callbacks: List[Callback] = [ValidateAverage(), MetricsFile(folder / "metrics.jsonl", options.log_every_steps)]
    if options.images_every_steps:
        callbacks.append(ViewSheets(folder, options, data, config.seed))
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar())
    for name in _DISTURBING:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Frozen parts are meant to be in eval mode.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    return Trainer(
        **hardware,
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=config.optim.gradient_clip_norm or None,
        precision=options.precision,  # type: ignore[arg-type]
        callbacks=[*callbacks, stopper],
        logger=TensorBoardLogger(str(folder), name="", version="tensorboard"),
        log_every_n_steps=options.log_every_steps,
        # In batches, over an endless epoch.
        val_check_interval=options.val_every_steps * options.accumulate_grad_batches or None,
        check_val_every_n_epoch=None,
        limit_val_batches=options.val_batches if options.val_every_steps else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        default_root_dir=str(folder),
    )


def choose_hardware(options: TrainerOptions) -> Dict[str, Any]:
    """The Trainer's `accelerator`, `devices`, `num_nodes`, `strategy` and `plugins`.

    Raises:
        InputError: the devices are not there, or cannot compute in the precision asked for.
    """
    gpu = torch.cuda.is_available()
    accelerator = ("gpu" if gpu else "cpu") if options.accelerator == "auto" else options.accelerator
    if accelerator == "gpu" and not gpu:
        raise InputError("trainer.accelerator is gpu, no CUDA device is found; use cpu, or check `3drec doctor`")
    if accelerator == "cpu" and options.precision == "16-mixed":
        raise InputError("trainer.precision: 16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
    devices, count = parse_devices(options.devices, accelerator)
    if options.accelerator == "auto" and not gpu:
        log.info("no CUDA device: training on the CPU")
    plugins: List[Any] = [AtomicFile()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Checkpoints and the end of a job are `StepCheckpoint`'s matter.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    strategy: Union[str, DDPStrategy] = "auto"
    if count * options.num_nodes > 1:
        # Every trained parameter gets a gradient (`NVSAdapter.freeze_inert`), and frozen buffers never change.
        strategy = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    return {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": options.num_nodes,
        "strategy": strategy,
        "plugins": plugins,
    }


def parse_devices(text: str, accelerator: str) -> Tuple[Union[int, List[int]], int]:
    """Devices for Lightning, and how many they are: "2" is a number, "0," and "0,3" are lists, "auto" is all.

    Raises:
        InputError: it is none of these, or a GPU of that number is not there.
    """
    there = torch.cuda.device_count() if accelerator == "gpu" else 1
    if text == "auto":
        return there, there
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"trainer.devices '{text}' is no number and no list; use 2, or 0, or 0,1 or auto") from error
    as_list = "," in text
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers) or (not as_list and numbers[0] == 0):
        raise InputError(f"trainer.devices '{text}': use a number such as 2, a list such as 0, or 0,1 or auto")
    count = len(numbers) if as_list else numbers[0]
    if accelerator == "cpu":
        return count, count
    if max(numbers if as_list else [count - 1]) >= there:
        raise InputError(f"trainer.devices '{text}': this machine has {there} GPUs, numbered from 0")
    return (numbers if as_list else count), count


def _choose_checkpoint(folder: Path, resume: Optional[str]) -> Optional[Path]:
    found = checkpoints(folder)
    if resume is None:
        if found:
            # In every process: one that went on alone would wait for the others until it is killed.
            raise InputError(f"{folder}: holds a run already; go on with -r auto, or give another name with -n")
        return None
    if resume == RESUME_NEWEST:
        return found[-1] if found else None
    path = Path(resume).expanduser()
    if path.is_dir():
        inside = checkpoints(path)
        if not inside:
            raise InputError(f"{path}: holds no checkpoints/step_*.ckpt; give a run's folder or a checkpoint")
        return inside[-1]
    read_checkpoint(path)
    return path


def _prepare_folder(folder: Path, config: TrainConfig) -> None:
    if rank_zero_only.rank != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".config.{os.getpid()}.tmp"
        scratch.write_text(dump_config(config), encoding="utf-8")
        os.replace(scratch, folder / "config.yaml")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another output") from error
