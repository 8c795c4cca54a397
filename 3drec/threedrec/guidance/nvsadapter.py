"""The NVS-Adapter as a guidance: sampled views for the warm start, score distillation after it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import memory_plan
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses
from nvsadapter_guidance.sampling import sample
from nvsadapter_guidance.weight_files import locate
from nvsadapter_guidance.weights import choose_weights, is_checkpoint, load_model
from threedrec.cameras import Cameras
from threedrec.errors import InputError
from threedrec.guidance.protocol import GuidanceOutput
from threedrec.image import SupportView
from threedrec.schedules import Schedule, value_at
from threedrec.warm_start import WarmStartConfig

logger = logging.getLogger(__name__)

PREVIEW_NOISE = 0.5
"""Share of the noise schedule from which previews are denoised."""


@dataclass
class NVSAdapterGuidanceConfig:
    """``system.guidance``; names and defaults of the released project, and a few of ours."""

    pretrained: str = "auto"
    """``auto`` (released weights when found, otherwise the embedded model), ``mini``, ``released``, or a path."""
    pretrained_model_name_or_path: str = ""
    """The released project's name for a checkpoint file; wins over ``pretrained`` when set."""
    pretrained_config: str = ""
    """The released project's configuration beside its checkpoint."""
    cond_image_path: str = ""
    """Declared by the released project; the support view is always ``data.image_path``."""
    cond_elevation_deg: float = 0.0
    cond_azimuth_deg: float = 0.0
    cond_camera_distance: float = 1.5
    cond_fovy_deg: float = 49.1
    guidance_scale: float = field(default=3.0, metadata={"ge": 0})
    """Classifier-free guidance of score distillation."""
    min_step_percent: Schedule = field(default=0.02, metadata={"ge": 0, "le": 1})
    """Smallest noise, as a share of the schedule."""
    max_step_percent: Schedule = field(default=0.98, metadata={"ge": 0, "le": 1})
    """Largest noise, as a share of the schedule."""
    num_query: int = field(default=4, metadata={"ge": 1})
    """Views judged together."""
    grad_clip: Optional[Schedule] = field(default=None, metadata={"ge": 0})
    """Largest entry of the gradient on the latents; None for no clipping."""
    pose_convention: Literal["training", "released-sampling"] = "training"
    """Signs of relative camera poses: as in training, or as in the released sampling script."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network and the image encoder; ``auto`` is float16 for full-size weights on a GPU, otherwise float32."""
    memory: Literal["auto", "normal", "low"] = "auto"
    """How much is judged at a time: ``low`` takes less GPU memory and longer for the same result; ``auto`` is ``low``
    on GPUs of less than 14 GB (`docs/memory.md`)."""
    encoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder that rendered views go through; ``auto`` is bfloat16 where the network runs in half precision on a
    GPU, otherwise float32."""
    unconditional: Literal["fresh", "frozen"] = "fresh"
    """What unconditional samples of released weights see in place of the support view: noise drawn at every call, as
    released, or noise drawn once an object, for an eighth less work."""
    graph: Literal["auto", "off"] = "auto"
    """CUDA graphs: ``auto`` makes them on a GPU unless ``memory`` is low, ``off`` makes none."""
    warm_start: WarmStartConfig = field(default_factory=lambda: WarmStartConfig(enabled=False))
    """Sample views and fit the field to them first."""


class NVSAdapterGuidance:
    """Implements ``threedrec.guidance.protocol.Guidance`` and ``ViewSampler``.

    Raises:
        InputError: the weights are missing, damaged, or of a kind that cannot be loaded.
    """

    Config = NVSAdapterGuidanceConfig

    def __init__(self, config: NVSAdapterGuidanceConfig, device: torch.device) -> None:
        self.config = config
        pretrained = config.pretrained_model_name_or_path or config.pretrained
        choice = choose_weights(pretrained)
        if config.pretrained_config and not is_checkpoint(choice.path):
            raise InputError(
                "system.guidance.pretrained_config: goes with a released checkpoint alone, not with "
                f"{choice.path}; set it to ''"
            )
        logger.info("guidance: %s", choice.reason)
        self.model = load_model(
            pretrained,
            config=str(locate(config.pretrained_config)) if config.pretrained_config else None,
            dtype=guidance_dtype(config.precision, choice.family, device),
            device=device,
            pose_convention=config.pose_convention,
        )
        self.description = f"{self.model.config.name} ({choice.reason.split(';')[0]})"
        plan = memory_plan(config.memory, device)
        self.distillation = ScoreDistillation(
            self.model,
            config.guidance_scale,
            config.num_query,
            memory=plan,
            graphs=config.graph == "auto",
            encoder_dtype=encoder_dtype(config.encoder_precision, self.model),
            frozen_unconditional=config.unconditional == "frozen",
        )

    @staticmethod
    def model_family(pretrained: str) -> str:
        """``mini`` or ``released``: what ``pretrained`` leads to, without loading it."""
        return choose_weights(pretrained).family

    def prepare(self, support: SupportView) -> None:
        """Encode the support view; its posterior sample comes from a generator of its own, seeded with zero."""
        generator = torch.Generator(self.model.device).manual_seed(0)
        image = _to_model(support.rgb[None]).to(self.model.device)
        self.distillation.prepare(image, _poses(support.camera, self.model.device), generator)

    def __call__(
        self, rgb: Float[Tensor, "B H W 3"], cameras: Cameras, step: int, generator: torch.Generator
    ) -> GuidanceOutput:
        """Score distillation on rendered views."""
        clip = self.config.grad_clip
        self.distillation.max_norm = None if clip is None else value_at(clip, step)
        shares = value_at(self.config.min_step_percent, step), value_at(self.config.max_step_percent, step)
        result = self.distillation(_to_model(rgb), _poses(cameras, rgb.device), shares, generator)
        timestep = result.timesteps.float().mean()
        return GuidanceOutput(result.loss, {"grad_norm": result.gradient_norm, "timestep": timestep})

    def preview(
        self, rgb: Float[Tensor, "B H W 3"], cameras: Cameras, step: int, generator: torch.Generator
    ) -> Float[Tensor, "B H W 3"]:
        """One-step denoising of rendered views."""
        images = self.distillation.preview(_to_model(rgb), _poses(cameras, rgb.device), PREVIEW_NOISE, generator)
        return _from_model(images)

    def sample_views(
        self,
        cameras: Cameras,
        generator: torch.Generator,
        num_inference_steps: int,
        guidance_scale: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "B H W 3"]:
        """Sample views in overlapping groups; call :meth:`prepare` first."""
        if self.distillation.conditions is None:
            raise RuntimeError("call prepare() with the support image before sampling views")
        device = self.model.device
        images = sample(
            self.model,
            self.distillation.conditions,
            _poses(cameras, device),
            generator,
            num_inference_steps,
            guidance_scale,
            # On the CPU one group at a time stays in its caches.
            groups_per_call=(self.distillation.memory.groups_per_call or 8) if device.type == "cuda" else 1,
            on_step=on_step,
        )
        return _from_model(images)


def guidance_dtype(precision: str, family: str, device: torch.device) -> torch.dtype:
    """What ``system.guidance.precision`` means for a model family (``mini``, ``released``) on a device."""
    if precision == "auto":
        return torch.float16 if family == "released" and device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def encoder_dtype(precision: str, model: NVSModel) -> torch.dtype:
    """What ``system.guidance.encoder_precision`` means for a model, where it is and in its precision."""
    if precision == "auto":
        half = model.device.type == "cuda" and model.dtype != torch.float32
        return torch.bfloat16 if half else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def _poses(cameras: Cameras, device: torch.device) -> Poses:
    return Poses(cameras.azimuth.to(device), cameras.elevation.to(device), cameras.distance.to(device))


def _to_model(rgb: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    return rgb.permute(0, 3, 1, 2) * 2.0 - 1.0


def _from_model(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W 3"]:
    return (images.permute(0, 2, 3, 1) + 1.0) / 2.0
