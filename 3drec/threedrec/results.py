"""What comes out: pictures of the scene, numbers against the reference, the turntable and the mesh."""

import logging

import torch
from torch import Tensor

from threedrec import registry
from threedrec.cameras import Cameras, turntable
from threedrec.metrics import mask_iou, psnr, ssim
from threedrec.report import before_after_sheet, contact_sheet, depth_range, side_by_side
from threedrec.run import Run
from threedrec.video import BackgroundVideo

logger = logging.getLogger(__name__)

_SHEET_VIEWS = 8
_ROWS = ("rgb", "normal", "depth", "opacity")


def save_validation(run: Run, name: str) -> None:
    """Write ``save/<name>-val.png``: the evaluation views as they are now."""
    config = run.config.data.random_camera
    cameras = turntable(config, config.n_val_views, config.eval_height, config.eval_width)
    frames = run.scene.views(cameras)
    contact_sheet({row: frames[row].cpu() for row in _ROWS}, run.save_dir / f"{name}-val.png", _labels(cameras))


def test(run: Run) -> int:
    """Write the turntable and its contact sheet, and compare the reference view."""
    config = run.config.data.random_camera
    run.scene.renderer.refresh(run.generator("test"))
    save_reference_metrics(run)
    cameras = turntable(config, config.n_test_views, config.eval_height, config.eval_width)
    shown = list(range(0, len(cameras), max(1, len(cameras) // _SHEET_VIEWS)))[:_SHEET_VIEWS]
    with run.reporter.stage("test", len(cameras)) as report:
        sheet = _rows(run, cameras, shown)
        report.update(len(shown), {})
        # The sheet's views tell the depths to colour, so that frames can be encoded as they come.
        depths, known = depth_range(sheet), dict(zip(shown, _split(sheet), strict=True))
        with BackgroundVideo(run.save_dir / "turntable.mp4") as video:
            for start in range(0, len(cameras), config.eval_batch_size):
                batch = range(start, min(start + config.eval_batch_size, len(cameras)))
                missing = [index for index in batch if index not in known]
                fresh = dict(zip(missing, _split(_rows(run, cameras, missing)), strict=True)) if missing else {}
                video.add(side_by_side(_joined([fresh.get(index) or known[index] for index in batch]), depths))
                report.update(max(len(shown), batch.stop), {})
    sheet = {name: images.cpu() for name, images in sheet.items()}
    labels = _labels(cameras[torch.tensor(shown)])
    contact_sheet(sheet, run.save_dir / "turntable.png", labels)
    before_after_sheet(run.support.rgba(), sheet["rgb"], run.save_dir / "before-after.png", labels)
    return 0


def _rows(run: Run, cameras: Cameras, chosen: list[int]) -> dict[str, Tensor]:
    rendered = run.scene.views(cameras[torch.tensor(chosen)])
    return {name: rendered[name] for name in _ROWS}


def _split(frames: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: images[i : i + 1] for name, images in frames.items()} for i in range(len(frames["rgb"]))]


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def save_reference_metrics(run: Run) -> None:
    """Put PSNR, SSIM and mask IoU of the reference view into the metrics."""
    config = run.config.data.random_camera
    # The photograph is square, whatever the evaluation views are.
    side = min(config.eval_height, config.eval_width)
    view = run.support.resized(side, side).to("cpu")
    rendered = {name: frames[0].cpu() for name, frames in run.scene.views(view.camera, normals=False).items()}
    rgb = rendered["rgb"]
    run.metrics.update(
        {
            "reference.psnr": psnr(rgb, view.rgb),
            "reference.ssim": ssim(rgb, view.rgb),
            "reference.mask_iou": mask_iou(rendered["opacity"], view.mask),
        }
    )


def export(run: Run) -> int:
    """Write the mesh."""
    system = run.config.system
    exporter = registry.find("exporter", system.exporter_type)(system.exporter)
    with torch.no_grad():
        report = exporter(run.scene.density, run.scene.surface_albedo, run.save_dir, run.device)
    run.metrics.update(
        {
            "mesh.vertices": report.vertices,
            "mesh.faces": report.faces,
            "mesh.watertight": report.watertight,
            "mesh.threshold": report.threshold,
            "mesh.seconds": report.seconds,
        }
    )
    logger.info("mesh: %s", ", ".join(str(file) for file in report.files))
    return 0


def _labels(cameras: Cameras) -> list[str]:
    return [f"{float(azimuth):.0f}°" for azimuth in cameras.azimuth]
