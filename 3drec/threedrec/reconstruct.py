"""One photograph in, a textured mesh out: the reconstruction, stage by stage.

    prepare -> views -> fit -> coarse -> fine -> test -> mesh

"views" and "fit" are the warm start (`threedrec.imagined_views`), "coarse" and "fine" are score distillation before and
after the first resolution milestone (`threedrec.distillation`). Every stage leaves pictures in ``save/`` and a
checkpoint, from which a killed run goes on.
"""

import logging
from pathlib import Path

import torch

from threedrec.background_writer import BackgroundWriter
from threedrec.checkpoint import PREPARE, CheckpointKeeper, load_checkpoint, load_model
from threedrec.config_schema import ExperimentConfig, SystemConfig
from threedrec.distillation import DISTILLATION
from threedrec.host import Host, Interrupted
from threedrec.image import load_support_view, save_support_view
from threedrec.loggers import Reporter, file_loggers
from threedrec.lookup import find_path
from threedrec.loop import LoopRunner
from threedrec.metrics import MetricsFile, StageTimer, stage_numbers
from threedrec.optimizer import check_groups
from threedrec.results import export, save_validation, test
from threedrec.run import Run
from threedrec.scene import Scene
from threedrec.stages import plan
from threedrec.startup import repeatable_products

logger = logging.getLogger(__name__)

SUPPORT_SIZE = 512
"""Pixels at which the photograph is kept; stages shrink it to what they need."""


class Reconstruction:
    """The system ``nvsadapter-system``: optimises a scene until the reference and a guidance agree with it."""

    Config = SystemConfig

    def __init__(
        self, config: ExperimentConfig, run_dir: Path, device: torch.device | str, host: Host | None = None
    ) -> None:
        """Prepare a reconstruction; nothing is loaded or written yet.

        Args:
            config: with ``resume`` naming a checkpoint, the run continues (or is evaluated) from there.
            run_dir: the run's folder.
            device: "cpu" or a CUDA device.
            host: what the process lends (a loaded guidance, the image); by default nothing.
        """
        self.host = host or Host()
        self.config, self.run_dir, self.device = config, Path(run_dir), torch.device(device)

    def train(self, until: str | None = None) -> None:
        """Do all stages that are not done yet, and end with the turntable and the mesh.

        Args:
            until: a stage to stop before; resuming from the checkpoint does the rest.

        Raises:
            Interrupted: the host asked to stop; the checkpoint is up to date.
            InputError: the image, the weights, the checkpoint or the output folder cannot be used.
            DivergenceError: the optimisation produced values that are not finite.
        """
        run = self._prepare()
        try:
            self._do_stages(run, until)
        finally:
            if run.mesh_ahead is not None:
                run.mesh_ahead.close()
        _close(run)

    def _do_stages(self, run: Run, until: str | None) -> None:
        resumed = run.resumed
        for stage in plan(run):
            if stage.name == until:
                break
            if self.host.stop():
                raise Interrupted
            if stage.name in run.runner.finished:
                logger.info("stage %s: done before", stage.name)
                continue
            logger.info("stage %s", stage.name)
            again = resumed is not None and resumed.stage == stage.name
            with run.metrics.stage(stage.name, self.device, resumed=again) as timer, run.writer:
                run.runner.before_save = timer.flush
                steps = stage.do(run)
                # A finished stage is not done again, so its numbers must be in the file before the checkpoint says so.
                run.metrics.update({f"losses.{name}": value for name, value in run.runner.last_terms.items()})
                timer.flush()
                run.runner.finished.append(stage.name)
                # The stages after distillation have no use for its optimiser, which is two thirds of a checkpoint.
                run.runner.save(stage.name, steps, run.optimizer if stage.name in DISTILLATION else None)

    def validate(self) -> None:
        """Render the evaluation views of the checkpoint."""
        run = self._open()
        with run.writer:
            save_validation(run, "validate")

    def test(self) -> None:
        """Write the turntable of the checkpoint and compare the reference view."""
        run = self._open()
        with run.metrics.stage("test", self.device):
            test(run)

    def export(self) -> None:
        """Write the mesh of the checkpoint."""
        run = self._open()
        with run.metrics.stage("mesh", self.device):
            export(run)

    def _prepare(self) -> Run:
        """The stage before all others: read the image, build the scene, and show both."""
        metrics, waited = MetricsFile(self.run_dir / "metrics.json"), self.host.startup_seconds()
        startup = None if waited is None else stage_numbers(waited, self.device)
        # No `metrics.stage`: it would leave a file in the folder of a run that was refused.
        timer = StageTimer(metrics, PREPARE, self.device, resumed=self.config.resume is not None)
        run = self._open(metrics, logs=True)
        with run.writer:
            save_support_view(run.support, run.save_dir / "input.png")
            if run.resumed is None and self.config.trainer.num_sanity_val_steps > 0:
                save_validation(run, "it0")
            if startup is not None and run.resumed is None:
                metrics.update({"stages.startup": startup})
            timer.flush()
            if run.resumed is None:
                run.runner.save(PREPARE, 0)
        return run

    def _open(self, metrics: MetricsFile | None = None, logs: bool = False) -> Run:
        """Build everything that the stages share, at the state of ``config.resume``."""
        config = self.config
        _repeatable(self.device)
        if config.trainer.precision != "32-true":
            logger.info(
                "trainer.precision=%s: the field computes in float32; half precision is the guidance's own choice",
                config.trainer.precision,
            )
        support = (self.host.support or load_support_view(config.data, SUPPORT_SIZE)).to(self.device)
        scene = Scene(config.system, config.seed).to(self.device)
        check_groups(scene.renderer, config.system.optimizer)
        keep = config.checkpoint
        keeper = CheckpointKeeper(
            self.run_dir / "ckpts", BackgroundWriter(), keep.every_n_train_steps, keep.save_last, keep.save_top_k
        )
        reporter = Reporter(config.trainer.enable_progress_bar, listener=self.host.progress)
        trainer, sinks = config.trainer, file_loggers(self.run_dir) if logs else []
        runner = LoopRunner(sinks, scene, keeper, reporter, trainer.log_every_n_steps, trainer.gradient_clip_val)
        runner.should_stop = self.host.stop
        metrics = metrics or MetricsFile(self.run_dir / "metrics.json")
        run = Run(config, self.run_dir, self.device, scene, support, metrics, keeper, runner, reporter, self.host)
        runner.extra = lambda: {} if run.confidence is None else {"confidence": run.confidence.state_dict()}
        start = config.resume or config.system.weights
        if start:
            # On the CPU, where Adam's step counts belong; `load_state_dict` moves what belongs on the device.
            key = "resume" if config.resume else "system.weights"
            checkpoint = load_checkpoint(find_path(start), key=key)
            load_model(scene, checkpoint, start, key)
            if config.resume:
                run.resumed = checkpoint
                runner.finished = list(checkpoint.finished)
        metrics.update({"recipe": config.recipe, "device": _device_name(self.device), "seed": config.seed})
        return run


def _repeatable(device: torch.device) -> None:
    """Ask for the same results from the same seed where the device can give them."""
    if device.type == "cuda":
        repeatable_products()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode would also fill every new tensor with NaN, to find reads of memory that nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _close(run: Run) -> None:
    for sink in run.runner.sinks:
        sink.close()
