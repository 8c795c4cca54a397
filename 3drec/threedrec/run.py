"""What the stages of one reconstruction share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from threedrec.background_writer import BackgroundWriter
from threedrec.checkpoint import Checkpoint, CheckpointKeeper, step_generator
from threedrec.confidence import Confidence
from threedrec.config_schema import ExperimentConfig
from threedrec.host import Host
from threedrec.image import SupportView
from threedrec.loggers import Reporter
from threedrec.loop import LoopRunner
from threedrec.metrics import MetricsFile
from threedrec.optimizer import restore_optimizer
from threedrec.scene import Scene
from threedrec.warm_start import ViewSet, WarmStartConfig


@dataclass
class Run:
    """A reconstruction in progress."""

    config: ExperimentConfig
    run_dir: Path
    device: torch.device
    """Where everything is computed, in float32: rays, densities and normals lose more in half precision than it
    saves."""
    scene: Scene
    support: SupportView
    """The reference at the size it was read at."""
    metrics: MetricsFile
    keeper: CheckpointKeeper
    runner: LoopRunner
    reporter: Reporter
    host: Host = field(default_factory=Host)
    """What the process lends the run."""
    resumed: Checkpoint | None = None
    """The checkpoint that the run goes on from."""
    guidance: Any = None
    """The guidance, from the first stage on that needs it."""
    views: ViewSet | None = None
    """Sampled views, once there are any."""
    confidence: Confidence | None = None
    """How far each of them is believed."""

    optimizer: Any = None
    """The optimiser of score distillation, from its first stage on."""
    mesh_ahead: Any = None
    """The mesh that is being made already, see `results.begin_export`."""

    @property
    def save_dir(self) -> Path:
        """Where results go."""
        return self.run_dir / "save"

    @property
    def writer(self) -> BackgroundWriter:
        """What writes pictures and checkpoints, in their order."""
        return self.keeper.writer

    @property
    def warm_start(self) -> WarmStartConfig | None:
        """The warm start's config when it is switched on."""
        found = getattr(self.config.system.guidance, "warm_start", None)
        return found if found is not None and found.enabled else None

    @property
    def fit_steps(self) -> int:
        """Steps of the warm start's fit: the first of `trainer.max_steps`."""
        return 0 if self.warm_start is None else min(self.warm_start.fit_steps, self.config.trainer.max_steps)

    @property
    def distillation_steps(self) -> int:
        """Steps of score distillation: the rest of `trainer.max_steps`."""
        return self.config.trainer.max_steps - self.fit_steps

    def generator(self, stage: str, step: int = 0, device: torch.device | str | None = None) -> torch.Generator:
        """Source of the random draws of one step of a stage."""
        return step_generator(self.config.seed, stage, step, device or self.device)

    def load_guidance(self) -> Any:
        """Return the guidance, loaded and prepared for the reference the first time it is asked for."""
        if self.guidance is None:
            system = self.config.system
            guidance = self.host.guidances.get(system.guidance_type, system.guidance, self.device)
            guidance.prepare(self.support)
            self.metrics.set("model", guidance.description)
            self.guidance = guidance
        return self.guidance

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring ``optimizer`` to where the checkpoint left it."""
        if self.resumed is not None and self.resumed.optimizer:
            restore_optimizer(optimizer, self.resumed.optimizer)
