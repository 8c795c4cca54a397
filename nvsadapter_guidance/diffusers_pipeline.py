"""Novel views from one image as a diffusers pipeline."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from nvsadapter_guidance import weights
from nvsadapter_guidance.adapter_model import AdapterModel
from nvsadapter_guidance.cameras import camera_convention, with_pose_convention
from nvsadapter_guidance.encoders import PromptEncoder
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.images import (
    check_image_size,
    check_output_type,
    convert_views,
    native_image_size,
    support_tensor,
)
from nvsadapter_guidance.model import NVSModel, NVSModelConfig
from nvsadapter_guidance.pipeline import Poses, SupportConditions, prepare, view_poses
from nvsadapter_guidance.sampling import OnStep, SamplingOptions, decode_views, sample_latents
from nvsadapter_guidance.sampling_defaults import GUIDANCE_SCALES, STEPS
from nvsadapter_guidance.saved_pipeline import DOWNLOAD_OPTIONS, check_tensor_names, holds_pipeline, is_hub_id
from nvsadapter_guidance.schedulers import build_scheduler
from nvsadapter_guidance.unet import MultiViewUNet
from nvsadapter_guidance.weight_files import locate

StepCallback = Callable[["NVSAdapterPipeline", int, int, dict[str, Tensor]], dict[str, Tensor]]
"""As diffusers' ``callback_on_step_end``."""


class NVSAdapterPipeline(DiffusionPipeline):
    """Images of an object from any number of cameras, given one image of it.

        pipeline = NVSAdapterPipeline.from_pretrained("auto").to("cuda")
        views = pipeline(image, elevations=[0, 0, 0, 0], azimuths=[30, 60, 90, 120]).images

    Components are those of Stable Diffusion, so schedulers can be exchanged
    (``pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)``), and the methods of every
    diffusers pipeline work: ``to``, ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``,
    ``save_pretrained``. The adapter takes part in every network call and is therefore never offloaded.

    Images are taken as they are, as the release does: the object should lie in the middle and fill about two thirds of
    the side, as in training (``threedrec.image.load_support_view`` cuts a photograph out and frames it so).

    Only a pipeline that was loaded from a released checkpoint, or from an adapter with its base model, understands
    prompts: ``save_pretrained`` writes the tokens of the empty prompt and leaves the text encoder out. A pipeline
    loaded from there ignores a prompt with a warning.

    Args:
        vae, image_encoder, unet: networks; the adapter joins the UNet here.
        adapter: the NVS-Adapter.
        scheduler: any of diffusers' for the model's noise schedule, see `schedulers.build_scheduler`.
        model_config: fields of `NVSModelConfig`: resolution, cameras and other conventions of the weights.
        pose_convention: see `cameras.with_pose_convention`.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _exclude_from_cpu_offload = ["adapter"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNet2DConditionModel,
        adapter: AdapterModel,
        scheduler: Any,
        model_config: dict[str, Any] | None = None,
        pose_convention: str = "training",
    ) -> None:
        super().__init__()
        if model_config is None:
            raise InputError(
                "model_config: missing; load the pipeline from a folder, or use NVSAdapterPipeline.from_model"
            )
        self.register_modules(vae=vae, image_encoder=image_encoder, unet=unet, adapter=adapter, scheduler=scheduler)
        self.register_to_config(model_config=model_config, pose_convention=pose_convention)
        adapter.adapter.attach(unet)
        try:
            self._config = NVSModelConfig(**model_config)
        except TypeError as error:
            raise InputError(f"model_config: {error}; save the pipeline again") from error
        self._shell = NVSModel.blank(self._config)
        self.prompt_encoder: PromptEncoder | None = None
        self._shell.convention = with_pose_convention(self._shell.convention, pose_convention)

    @classmethod
    def from_model(cls, model: NVSModel, scheduler: str = "euler") -> "NVSAdapterPipeline":
        """Wrap a loaded model; tensors are shared, not copied.

        Raises:
            InputError: there is no scheduler of that name.
        """
        trained = camera_convention(model.network.adapter.config.camera_convention)
        pipeline = cls(
            vae=model.vae,
            image_encoder=model.image_encoder,
            unet=model.network.unet,
            adapter=AdapterModel.of(model),
            scheduler=build_scheduler(scheduler, model.schedule),
            model_config=json.loads(json.dumps(dataclasses.asdict(model.config))),
            pose_convention="training" if model.convention == trained else "released-sampling",
        )
        pipeline.prompt_encoder = model.prompt_encoder
        return pipeline

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] = "auto", **options: Any
    ) -> "NVSAdapterPipeline":
        """Load a pipeline saved by ``save_pretrained``, or any weights that `weights.load_model` knows.

        Args:
            pretrained_model_name_or_path: ``auto``, ``mini``, ``released``, a checkpoint file, a model folder, a folder
                of ``save_pretrained``, or the hub id of one.
            options: with a saved pipeline those of diffusers; otherwise ``dtype`` and those of `load_model`. Without a
                ``dtype`` all networks are in float32.

        Raises:
            InputError: the weights are missing, damaged or not known.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if name not in weights.KEYWORDS and (place := locate(name)).exists():
            name = str(place)
        if not is_hub_id(name) and not holds_pipeline(Path(name)):
            dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
            return cls.from_model(weights.load_model(name, dtype=dtype, **options))
        asked = options.get("dtype") or options.get("torch_dtype")
        for key in ("dtype", "torch_dtype"):
            if isinstance(options.get(key), torch.dtype):
                options[key] = {"default": options[key], "vae": torch.float32}
        try:
            if is_hub_id(name):
                name = os.fspath(cls.download(name, **{k: v for k, v in options.items() if k in DOWNLOAD_OPTIONS}))
            check_tensor_names(Path(name))
            pipeline = super().from_pretrained(name, **options)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{name}: cannot be loaded as a pipeline ({reason}); save it again") from error
        # Of components saved in half precision, transformers keeps that and diffusers does not.
        return pipeline if asked else pipeline.to(torch.float32)

    @property
    def model(self) -> NVSModel:
        """The components as one `NVSModel`, as sampling and score distillation use it."""
        model, adapter = self._shell, self.adapter
        model.config = self._config
        model.network = MultiViewUNet(self.unet, adapter.adapter)
        model.vae, model.image_encoder, model.text_context = self.vae, self.image_encoder, adapter.text_context
        model.prompt_encoder = self.prompt_encoder
        return model.eval()

    @property
    def native_image_size(self) -> int | None:
        """Side of the only images that the model knows, in pixels; None where any multiple of 64 or so works."""
        return native_image_size(self._config)

    def to(self, *args: Any, **options: Any) -> "NVSAdapterPipeline":
        """Move to a device, or change the precision of the networks.

        As in `NVSModel.to` a dtype leaves the autoencoder and the adapter's ray convolutions in float32.
        """
        options.pop("silence_dtype_warnings", None)
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
        device, positional, _, _ = torch._C._nn._parse_to(*args, **options)
        if device is not None:
            super().to(device)
        if positional or dtype:
            self.model.to(positional or dtype)
        return self

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        elevations: Sequence[float],
        azimuths: Sequence[float],
        distances: Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_query: int | None = None,
        prompt: str = "",
        generator: torch.Generator | None = None,
        image_size: int | None = None,
        latents: Float[Tensor, "V C h w"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        rotating_groups: bool = False,
        groups_per_call: int = 8,
        graph: str = "auto",
        noise_scale: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample views. The support image is taken to be seen from elevation 0, azimuth 0, at the training distance.

        Args:
            image: the support image, see `images.support_tensor`.
            elevations, azimuths: degrees, one of each per view; azimuths grow counter-clockwise seen from above.
            distances: of the cameras from the object, in its diameters; None for the training distance.
            num_inference_steps: of the scheduler; None for 50 as released, or 20 with the embedded model.
            guidance_scale: of classifier-free guidance, 1 is the conditional prediction alone; None for 3 as released,
                or 1 with the embedded model.
            num_query: views sampled together; None for as many as the model was trained with.
            prompt: for the text encoder; the release always leaves it empty.
            generator: of every random draw, on the CPU or the pipeline's device; None draws from torch's global one.
            image_size: side of the views in pixels; None for that of training.
            latents: unit gaussian to start from, one per view in order; None draws it.
            output_type: ``pil``, ``np`` (V, H, W, 3), ``pt`` (V, 3, H, W), both in [0, 1], or ``latent``.
            return_dict: False returns a tuple.
            callback_on_step_end: called as in diffusers, ``(pipeline, index, timestep, {"latents": ...})``; latents in
                the dictionary it returns replace the step's.
            rotating_groups: views change their groups of ``num_query`` from step to step, so that more than
                ``num_query`` views agree with each other; False keeps groups of neighbours, as released.
            groups_per_call: groups in one network call; fewer need less memory.
            graph: ``auto`` makes CUDA graphs on a GPU unless the networks are offloaded, ``off`` makes none.
            noise_scale: factor on the noise to start from, 1 is that of training; None for what suits the weights.

        Raises:
            InputError: an argument cannot be used (named).
        """
        steps, scale = self._steps_and_scale(num_inference_steps, guidance_scale)
        options = SamplingOptions(steps, scale, num_query, rotating_groups, groups_per_call, noise_scale)
        model, device = self._model_for(image_size, graph, output_type), self._execution_device
        poses = _view_poses(elevations, azimuths, distances, model.config.distance, device)
        generator = _generator_on(device, generator)
        conditions = _support_conditions(model, image, prompt, generator, device)
        with self.progress_bar(total=steps) as progress:
            on_step = self._reporter(progress, callback_on_step_end)
            sampled = sample_latents(model, conditions, poses, generator, options, self.scheduler, latents, on_step)
        result = sampled if output_type == "latent" else convert_views(decode_views(model, sampled), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _steps_and_scale(self, steps: int | None, scale: float | None) -> tuple[int, float]:
        """Both as given; where they are not, what suits the weights."""
        family = self._config.family
        return STEPS[family] if steps is None else steps, GUIDANCE_SCALES[family] if scale is None else scale

    def _model_for(self, image_size: int | None, graph: str, output_type: str) -> NVSModel:
        """The model as one call wants it, after a look at that call's other words."""
        check_output_type(output_type)
        if graph not in ("auto", "off"):
            raise InputError(f"graph '{graph}' is unknown; use auto or off")
        size = self._config.image_size if image_size is None else image_size
        check_image_size(size, self._config)
        model = self.model
        model.config = dataclasses.replace(self._config, image_size=size)
        model.graphs.switch(graph == "auto")
        return model

    def _reporter(self, progress: Any, callback: StepCallback | None) -> OnStep:
        """What sampling calls after every step: the progress bar, then the caller's own function."""

        def on_step(index: int, timestep: int, values: Tensor) -> Tensor | None:
            progress.update()
            if callback is None:
                return None
            changed = callback(self, index, timestep, {"latents": values}) or {}
            return changed.get("latents")

        return on_step


def _view_poses(elevations: Any, azimuths: Any, distances: Any, default: float, device: torch.device) -> Poses:
    degrees = _numbers("elevations", elevations), _numbers("azimuths", azimuths)
    places = None if distances is None else _numbers("distances", distances)
    return view_poses(*degrees, places, default, device)


def _support_conditions(
    model: NVSModel, image: Any, prompt: str, generator: torch.Generator, device: torch.device
) -> SupportConditions:
    pixels = support_tensor(image, model.config.image_size).to(device)
    front = view_poses([0.0], [0.0], [model.config.distance], device=device)
    return prepare(model, pixels, front, generator, prompt)


def _numbers(name: str, values: Any) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: give a list of numbers, one per view ({error})") from error


def _generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """The generator itself where it is of the device, else one seeded from it (or from torch's global one)."""
    if not isinstance(generator, torch.Generator | None):
        raise InputError(f"generator: is of type {type(generator).__name__}; give one torch.Generator for all views")
    if generator is not None and generator.device.type == device.type:
        return generator
    where = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=where))
    return torch.Generator(device).manual_seed(seed)
