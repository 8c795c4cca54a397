"""Score distillation with a multi-view model: how likely it finds rendered views, as a gradient on their pixels."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.cuda_graphs import is_offloaded
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.frozen_encoder import FrozenEncoder
from nvsadapter_guidance.memory import MemoryPlan
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, SupportConditions, guided_prediction, predict_clean, prepare


@dataclass
class Distillation:
    """One call of :class:`ScoreDistillation`."""

    loss: Float[Tensor, ""]
    """Surrogate whose gradient in the latents is the SDS gradient divided by the number of views."""
    gradient: Float[Tensor, "groups views C h w"]
    """The SDS gradient on the latents, float32."""
    timesteps: Int[Tensor, " groups"]

    @property
    def gradient_norm(self) -> Float[Tensor, ""]:
        """Of all views together."""
        return self.gradient.norm()


class ScoreDistillation:
    """SDS (Poole et al. 2023, arXiv 2209.14988, Eq. 3) on groups of ``num_query`` views of one object.

    Args:
        model: on the device where the views are; never trained, see `FrozenEncoder`.
        guidance_scale: of classifier-free guidance.
        num_query: views judged together; None for as many as the model was trained with.
        max_norm: entries of the latents' gradient are clipped to this size; None for no clipping.
        memory: how much is done at a time; sets ``model.pixels_per_call``.
        graphs: capture CUDA graphs on a GPU where the memory plan lets them be; switches ``model.graphs``.
        encoder_dtype: precision of the encoder that rendered views and their gradient go through; the support view and
            previews are always encoded in float32.
        frozen_unconditional: where unconditional samples see noise in place of the support view, draw it once an object
            instead of at every call, which then has an eighth less to do. It is another unconditional prediction.

    The network runs in the model's precision (`NVSModel.to`). Everything around it is in float32: the latents, the
    schedule, the two predictions' difference, and the gradient of score distillation, which is itself the difference of
    two nearly equal noises.

    Raises:
        InputError: the model's weights are offloaded.
    """

    def __init__(
        self,
        model: NVSModel,
        guidance_scale: float = 3.0,
        num_query: int | None = None,
        max_norm: float | None = None,
        memory: MemoryPlan | None = None,
        graphs: bool = False,
        encoder_dtype: torch.dtype = torch.float32,
        frozen_unconditional: bool = False,
    ) -> None:
        _refuse_offloaded(model)
        self.model = model
        self.guidance_scale = guidance_scale
        self.num_query = num_query or model.num_query
        self.max_norm = max_norm
        self.memory = memory or MemoryPlan()
        model.pixels_per_call = self.memory.pixels_per_call
        self.frozen_unconditional = frozen_unconditional
        self.conditions: SupportConditions | None = None
        graphs = graphs and self.memory.graphs
        model.graphs.switch(graphs)
        self.encoder: FrozenEncoder | None = None
        half = encoder_dtype != torch.float32
        if half or (graphs and model.device.type == "cuda"):
            pixels = self.memory.half_pixels_per_call if half else self.memory.pixels_per_call
            self.encoder = FrozenEncoder(model.vae, encoder_dtype, pixels, graphs)
        self._finite = _DelayedCheck()

    def prepare(self, image: Float[Tensor, "1 3 H W"], pose: Poses, generator: torch.Generator) -> None:
        """Encode the support image in [-1, 1]; once per object.

        Raises:
            InputError: the model's weights are offloaded.
        """
        _refuse_offloaded(self.model)
        encoder = self.model.image_encoder
        encoder.to(self.model.device)
        self.conditions = prepare(self.model, image, pose, generator, frozen_unconditional=self.frozen_unconditional)
        if self.memory.offload_image_encoder and self.model.device.type == "cuda":
            encoder.to("cpu")
            torch.cuda.empty_cache()

    def __call__(
        self,
        images: Float[Tensor, "N 3 H W"],
        poses: Poses,
        step_range: tuple[float, float],
        generator: torch.Generator,
    ) -> Distillation:
        """Judge rendered views in [-1, 1]; ``N`` is a multiple of ``num_query``, consecutive views form a group.

        Args:
            step_range: smallest and largest timestep as shares of the schedule; each group draws its own in between.

        Raises:
            InputError: ``N`` is not a multiple of ``num_query``, or the network left the range of float16.
        """
        self._check_count(len(images))
        schedule = self.model.schedule
        latents = self._encode(self.model.resize(images), generator).unflatten(0, (-1, self.num_query))
        low, high = (int(schedule.num_train_timesteps * share) for share in step_range)
        high = min(max(high, low), schedule.num_train_timesteps - 1)
        timesteps = diffusion.draw_timesteps(len(latents), min(low, high), high, generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        with torch.no_grad():
            noisy = schedule.add_noise(latents, noise, timesteps)
            grouped = poses.groups(self.num_query)
            prediction = guided_prediction(
                self.model, self._prepared(), noisy, timesteps, grouped, self.guidance_scale, generator,
                self.memory.groups_per_call,
            )  # fmt: skip
            self._check_range(prediction)
            gradient = diffusion.sds_gradient(
                latents, noise, timesteps, prediction, schedule.alphas_cumprod, schedule.prediction_type, self.max_norm
            )
        loss = diffusion.sds_loss(latents.flatten(0, 1), gradient.flatten(0, 1))
        return Distillation(loss, gradient, timesteps)

    @torch.no_grad()
    def preview(
        self, images: Float[Tensor, "N 3 H W"], poses: Poses, noise_level: float, generator: torch.Generator
    ) -> Float[Tensor, "N 3 h w"]:
        """What the model would rather see from the same cameras: one-step denoising at a share of the schedule."""
        self._check_count(len(images))
        return predict_clean(
            self.model,
            self._prepared(),
            images,
            poses,
            noise_level,
            generator,
            self.guidance_scale,
            self.num_query,
            self.memory.groups_per_call,
        )

    def _encode(self, images: Float[Tensor, "N 3 H W"], generator: torch.Generator) -> Float[Tensor, "N C h w"]:
        if self.encoder is None:
            return self.model.encode(images, generator)
        return self.model.draw_latents(self.encoder(images), generator)

    def _prepared(self) -> SupportConditions:
        if self.conditions is None:
            raise RuntimeError("call prepare() with the support image before judging views")
        return self.conditions

    def _check_count(self, views: int) -> None:
        if views % self.num_query:
            raise InputError(
                f"data.random_camera.batch_size: {views} views cannot be judged in groups of {self.num_query}; "
                f"use a multiple of {self.num_query}"
            )

    def _check_range(self, prediction: Float[Tensor, "G n C h w"]) -> None:
        # float32 and bfloat16 have room for every activation.
        if self.model.dtype == torch.float16 and not self._finite(prediction):
            raise InputError(
                "system.guidance.precision: the network's prediction is not finite in float16, whose values end at "
                "65504; use bfloat16 or float32"
            )


def _refuse_offloaded(model: NVSModel) -> None:
    """A hook brings weights to the GPU for one call of their module; the passes here go around such calls."""
    if is_offloaded(model.modules()):
        raise InputError(
            "score distillation: the model's weights are offloaded (enable_model_cpu_offload or the like); load it "
            "without, and take memory 'low' where the GPU is small"
        )


class _DelayedCheck:
    """Whether tensors are finite. On a GPU the answer is that of an earlier call, so that nobody waits for it."""

    def __init__(self) -> None:
        self.answer: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def __call__(self, values: Tensor) -> bool:
        finite = values.isfinite().all()
        if values.device.type != "cuda":
            return bool(finite)
        known = True
        if self.answer is None or self.arrived is None:
            self.answer, self.arrived = torch.ones((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        elif not self.arrived.query():
            return True  # on its way; it is looked at by a later call
        else:
            known = bool(self.answer)
        self.answer.copy_(finite, non_blocking=True)
        self.arrived.record()
        return known
