"""One optimisation loop: steps, their safety, and what is written on the way. The stages say what a step computes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from threedrec.checkpoint import Checkpoint, CheckpointKeeper
from threedrec.divergence import FiniteCheck
from threedrec.host import Interrupted
from threedrec.loggers import Reporter, Sink

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What one step computed."""

    loss: Tensor
    """Scalar to minimise."""
    terms: dict[str, Tensor | float] = field(default_factory=dict)
    """Values to log, by name."""


@dataclass
class Loop:
    """The steps ``first`` to ``last`` of a stage."""

    stage: str
    first: int
    last: int
    step: Callable[[int], StepResult]
    optimizer: torch.optim.Optimizer
    set_rate: Callable[[int], None]
    """Sets the learning rates of a step."""
    after: Callable[[int], None] = lambda step: None
    """Called with the number of steps done (validation, previews)."""


class LoopRunner:
    """Runs loops on a device, and writes logs and checkpoints."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        scene: nn.Module,
        keeper: CheckpointKeeper,
        reporter: Reporter,
        log_every_n_steps: int,
        clip_norm: float | None,
    ) -> None:
        """Optimise ``scene`` and log to ``sinks``; see `TrainerConfig` for the numbers."""
        self.sinks, self.scene, self.keeper, self.reporter = sinks, scene, keeper, reporter
        self.log_every_n_steps, self.clip_norm = log_every_n_steps, clip_norm
        self.finished: list[str] = []
        self.extra: Callable[[], dict[str, Any]] = dict
        """What checkpoints keep beside the model and the optimiser."""
        self.before_save: Callable[[], None] = lambda: None
        """Called before a checkpoint is written: what a killed run would otherwise lose."""
        self.should_stop: Callable[[], bool] = lambda: False
        """Asked after every step; when true, the loop ends with a checkpoint."""
        self.finite = FiniteCheck(late=any(parameter.is_cuda for parameter in scene.parameters()))
        """To be read before anything of a step is kept."""
        self.last_terms: dict[str, float] = {}

    def run(self, loop: Loop) -> None:
        """Do the loop's steps; what they wrote is on the disk when this returns or raises.

        Raises:
            DivergenceError: a loss or a gradient is not finite.
            InputError: a checkpoint or a picture could not be written.
            Interrupted: ``should_stop`` said so.
        """
        with self.reporter.stage(loop.stage, loop.last, loop.first) as report, self.keeper.writer:
            for step in range(loop.first, loop.last):
                loop.set_rate(step)
                result = loop.step(step)
                self._descend(loop, result, step)
                done = step + 1
                shown = self._log(loop.stage, done, result, force=done == loop.last)
                report.update(done, shown)
                loop.after(done)
                if self.keeper.due(done):
                    self.save(loop.stage, done, loop.optimizer)
                if done < loop.last and self.should_stop():
                    self.save(loop.stage, done, loop.optimizer)
                    self.keeper.writer.finish()  # a full disk is told of; the checkpoint is there otherwise
                    raise Interrupted

    def save(self, stage: str, done: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Begin to write a checkpoint after ``done`` steps of ``stage``; what it refers to is written before."""
        self.finite.read()
        self.before_save()
        for sink in self.sinks:
            sink.flush()
        checkpoint = Checkpoint(
            stage=stage,
            step=done,
            finished=list(self.finished),
            model=self.scene.state_dict(),
            optimizer={} if optimizer is None else optimizer.state_dict(),
            extra=self.extra(),
        )
        self.keeper.save(checkpoint)

    def _descend(self, loop: Loop, result: StepResult, step: int) -> None:
        """One step of the optimiser down ``result.loss``."""
        loop.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        parameters = [p for group in loop.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.finite.ask(f"stage {loop.stage}, step {step}", result.loss, result.terms, parameters)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        loop.optimizer.step()

    def _log(self, stage: str, done: int, result: StepResult, force: bool) -> dict[str, float]:
        """Write the step's values to the loggers when it is their turn; return the newest known values."""
        if force or done % self.log_every_n_steps == 0 or not self.last_terms:
            self.finite.read()
            values = {"loss": result.loss.detach(), **result.terms}
            self.last_terms = _numbers(values)
            for sink in self.sinks:
                sink.log({f"{stage}/{name}": value for name, value in self.last_terms.items()}, done)
        return self.last_terms


def _numbers(values: dict[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, by one copy from a device."""
    known = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        there = {name: value for name, value in tensors.items() if value.device == device}
        copied = torch.stack([value.double().reshape(()) for value in there.values()]).tolist()
        known |= dict(zip(there, copied, strict=True))
    return {name: known[name] for name in values}
