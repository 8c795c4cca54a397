"""What happens beside the training step: checkpoints, an orderly stop, the log, pictures."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Dict, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.adapter.config import TrainerOptions
from nvsadapter_guidance.training.adapter.data import AdapterData
from nvsadapter_guidance.training.adapter.module import AdapterTraining
from nvsadapter_guidance.training.adapter.previews import sample_views, view_sheet

log = logging.getLogger(__name__)

CHECKPOINT_PATTERN = "step_*.ckpt"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The end of a machine's loan (kill, SLURM's warning), and Ctrl-C."""
STOP_CHECK_STEPS = 10
"""Steps between agreements of several devices on whether to stop."""


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, the oldest first."""
    return sorted((folder / "checkpoints").glob(CHECKPOINT_PATTERN))


class StepCheckpoint(Checkpoint):
    """Writes `checkpoints/step_00010000.ckpt` every so many steps and at the end, and deletes the oldest.

    When the process is told to stop, the step is finished, a checkpoint written and the run ended; a second signal ends
    it at once.

    Attributes:
        stopped: whether the run was told to stop.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self.stopped = False
        self._asked = False
        self._saved_step = -1
        self._handlers: Dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint where one is due, at whole steps only."""
        step = trainer.global_step
        if trainer.fit_loop._should_accumulate() or step == self._saved_step:
            return
        self.stopped = self._stop_agreed(trainer, step)
        if self.stopped or step % self.every == 0 or step >= trainer.max_steps:
            self._save(trainer, step)
        if self.stopped:
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)

    def _stop_agreed(self, trainer: Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self._asked
        # Signals reach processes at different times, and all must leave at the same step.
        if step % STOP_CHECK_STEPS:
            return False
        return trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    def _save(self, trainer: Trainer, step: int) -> None:
        self._saved_step = step
        path = self.folder / "checkpoints" / f"step_{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        log.info("step %d: wrote %s", step, path)
        if trainer.is_global_zero and self.keep > 0:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()


class ValidateAverage(Callback):
    """Validation looks at the moving average."""

    def __init__(self) -> None:
        self._swap: Any = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model."""
        if isinstance(pl_module, AdapterTraining) and pl_module.average is not None:
            self._swap = pl_module.average.in_place()
            self._swap.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it out again."""
        if self._swap is not None:
            self._swap.__exit__(None, None, None)
            self._swap = None


class MetricsFile(Callback):
    """Appends a line of JSON to `metrics.jsonl` every so many steps and after validations.

    Lines of steps behind the checkpoint that a run goes on with (it was killed after them) are taken out first: these
    steps come again.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._since: tuple[float, int] = (time.perf_counter(), 0)
        self._losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure time, and to write where the checkpoint stands."""
        self._since = (time.perf_counter(), getattr(pl_module, "samples_seen", 0))
        if trainer.is_global_zero and self.path.exists():
            self._cut(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss; write where it is due."""
        if "train/loss" in trainer.callback_metrics:
            self._losses.append(trainer.callback_metrics["train/loss"].detach())
        if trainer.fit_loop._should_accumulate() or trainer.global_step % self.every:
            return
        now, seen = time.perf_counter(), getattr(pl_module, "samples_seen", 0)
        if not any(bool(loss.isfinite()) for loss in self._losses):
            raise InputError(
                f"step {trainer.global_step}: no loss of the last {len(self._losses)} batches is a number; "
                "lower optim.lr or use trainer.precision=bf16-mixed, and go on with an earlier checkpoint"
            )
        values = {
            "train/loss": round(float(torch.stack(self._losses).nanmean()), 6),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "samples": seen,
            "samples_per_second": round((seen - self._since[1]) / max(now - self._since[0], 1e-9), 3),
        }
        self._losses, self._since = [], (now, seen)
        self._write(trainer, values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation loss; the time it took does not count."""
        if "val/loss" in trainer.callback_metrics:
            self._write(trainer, {"val/loss": round(float(trainer.callback_metrics["val/loss"]), 6)})
        self._since = (time.perf_counter(), getattr(pl_module, "samples_seen", 0))

    def _cut(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            scratch.write_text("".join(kept), encoding="utf-8")
            os.replace(scratch, self.path)

    def _write(self, trainer: Trainer, values: Dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in values.items() if k != "val/loss"}, step=trainer.global_step)
        log.info("step %d: %s", trainer.global_step, ", ".join(f"{key} {value:.6g}" for key, value in values.items()))


def _step_of(line: str) -> float:
    """The step of a line of `metrics.jsonl`; of a line that was cut off in the middle, infinity."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ViewSheets(Callback):
    """Writes `images/step_00005000.jpg`: views of unseen objects, sampled with the moving average."""

    def __init__(self, folder: Path, options: TrainerOptions, data: AdapterData, seed: int) -> None:
        self.folder, self.options, self.data, self.seed = folder, options, data, seed
        self._last = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample where it is due; the first process alone does it."""
        step = trainer.global_step
        due = step % self.options.images_every_steps == 0 or step >= trainer.max_steps
        if step != self._last and due and trainer.is_global_zero and isinstance(pl_module, AdapterTraining):
            self._last = step
            self._write(trainer, pl_module, step)

    def _write(self, trainer: Trainer, module: AdapterTraining, step: int) -> None:
        batch = self.data.first_objects(self.options.images_objects)
        batch = {key: value.to(module.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        if module.average is None:
            raise RuntimeError("views are sampled while fitting")
        with module.average.in_place(), trainer.precision_plugin.forward_context():
            views = sample_views(
                module.model,
                batch,
                self.options.images_sampling_steps,
                self.options.images_guidance_scale,
                torch.Generator().manual_seed(self.seed),
            )
        sheet = view_sheet(batch, views)
        path = self.folder / "images" / f"step_{step:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(sheet).save(path, quality=90)
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image("views", sheet, step, dataformats="HWC")
