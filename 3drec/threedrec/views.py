"""``3drec views``: images of the object from any camera, a contact sheet and an orbit video, from one image of it."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvsadapter_guidance.sampling_defaults import GUIDANCE_SCALES, STEPS
from threedrec.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
    from nvsadapter_guidance.weights import WeightsChoice

logger = logging.getLogger(__name__)

DEFAULT_COUNT = 8
DTYPES = ("auto", "fp32", "fp16", "bf16")
OFFLOADS = ("none", "model", "sequential")


@dataclass
class ViewsJob:
    """One command, before anything is read; None stands for the default of the model at hand."""

    image: str
    output: str
    elevations: Sequence[float] | None = None
    """Degrees; None for the object's equator."""
    azimuths: Sequence[float] | None = None
    """Degrees; None for directions spread evenly around the object."""
    distances: Sequence[float] | None = None
    count: int | None = None
    """How many directions where neither elevations nor azimuths are given."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    noise_scale: float | None = None
    num_query: int | None = None
    scheduler: str = "euler"
    prompt: str = ""
    seed: int = 0
    resolution: int | None = None
    """Side of the pictures in pixels; None for the model's own."""
    pretrained: str = "auto"
    config: str | None = None
    """The released YAML beside a released checkpoint."""
    use_ema: bool = True
    pose_convention: str | None = None
    gpu: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    as_released: bool = False
    """With released weights: images prepared, views grouped and bytes rounded as the released script does."""


def run(job: ViewsJob) -> Path:
    """Sample the views and write ``000.png, 001.png, …``, ``sheet.png``, ``orbit.mp4`` and ``views.json``.

    Returns:
        The folder.

    Raises:
        InputError: any mistake in the numbers, the image, the weights or the output folder.
    """
    elevations, azimuths = check_views(job)
    check_choices(job)
    from nvsadapter_guidance.weights import choose_weights
    from threedrec.launch import choose_device, ensure_writable

    folder = Path(job.output)
    device = choose_device(job.gpu)
    if device.type == "cpu":
        from threedrec.threads import choose_threads

        choose_threads()
    _check_image(job.image, folder, len(elevations))
    choice = choose_weights(job.pretrained)
    check_weights_options(job, choice.path)
    released = job.as_released and choice.family == "released"
    # The image is read and the folder tried before the model: a mistake should not cost the wait.
    shown = _read_image(job.image, released)
    is_new = not folder.exists()
    ensure_writable(folder)
    try:
        pipeline = load_pipeline(job, choice.path, choice.family, device)
        _sample(job, pipeline, shown, elevations, azimuths, choice)
    except InputError:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return folder


def _sample(
    job: ViewsJob,
    pipeline: "NVSAdapterPipeline",
    shown: "Image.Image",
    elevations: Sequence[float],
    azimuths: Sequence[float],
    choice: "WeightsChoice",
) -> None:
    from threedrec.view_files import pictures_of, view_records, write_views

    released = job.as_released and choice.family == "released"
    steps = STEPS[choice.family] if job.num_inference_steps is None else job.num_inference_steps
    scale = GUIDANCE_SCALES[choice.family] if job.guidance_scale is None else job.guidance_scale
    device, start = pipeline._execution_device, time.perf_counter()
    count = "1 view" if len(elevations) == 1 else f"{len(elevations)} views"
    with progress_bar(count, steps) as advance:

        def on_step(*_: Any) -> dict[str, Any]:
            advance(1)
            return {}

        pixels = pipeline(
            shown,
            elevations,
            azimuths,
            job.distances,
            num_inference_steps=steps,
            guidance_scale=scale,
            noise_scale=job.noise_scale,
            num_query=job.num_query,
            prompt=job.prompt,
            generator=_generator(device, job.seed),
            image_size=job.resolution if pipeline.native_image_size is None else None,
            output_type="np",
            callback_on_step_end=on_step,
            rotating_groups=not released,
            groups_per_call=8 if device.type == "cuda" else 1,
        )[0]
    seconds = time.perf_counter() - start
    pictures = pictures_of(pixels, job.resolution, truncate=released)
    distances = job.distances or [pipeline.config.model_config["distance"]] * len(elevations)
    record = _settings(job, pipeline, choice.path) | {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "noise_scale": pipeline.model.config.sampling_noise if job.noise_scale is None else job.noise_scale,
        "resolution": pictures[0].width,
        "device": str(device),
        "seconds": round(seconds, 2),
        "views": view_records(elevations, azimuths, distances),
    }
    write_views(Path(job.output), pictures, shown, record)
    logger.info("%s in %.1f s, in %s", count, seconds, job.output)


def _settings(job: ViewsJob, pipeline: "NVSAdapterPipeline", path: Path) -> dict[str, Any]:
    """The part of the record that is known before sampling."""
    from nvsadapter_guidance.weights import is_checkpoint

    return {
        "image": str(job.image),
        "model": pipeline.config.model_config["name"],
        "weights": str(path),
        "use_ema": job.use_ema if is_checkpoint(path) else None,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "pose_convention": pipeline.config.pose_convention,
        "prompt": job.prompt,
        "scheduler": job.scheduler,
        "num_query": job.num_query or pipeline.model.num_query,
        "seed": job.seed,
    }


def default_folder(image: str) -> str:
    """Where views go when no folder is named: ``outputs/views/<image>``."""
    from threedrec.lookup import output_root

    return str(output_root("outputs") / "views" / (Path(image).stem or "image"))


def check_views(job: ViewsJob) -> tuple[list[float], list[float]]:
    """Elevations and azimuths of a job, one of each per view.

    Raises:
        InputError: their numbers differ, or there are none.
    """
    given = [values for values in (job.elevations, job.azimuths, job.distances) if values is not None]
    if job.count is not None and given:
        raise InputError("--count: spreads views around the object; leave out --elevations, --azimuths and --distances")
    count = len(given[0]) if given else DEFAULT_COUNT if job.count is None else job.count
    if count < 1:
        raise InputError(f"{count} views: ask for one or more")
    elevations = [0.0] * count if job.elevations is None else list(job.elevations)
    azimuths = [360.0 * i / count for i in range(count)] if job.azimuths is None else list(job.azimuths)
    if len(elevations) != len(azimuths):
        raise InputError(
            f"--elevations: {len(elevations)} given beside {len(azimuths)} --azimuths; give one of each per view"
        )
    from nvsadapter_guidance.pipeline import view_poses

    view_poses(elevations, azimuths, job.distances)
    return elevations, azimuths


def load_pipeline(job: ViewsJob, path: Path, family: str, device: Any) -> "NVSAdapterPipeline":
    """The pipeline on its device, in its precision.

    Raises:
        InputError: the weights cannot be used.
    """
    from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
    from nvsadapter_guidance.schedulers import build_scheduler

    dtype = choose_dtype(job, family, device)
    options: dict[str, Any] = {"config": job.config, "pose_convention": job.pose_convention, "dtype": dtype}
    given = {key: value for key, value in options.items() if value is not None}
    if path.is_file():
        with progress_bar("reading weights", path.stat().st_size, in_bytes=True) as advance:
            given |= {"use_ema": job.use_ema, "on_bytes": advance}
            pipeline = NVSAdapterPipeline.from_pretrained(path, **given)
    else:
        pipeline = NVSAdapterPipeline.from_pretrained(path, **given)
    pipeline.scheduler = build_scheduler(job.scheduler, pipeline.model.schedule)
    pipeline.set_progress_bar_config(disable=True)
    if job.offload == "none" or device.type == "cpu":
        return pipeline.to(device)
    offload = {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}
    offload[job.offload](device=device)
    return pipeline


def choose_dtype(job: ViewsJob, family: str, device: "torch.device") -> "torch.dtype":
    """The precision asked for; ``auto`` is float16 for released weights on a GPU, but float32 in the released script.

    Raises:
        InputError: float16 on the CPU.
    """
    import torch

    half = torch.float16 if device.type == "cuda" and family == "released" and not job.as_released else torch.float32
    dtype = {"auto": half, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[job.dtype]
    if device.type == "cpu" and dtype == torch.float16:
        raise InputError("--dtype fp16: the CPU has no fast half precision; use fp32 or bf16")
    return dtype


@contextmanager
def progress_bar(title: str, total: int, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, and a function that moves it on.

    A bar of bytes, which may end early because not every byte is of use, disappears in the end.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=4, transient=in_bytes, disable=quiet) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(task, amount)


def check_choices(job: ViewsJob) -> None:
    """Raise InputError unless the sampler, the numbers and the precision are known and in range."""
    from nvsadapter_guidance.sampling import SamplingOptions
    from nvsadapter_guidance.schedulers import SCHEDULERS

    known = {"scheduler": tuple(SCHEDULERS), "dtype": DTYPES, "offload": OFFLOADS}
    for name, choices in known.items():
        if getattr(job, name) not in choices:
            raise InputError(f"--{name} {getattr(job, name)}: unknown; use one of {', '.join(choices)}")
    steps, scale = job.num_inference_steps, job.guidance_scale
    numbers = (1 if steps is None else steps, 1.0 if scale is None else scale, job.num_query)
    SamplingOptions(*numbers, noise_scale=job.noise_scale)
    if steps is not None and steps > 1000:
        raise InputError(f"number of sampling steps is {steps}; use 1 to 1000")
    if job.resolution is not None and not 16 <= job.resolution <= 4096:
        raise InputError(f"--resolution {job.resolution}: use 16 to 4096 pixels")
    if not -(2**63) <= job.seed < 2**63:
        raise InputError(f"--seed {job.seed}: use a number of at most 63 bits")


def check_weights_options(job: ViewsJob, path: Path) -> None:
    """Raise InputError where an option asks for what the weights at ``path`` do not have."""
    from nvsadapter_guidance.images import check_image_size, native_image_size
    from nvsadapter_guidance.weights import is_checkpoint, model_config

    # The released script takes the raw weights unless told otherwise, so there they are nothing that was asked for.
    asks_raw = not job.use_ema and not job.as_released
    for asked, option in ((job.config is not None, f"configuration {job.config}"), (asks_raw, "--raw")):
        if asked and not is_checkpoint(path):
            raise InputError(f"{option}: goes with a released checkpoint alone, not with {path}; leave it out")
    if job.resolution is not None:
        config = model_config(path, job.config)
        if native_image_size(config) is None:
            check_image_size(job.resolution, config, "--resolution")


def _check_image(image: str, folder: Path, count: int) -> None:
    if not image:
        raise InputError("image: none given; name a PNG, JPEG or WebP file")
    from threedrec.view_files import view_name

    path = Path(image)
    if not path.is_file():
        raise InputError(f"{image}: {'is a folder' if path.is_dir() else 'no such file'}; give an image of the object")
    targets = {(folder / view_name(i)).resolve() for i in range(count)}
    if path.resolve() in targets:
        raise InputError(f"{image}: a view would take its place; choose another output folder")


def _read_image(path: str, released: bool) -> "Image.Image":
    """The support image: raw for the released preparation, else cut out, centred and framed on white."""
    from PIL import Image

    from threedrec.image import SingleImageConfig, load_support_view
    from threedrec.preprocess.reading import read_rgba

    if released:
        return Image.fromarray((read_rgba(path) * 255.0).round().astype("uint8"))
    view = load_support_view(SingleImageConfig(image_path=path), size=512)
    return Image.fromarray((view.rgb * 255.0).round().byte().numpy())


def _generator(device: Any, seed: int) -> Any:
    import torch

    return torch.Generator(device).manual_seed(seed)
