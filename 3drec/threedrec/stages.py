"""The stages of a reconstruction, in order."""

from collections.abc import Callable
from dataclasses import dataclass

from threedrec.distillation import distill
from threedrec.imagined_views import fit_views, sample_views
from threedrec.results import begin_export, export, test
from threedrec.run import Run


@dataclass(frozen=True)
class Stage:
    """One stage: its name in checkpoints and metrics, and what it does with a run."""

    name: str
    do: Callable[[Run], int]
    """Returns the number of optimisation steps after which the stage is over, 0 where it has none."""


def plan(run: Run) -> list[Stage]:
    """The stages that the config asks for; `Reconstruction` prepares the image before them."""
    stages = []
    if run.warm_start is not None:
        stages += [Stage("views", sample_views), Stage("fit", fit_views)]
    total, coarse = run.distillation_steps, coarse_steps(run)
    if coarse > 0:
        stages.append(Stage("coarse", lambda run: distill(run, "coarse", 0, coarse)))
    if total > coarse:
        stages.append(Stage("fine", lambda run: distill(run, "fine", coarse, total)))
    return [*stages, Stage("test", _test_beside_mesh), Stage("mesh", export)]


def _test_beside_mesh(run: Run) -> int:
    """`test`, while the mesh that comes after it is begun."""
    begin_export(run)
    return test(run)


def coarse_steps(run: Run) -> int:
    """Steps of distillation before the first resolution milestone."""
    milestones = run.config.data.random_camera.resolution_milestones
    return min(run.distillation_steps, milestones[0]) if milestones else run.distillation_steps
