"""Evaluations from the command line: what is read, what is written, and the progress in between."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvsadapter_guidance.sampling_defaults import GUIDANCE_SCALES, STEPS
from threedrec.errors import InputError
from threedrec.files import atomic_path, read_json, write_json
from threedrec.views import ViewsJob, check_choices, check_weights_options, load_pipeline, progress_bar

if TYPE_CHECKING:
    import torch

    from nvsadapter_guidance.evaluation.image_metrics import Lpips
    from nvsadapter_guidance.evaluation.imagine import PipelineImagine
    from nvsadapter_guidance.evaluation.truth import TruthRenderer
    from nvsadapter_guidance.evaluation.view_scores import Evaluation

logger = logging.getLogger(__name__)

METRICS, GRID, SETTINGS, OBJECTS = "metrics.json", "grid.png", "settings.json", "objects"
GRID_OBJECTS = 12
Skipped = list[dict[str, str]]
"""Name and reason of what could not be scored."""


@dataclass(frozen=True)
class ViewsEvaluation:
    """One evaluation of imagined views, before anything is read; None stands for the default of the weights."""

    objects: str
    output: str
    weights: str = "auto"
    weights_config: str | None = None
    views: int = 16
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str = "euler"
    seed: int = 0
    fit: str = "sphere"
    renderer: str = "vtk"
    limit: int | None = None
    training_views: str | None = None
    lpips: str | None = None
    dtype: str = "auto"
    gpu: str = "auto"


def views(job: ViewsEvaluation) -> Skipped:
    """Render objects, imagine their views and score them; writes ``metrics.json``, ``grid.png`` and ``objects/``.

    Returns:
        the objects that were skipped.

    Raises:
        InputError: an option, the weights or all objects cannot be used, or the folder holds another evaluation.
    """
    from nvsadapter_guidance.evaluation.baselines import check_training_views, load_training_views
    from nvsadapter_guidance.evaluation.truth import SUPERSAMPLE, TruthRenderer, evaluation_views
    from nvsadapter_guidance.evaluation.view_scores import score_objects
    from nvsadapter_guidance.training.mesh_files import find_meshes
    from nvsadapter_guidance.training.render_check import check_rendering
    from nvsadapter_guidance.training.render_folder import RENDERERS, open_renderer
    from nvsadapter_guidance.weights import choose_weights
    from threedrec.launch import choose_device, ensure_writable

    cameras = evaluation_views(job.views)
    meshes = dict(list(find_meshes([Path(job.objects)]).items())[: _limit(job.limit)])
    sampling = _sampling(job)
    check_choices(sampling)
    device = choose_device(job.gpu)
    choice = choose_weights(job.weights)
    check_weights_options(sampling, choice.path)
    if job.renderer not in RENDERERS:
        raise InputError(f"--renderer {job.renderer}: unknown; use one of {', '.join(RENDERERS)}")
    if job.renderer == "vtk":
        check_rendering()
    if job.training_views:
        check_training_views(Path(job.training_views))
    lpips = _lpips(job.lpips, device)
    output = Path(job.output)
    family = "mini" if choice.family == "mini" else "released"
    settings = _settings(job, family, choice.path)
    ensure_writable(output)
    _keep_settings(output, settings)
    imagine = _imagine(job, load_pipeline(sampling, choice.path, family, device), settings)
    size = imagine.pipeline.model.config.image_size
    training = load_training_views(Path(job.training_views), size) if job.training_views else None
    start = time.perf_counter()
    renderer = open_renderer(job.renderer, size, SUPERSAMPLE)  # type: ignore[arg-type]
    evaluation = _run(meshes, TruthRenderer(cameras, renderer, job.fit), imagine, output)  # type: ignore[arg-type]
    with progress_bar("scores", len(evaluation.folders)) as advance:
        scores = score_objects(evaluation.folders, cameras, lpips, training, lambda: advance(1))
    about = {**settings, "size": size, "device": str(device), "seconds": round(time.perf_counter() - start, 1)}
    write_json(output / METRICS, {"settings": about, **scores, "skipped": evaluation.skipped})
    _write_grid(output / GRID, evaluation.folders, scores["objects"], cameras)
    _say_views(output, scores)
    return evaluation.skipped


def pairs(folder: str, output: str, backbone: str | None) -> Skipped:
    """Score pictures against their targets; writes ``metrics.json``.

    Returns:
        the pairs that were skipped.

    Raises:
        InputError: there is no pair, or none can be scored.
    """
    from nvsadapter_guidance.evaluation.pairs import find_pairs, mean_row, score_pairs
    from threedrec.launch import choose_device, ensure_writable

    found = find_pairs(Path(folder))
    lpips = _lpips(backbone, choose_device("auto"))
    rows: list[dict[str, Any]] = []
    skipped: Skipped = []
    with progress_bar(f"{len(found)} pairs", len(found)) as advance:
        for problem in score_pairs(found, lpips, rows):
            advance(1)
            skipped += [problem] if problem else []
    mean = mean_row(rows)
    ensure_writable(Path(output))
    settings = {"pairs": folder, "lpips": backbone}
    write_json(Path(output) / METRICS, {"settings": settings, "mean": mean, "objects": rows, "skipped": skipped})
    logger.info("%d pairs: %s; %s", len(rows), _words(mean), Path(output) / METRICS)
    return skipped


def meshes(predictions: str, truth: str, output: str, aligned: bool = True) -> Skipped:
    """Score reconstructed meshes against true ones; writes ``metrics.json``.

    Returns:
        the objects that were skipped.

    Raises:
        InputError: a folder is missing, or no pair can be scored.
    """
    from nvsadapter_guidance.evaluation.mesh_metrics import GRID as VOXELS
    from nvsadapter_guidance.evaluation.mesh_metrics import POINTS
    from nvsadapter_guidance.evaluation.mesh_scores import MeshEvaluation, find_truth, mean_scores, score_files
    from threedrec.launch import ensure_writable

    if not Path(predictions).is_dir():
        raise InputError(f"--predictions {predictions}: no such folder")
    files, result = find_truth(Path(truth)), MeshEvaluation()
    ensure_writable(Path(output))
    with progress_bar(f"{len(files)} meshes", len(files)) as advance:
        for _ in score_files(Path(predictions), files, result, Path(output) / OBJECTS, aligned):
            advance(1)
    mean = mean_scores(result.rows)
    settings = {"predictions": predictions, "truth": truth, "points": POINTS, "voxels": VOXELS}
    found = {"settings": settings, "mean": mean, "objects": result.rows, "skipped": result.skipped}
    write_json(Path(output) / METRICS, found)
    logger.info("%d meshes: %s; %s", len(result.rows), _words(mean), Path(output) / METRICS)
    return result.skipped


def _limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: use 1 or more")
    return limit


def _sampling(job: ViewsEvaluation) -> ViewsJob:
    """The same weights and sampler as ``3drec views`` would take."""
    return ViewsJob(
        image="",
        output=job.output,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        scheduler=job.scheduler,
        seed=job.seed,
        pretrained=job.weights,
        config=job.weights_config,
        gpu=job.gpu,
        dtype=job.dtype,
    )


def _settings(job: ViewsEvaluation, family: str, weights: Path) -> dict[str, Any]:
    """All that imagined views depend on."""
    return {
        "weights": job.weights,
        "weights_stamp": _stamp(weights),
        "views": job.views,
        "steps": STEPS[family] if job.steps is None else job.steps,
        "guidance_scale": GUIDANCE_SCALES[family] if job.guidance_scale is None else job.guidance_scale,
        "scheduler": job.scheduler,
        "seed": job.seed,
        "fit": job.fit,
        "renderer": job.renderer,
        "dtype": job.dtype,
    }


def _stamp(path: Path) -> str:
    """Tells weights from others at the same place, without reading gigabytes: size and time of their files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [file.stat() for file in files if file.is_file()]
    return f"{sum(state.st_size for state in states)}-{max(state.st_mtime_ns for state in states)}"


def _keep_settings(output: Path, settings: dict[str, Any]) -> None:
    """Record what a folder's views were made with, and refuse to mix."""
    path = output / SETTINGS
    earlier = read_json(path) if path.exists() else settings
    changed = [key for key in settings if not isinstance(earlier, dict) or earlier.get(key) != settings[key]]
    if changed:
        raise InputError(f"{output}: holds an evaluation with another {', '.join(changed)}; choose another folder")
    write_json(path, settings)


def _imagine(job: ViewsEvaluation, pipeline: Any, settings: dict[str, Any]) -> "PipelineImagine":
    from nvsadapter_guidance.evaluation.imagine import PipelineImagine

    return PipelineImagine(pipeline, settings["steps"], settings["guidance_scale"], job.seed)


def _run(meshes: dict[str, Path], render: "TruthRenderer", imagine: "PipelineImagine", output: Path) -> "Evaluation":
    """Imagine all objects; the bar moves with every step of sampling, and by whole objects that are there."""
    from dataclasses import replace

    from nvsadapter_guidance.evaluation.view_scores import Evaluation, imagine_objects

    result, moved = Evaluation(), 0
    with progress_bar(f"{len(meshes)} objects", len(meshes) * imagine.steps) as advance:

        def step() -> None:
            nonlocal moved
            moved += 1
            advance(1)

        stepping = replace(imagine, on_step=step)
        for count, _ in enumerate(imagine_objects(meshes, render, stepping, output / OBJECTS, result), start=1):
            rest = count * imagine.steps - moved
            moved += rest
            advance(rest)
    return result


def _lpips(backbone: str | None, device: "torch.device") -> "Lpips | None":
    from nvsadapter_guidance.evaluation.image_metrics import load_lpips

    return None if backbone is None else load_lpips(backbone, device)


def _write_grid(path: Path, folders: dict[str, Path], rows: Sequence[dict[str, Any]], cameras: Any) -> None:
    """Write the picture of at most a dozen objects."""
    from nvsadapter_guidance.evaluation.object_folder import read_object
    from nvsadapter_guidance.evaluation.picture_grid import evenly, picture_grid

    chosen = [rows[index] for index in evenly(len(rows), GRID_OBJECTS)]
    captions = [f"{row['name'][:22]}\n{row['psnr']:.1f} dB, IoU {row['mask_iou']:.2f}" for row in chosen]
    sheet = picture_grid([read_object(folders[row["name"]]) for row in chosen], captions, cameras)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _say_views(output: Path, scores: dict[str, Any]) -> None:
    for name, row in {"imagined": scores["mean"], **scores["baselines"]}.items():
        logger.info("%s: %s", name, _words(row) if row["psnr"] is not None else "needs two objects")
    logger.info("%d objects; %s and %s", len(scores["objects"]), output / METRICS, output / GRID)


def _words(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
