"""Views that a pipeline imagines of an object, ready to be scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.pipeline import Poses, predict_clean, prepare
from nvsadapter_guidance.training.mesh_dataset import ViewSet, object_generator

ONE_STEP_LEVEL = 0.5
"""Share of the noise schedule at which one-step denoising is measured."""


@dataclass(frozen=True)
class Imagined:
    """What a model makes of the reference of one object, in [0, 1] on the CPU."""

    views: Float[Tensor, "v 3 h w"]
    """Sampled from noise."""
    one_step: Float[Tensor, "v 3 h w"] | None = None
    """The true views noised half way and denoised in one step, as score distillation sees them."""


Imagine = Callable[[str, Float[Tensor, "v 3 h w"], ViewSet], Imagined]
"""``imagine(name, true views in [0, 1], cameras)``; nothing but view 0 may enter the sampled views."""


@dataclass(frozen=True)
class PipelineImagine:
    """Asks a pipeline.

    Args:
        pipeline: on its device.
        steps, guidance_scale: of sampling, see `NVSAdapterPipeline`.
        seed: with the object's name it decides every random draw.
        on_step: called after every sampling step of an object.
    """

    pipeline: NVSAdapterPipeline
    steps: int
    guidance_scale: float
    seed: int = 0
    on_step: Callable[[], None] | None = None

    def __call__(self, name: str, truth: Float[Tensor, "v 3 h w"], views: ViewSet) -> Imagined:
        """Sample all views from the first, and denoise the true ones once.

        Raises:
            InputError: an option cannot be used.
        """
        generator = object_generator(name, self.seed)
        sampled = self.pipeline(
            truth[0],
            views.elevation,
            views.azimuth,
            [views.distance] * len(views.azimuth),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="pt",
            callback_on_step_end=self._report,
            rotating_groups=True,
            groups_per_call=self._groups_per_call,
        )[0]
        return Imagined(sampled, self._one_step(truth, views, generator))

    @torch.no_grad()
    def _one_step(self, truth: Tensor, views: ViewSet, generator: torch.Generator) -> Float[Tensor, "v 3 h w"]:
        model, device = self.pipeline.model, self.pipeline._execution_device
        distance = [views.distance] * len(views.azimuth)
        poses = Poses(*(torch.tensor(values, device=device) for values in (views.azimuth, views.elevation, distance)))
        draws = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        images = truth.to(device) * 2.0 - 1.0
        reference = replace(poses[:1], distance=poses.distance.new_full((1,), model.config.distance))
        conditions = prepare(model, images[:1], reference, draws)
        clean = predict_clean(
            model,
            conditions,
            images,
            poses,
            ONE_STEP_LEVEL,
            draws,
            self.guidance_scale,
            groups_per_call=self._groups_per_call,
        )
        return (0.5 * clean.float() + 0.5).clamp(0.0, 1.0).cpu()

    @property
    def _groups_per_call(self) -> int:
        return 8 if self.pipeline._execution_device.type == "cuda" else 1

    def _report(self, *_: Any) -> dict[str, Tensor]:
        if self.on_step is not None:
            self.on_step()
        return {}
