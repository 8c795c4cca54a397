"""The stages of the warm start: imagine views around the object, fit the scene to them."""

import logging

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from threedrec.cameras import Cameras
from threedrec.confidence import Confidence
from threedrec.errors import InputError
from threedrec.files import atomic_path
from threedrec.guidance.protocol import ViewSampler
from threedrec.loop import Loop, StepResult
from threedrec.optimizer import fused, set_learning_rate
from threedrec.report import contact_sheet, preview_grid
from threedrec.run import Run
from threedrec.steps import ViewFit
from threedrec.warm_start import WarmStartConfig, build_view_set, view_ring

logger = logging.getLogger(__name__)

VIEWS_FILE = "views.safetensors"


def sample_views(run: Run) -> int:
    """Let the guidance imagine views around the object; they are kept, so that this happens once."""
    config = _warm_start(run)
    cameras = view_ring(config, run.support.camera, size=run.support.rgb.shape[0])
    steps = min(config.num_inference_steps, run.config.trainer.max_steps)
    origin = _origin(run, cameras, steps)
    rgb = _cached_views(run, origin)
    sampled = rgb is None
    if rgb is None:
        guidance = run.load_guidance()
        if not isinstance(guidance, ViewSampler):
            raise InputError(
                f"system.guidance.warm_start: {run.config.system.guidance_type} cannot sample views; "
                "set system.guidance.warm_start.enabled=false"
            )
        with run.reporter.stage("views", steps) as report:
            rgb = guidance.sample_views(
                cameras.to(run.device),
                run.generator("views"),
                steps,
                config.guidance_scale,
                on_step=lambda done: report.update(done, {}),
            )
        rgb = rgb.detach().float().clamp(0.0, 1.0)
        if not bool(rgb.isfinite().all()):
            raise InputError(f"{guidance.description}: sampled views are not finite; its weights may be damaged")
        with atomic_path(run.keeper.folder / VIEWS_FILE) as temporary:
            safetensors.torch.save_file({"rgb": rgb.cpu().contiguous()}, temporary, metadata=origin)
    preview = run.save_dir / "sampled-views.png"
    if sampled or not preview.exists():
        preview_grid(rgb, preview, columns=8)
    cameras = cameras.resized(*rgb.shape[1:3])
    run.views = build_view_set(rgb.cpu(), cameras, run.support.camera.to("cpu"), config.back_weight).to(run.device)
    run.confidence = Confidence(run.views, config.tolerance)
    return 0


def _warm_start(run: Run) -> WarmStartConfig:
    config = run.warm_start
    if config is None:
        raise RuntimeError("the warm start is switched off")
    return config


def _origin(run: Run, cameras: Cameras, steps: int) -> dict[str, str]:
    """What the sampled views depend on, as the metadata of their file."""
    angles = torch.stack([cameras.elevation, cameras.azimuth], dim=1)
    return {
        "steps": str(steps),
        "guidance_scale": str(_warm_start(run).guidance_scale),
        "seed": str(run.config.seed),
        "elevation_azimuth": str([[round(angle, 3) for angle in pair] for pair in angles.tolist()]),
    }


def _cached_views(run: Run, origin: dict[str, str]) -> torch.Tensor | None:
    """Views sampled before this run was interrupted, None when there are none (or not those of this config)."""
    path = run.keeper.folder / VIEWS_FILE
    if run.resumed is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found, rgb = file.metadata(), file.get_tensor("rgb")
    except (SafetensorError, OSError):
        logger.warning("%s cannot be read; sampling its views again", path)
        return None
    if found != origin:
        logger.warning("%s holds views of another config; sampling them again", path)
        return None
    return rgb.to(run.device)


def ensure_views(run: Run) -> None:
    """Bring back the views and their confidence in a run that was resumed after they were sampled."""
    if run.views is None:
        sample_views(run)
        state = {} if run.resumed is None else run.resumed.extra.get("confidence", {})
        if state and run.confidence is not None:
            run.confidence.load_state_dict(state)


def view_fit(run: Run) -> ViewFit:
    """The losses of the run's sampled views."""
    ensure_views(run)
    if run.views is None or run.confidence is None:
        raise RuntimeError("no views were sampled")
    size = min(run.support.rgb.shape[0], max(run.views.rgb.shape[1], 256))
    return ViewFit(run.scene, run.support.resized(size, size), run.views, run.confidence, _warm_start(run))


def fit_views(run: Run) -> int:
    """Fit the scene to the sampled views and the reference."""
    config, total = _warm_start(run), run.fit_steps
    fit = view_fit(run)
    optimizer = torch.optim.Adam(run.scene.parameters(), lr=config.lr, eps=1e-15, fused=fused(run.scene))

    def step(index: int) -> StepResult:
        generator = run.generator("fit", index)
        run.scene.renderer.update(index, generator)
        return fit((index + 1) / total, generator)

    def rate(index: int) -> None:
        # Cosine from 1 to 0.1.
        set_learning_rate(optimizer, 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * index / total))))

    done = 0
    if run.resumed is not None and run.resumed.stage == "fit":
        run.restore_optimizer(optimizer)
        done = run.resumed.step
    run.runner.run(Loop("fit", done, total, step, optimizer, rate))
    _save_fit_sheet(run)
    return total


def _save_fit_sheet(run: Run) -> None:
    """Sampled views above what became of them, and how far they were believed."""
    if run.views is None or run.confidence is None:
        return
    count, height, width = run.views.rgb.shape[:3]
    shown = torch.linspace(0, count - 1, min(count, 12)).round().long()
    cameras = run.views.cameras[shown.to(run.views.cameras.device)]
    rendered = run.scene.views(cameras, normals=True)
    trust = run.confidence.weights()[shown.to(run.device)][:, None]
    trust = torch.nn.functional.interpolate(trust, (height, width))[:, 0, :, :, None]
    rows = {
        "sampled": run.views.rgb[shown.to(run.device)],
        "trust": trust,
        "rgb": rendered["rgb"],
        "normal": rendered["normal"],
        "opacity": rendered["opacity"],
    }
    rows["sampled"], rows["trust"] = rows["sampled"].cpu(), rows["trust"].cpu()
    labels = [f"{float(a):.0f}/{float(e):.0f}" for a, e in zip(cameras.azimuth, cameras.elevation, strict=True)]
    contact_sheet(rows, run.save_dir / "fit.png", labels)
