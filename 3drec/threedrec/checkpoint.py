"""Checkpoints of a reconstruction: all that a killed run needs to go on as if nothing had happened.

A checkpoint is one file, replaced atomically. Random draws are functions of (seed, stage, step), see `step_generator`,
so no generator state is kept in it. Files are read without unpickling code (``weights_only=True``).
"""

import os
import pickle
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threedrec.background_writer import BackgroundWriter
from threedrec.errors import InputError
from threedrec.files import atomic_path

FORMAT = "3drec-checkpoint-1"
LAST = "last.ckpt"
PREPARE = "prepare"
"""The stage before all others; its checkpoint holds nothing that a run has to be continued for."""
SECONDS_BETWEEN = 30.0
"""Besides every N steps, a checkpoint is due when the last one is this old: CPU steps may take seconds."""


@dataclass
class Checkpoint:
    """Where a run stands."""

    stage: str
    """Stage in progress; its name as in `Reconstruction.stages`."""
    step: int
    """Steps of that stage that are done."""
    finished: list[str] = field(default_factory=list)
    """Stages that are done, in order."""
    model: dict[str, Tensor] = field(default_factory=dict)
    """Field, material, background and occupancy."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """State of the stage's optimiser; empty between stages."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the stage keeps (confidences of views)."""

    def snapshot(self) -> "Checkpoint":
        """Return a copy on the host, which later steps do not change."""
        return Checkpoint(**_copied(vars(self)))


def step_generator(seed: int, stage: str, step: int, device: torch.device | str) -> torch.Generator:
    """Return the source of all random draws of one step, the same whether or not the run was interrupted."""
    key = zlib.crc32(f"{seed}/{stage}/{step}".encode())
    # Close seeds give unrelated streams only where all bits of the state are mixed; crc32 does that for us.
    return torch.Generator(device=device).manual_seed(key)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **vars(checkpoint)}, temporary)


def load_checkpoint(path: Path, device: torch.device | str = "cpu", key: str = "resume") -> Checkpoint:
    """Read a checkpoint; ``key`` is the config key that names it, for error messages.

    Raises:
        InputError: no such file, damaged, not a checkpoint of ours, or with weights that are not finite.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "is a folder, not a checkpoint" if os.path.isdir(path) else "no such checkpoint"
        newest = ", or resume=auto" if key == "resume" else ""
        raise InputError(f"{key}: {path}: {what}; give a file from a run's ckpts folder{newest}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{key}: {path}: damaged, or not a checkpoint of this program; choose another file of its folder"
        ) from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{key}: {path}: not a checkpoint of this program; give a file from a run's ckpts folder")
    checkpoint = Checkpoint(**content)
    for name, value in checkpoint.model.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{key}: {path}: `{name}` holds values that are not finite; choose an earlier checkpoint")
    return checkpoint


def load_model(model: nn.Module, checkpoint: Checkpoint, source: Path | str, key: str = "resume") -> None:
    """Copy a checkpoint's weights into ``model``, strictly; ``key`` as in `load_checkpoint`.

    Raises:
        InputError: names or shapes differ, which means that the config is not the one of the run.
    """
    expected = model.state_dict()
    surplus = sorted(set(checkpoint.model) - set(expected))
    missing = sorted(set(expected) - set(checkpoint.model))
    shapes = [name for name in expected if name not in missing and expected[name].shape != checkpoint.model[name].shape]
    for problem, names in (("lacks", missing), ("has an unknown", surplus), ("has another shape of", shapes)):
        if names:
            raise InputError(
                f"{key}: {source}: {problem} `{names[0]}`; use the config of the run that wrote it (parsed.yaml)"
            )
    model.load_state_dict(checkpoint.model)


class CheckpointKeeper:
    """Writes ``last.ckpt`` when it is due, and numbered checkpoints to keep."""

    def __init__(
        self, folder: Path, writer: BackgroundWriter, every_n_steps: int, save_last: bool = True, save_top_k: int = -1
    ) -> None:
        """Keep checkpoints in ``folder``.

        Args:
            folder: the run's ``ckpts``.
            writer: writes them, after what it was given before.
            every_n_steps: numbered checkpoints are this far apart; 0 for none.
            save_last: also keep ``last.ckpt``, which a resumed run starts from.
            save_top_k: how many numbered ones to keep, the newest; -1 for all.
        """
        self.folder, self.writer = folder, writer
        self.every_n_steps, self.save_last, self.save_top_k = every_n_steps, save_last, save_top_k
        self._saved = time.monotonic()

    @property
    def last(self) -> Path:
        """The checkpoint that a resumed run starts from."""
        return self.folder / LAST

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after ``step`` steps of a stage."""
        return self._numbered(step) or (self.save_last and time.monotonic() - self._saved > SECONDS_BETWEEN)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write ``last.ckpt`` and, every N steps, a numbered one, of the state as it is now; `writer` does the work."""
        if self.save_last or self._keeps(checkpoint.step):
            self.writer.make_room()  # before there is another copy of the state
            self.writer.submit(partial(self._write, checkpoint.snapshot()))
        self._saved = time.monotonic()

    def _write(self, checkpoint: Checkpoint) -> None:
        if self.save_last:
            save_checkpoint(self.last, checkpoint)
        if self._keeps(checkpoint.step):
            save_checkpoint(self.folder / f"{checkpoint.stage}-{checkpoint.step:06d}.ckpt", checkpoint)
            self._prune()

    def _numbered(self, step: int) -> bool:
        return self.every_n_steps > 0 and step > 0 and step % self.every_n_steps == 0

    def _keeps(self, step: int) -> bool:
        return self._numbered(step) and self.save_top_k != 0

    def _prune(self) -> None:
        if self.save_top_k < 0:
            return
        numbered = sorted(self.folder.glob("*-[0-9]*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        for file in numbered[: -self.save_top_k]:
            file.unlink(missing_ok=True)


def _copied(value: Any) -> Any:
    """``value`` with copies of all tensors in it, on the host."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
