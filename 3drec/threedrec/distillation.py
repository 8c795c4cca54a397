"""Score distillation: the stages in which the guidance judges random views of the scene."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from threedrec.beside import Beside
from threedrec.cameras import Cameras, RandomCameraSampler
from threedrec.config_schema import FreqConfig
from threedrec.guidance.protocol import Guidance
from threedrec.image import SupportView
from threedrec.imagined_views import view_fit
from threedrec.loop import Loop, StepResult
from threedrec.optimizer import build_optimizer, scheduled_factor, set_learning_rate
from threedrec.report import contact_sheet, to_bytes
from threedrec.results import save_validation
from threedrec.run import Run
from threedrec.steps import Supervision, joined

Views = tuple[Cameras, tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 3"]]]


class Distillation:
    """One step of score distillation: the guidance's, the reference's and (if kept) the sampled views' losses."""

    def __init__(self, run: Run) -> None:
        """Load the guidance; the stage begins with it."""
        system, data = run.config.system, run.config.data
        self.run = run
        self.guidance: Guidance = run.load_guidance()
        self.supervision = Supervision(
            run.scene, system.loss, system.ambient_ratio_min, data.rays_noise_scale, system.ref_rays
        )
        self.sampler = RandomCameraSampler(data.random_camera)
        self.keep_weight = run.warm_start.keep_weight if run.warm_start is not None else 0.0
        self.view_fit = view_fit(run) if self.keep_weight > 0 else None
        self._supports: dict[tuple[int, int], SupportView] = {}
        self._beside = Beside(run.device)
        self._ahead: tuple[int, Views] | None = None

    def __call__(self, index: int) -> StepResult:
        """Losses of step ``index``, counted from the beginning of distillation."""
        run, freq = self.run, self.run.config.system.freq
        generator = run.generator("distill", index)
        run.scene.renderer.update(run.fit_steps + index, generator)
        reference, guided = turn(freq, index)
        results = []
        self._beside.mark()
        if guided:
            cameras, rays = self._views(index)
            result, rgb = self.supervision.guidance(self.guidance, cameras, index, generator, rays)
            results.append(result)
        if reference:
            support = self._support(index)
            # The host waits for the number of samples, but not for the guidance, which is at work by now.
            with self._beside():
                sight = self.supervision.sight(support, generator)
            results.append(self.supervision.reference(support, index, generator, sight))
        if self.view_fit is not None:
            result = self.view_fit(1.0, generator)
            results.append(StepResult(self.keep_weight * result.loss, result.terms))
        if guided and freq.guidance_eval > 0 and (index + 1) % freq.guidance_eval == 0:
            self._save_preview(rgb, cameras, index)
        if turn(freq, index + 1)[1]:  # a GPU is at work now, and idle when the next step begins
            self._ahead = index + 1, self._draw_views(index + 1)
        return joined(*results)

    def _views(self, index: int) -> Views:
        """Cameras of step ``index``, and their rays."""
        ahead = self._ahead
        return ahead[1] if ahead is not None and ahead[0] == index else self._draw_views(index)

    def _draw_views(self, index: int) -> Views:
        cameras = self.sampler(index, self.run.generator("cameras", index))
        return cameras, cameras.rays()

    def _support(self, index: int) -> SupportView:
        size = self.run.config.data.size_at(index)
        if size not in self._supports:
            self._supports[size] = self.run.support.resized(*size)
        return self._supports[size]

    def _save_preview(self, rgb: torch.Tensor, cameras: Cameras, index: int) -> None:
        """What the guidance was shown, and what it would rather see."""
        self.run.runner.finite.read()
        generator = self.run.generator("preview", index)
        with torch.no_grad():
            wanted = self.guidance.preview(rgb, cameras, index, generator)
        shown = rgb.permute(0, 3, 1, 2)
        shown = torch.nn.functional.interpolate(shown, wanted.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        path = self.run.save_dir / f"it{index + 1}-guidance.png"
        self.run.writer.submit(partial(contact_sheet, to_bytes({"seen": shown, "wanted": wanted}), path))


def turn(freq: FreqConfig, index: int) -> tuple[bool, bool]:
    """Whether step ``index`` looks at the reference, and whether it asks the guidance."""
    if freq.ref_or_nvsadapter == "accumulate":
        return True, True
    reference = index < freq.ref_only_steps or index % freq.n_ref == 0
    return reference, not reference


def distill(run: Run, stage: str, first: int, last: int) -> int:
    """Do the steps ``first`` to ``last`` of distillation. One optimiser serves all stages of it."""
    step = Distillation(run)
    system, checkpoint = run.config.system, run.resumed
    done = first
    if run.optimizer is None:
        run.optimizer = build_optimizer(run.scene.renderer, system.optimizer)
        if checkpoint is not None and checkpoint.stage in DISTILLATION and checkpoint.optimizer:
            run.restore_optimizer(run.optimizer)
            done = max(first, checkpoint.step)
    optimizer = run.optimizer

    def after(count: int) -> None:
        if count % run.config.trainer.val_check_interval == 0 and count < last:
            run.runner.finite.read()
            save_validation(run, f"it{count}")

    def rate(index: int) -> None:
        set_learning_rate(optimizer, scheduled_factor(system.scheduler, index))

    run.runner.run(Loop(stage, done, last, step, optimizer, rate, after))
    save_validation(run, stage)
    return last


DISTILLATION = ("coarse", "fine")
