"""Runs of adapter training that take seconds on one core."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tiny_nvs import tiny_nvs_config

from nvsadapter_guidance.training.adapter.config import TrainConfig
from nvsadapter_guidance.training.adapter.config_files import load_config

SMALL = (
    "model.random_weights=true", "data.kind=synthetic", "data.objects=8", "data.num_workers=0", "data.batch_size=4",
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true", "trainer.images_every_steps=0",
    "trainer.val_every_steps=0", "trainer.log_every_steps=2", "trainer.checkpoint_every_steps=2",
    "optim.warmup_steps=4", "optim.lr=1e-3",
)  # fmt: skip


def tiny_base(folder: Path, **adapter: Any) -> Path:
    """A folder with the configuration of the tiny model, 2 query views."""
    config = tiny_nvs_config()
    config.adapter |= {"num_query": 2, **adapter}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


def tiny_run(folder: Path, *overrides: str, name: str = "run") -> TrainConfig:
    """A run on the tiny model, in `folder`."""
    base = tiny_base(folder / "base")
    return load_config([], [*SMALL, f"model.base={base}", f"output={folder}", f"name={name}", *overrides])
