"""What comes out: pictures of the scene, numbers against the reference, the turntable and the mesh."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from threedrec import registry
from threedrec.cameras import Cameras, turntable
from threedrec.errors import InputError
from threedrec.metrics import mask_iou, psnr, ssim
from threedrec.report import CELL, before_after_sheet, contact_sheet, depth_range, side_by_side, to_bytes
from threedrec.run import Run
from threedrec.video import BackgroundVideo

logger = logging.getLogger(__name__)

_SHEET_VIEWS = 8
_ROWS = ("rgb", "normal", "depth", "opacity")


def save_validation(run: Run, name: str) -> None:
    """Render the evaluation views as they are now; the run's writer makes ``save/<name>-val.png`` of them."""
    config = run.config.data.random_camera
    # Two rays a side of a sheet's pixel make it smooth; more would cost the run their square, and not be seen.
    shrunk = min(1.0, 2 * CELL / config.eval_height)
    height, width = round(shrunk * config.eval_height), max(round(shrunk * config.eval_width), 1)
    cameras = turntable(config, config.n_val_views, height, width)
    frames = run.scene.views(cameras)
    pictures = to_bytes({row: frames[row] for row in _ROWS})
    run.writer.submit(partial(contact_sheet, pictures, run.save_dir / f"{name}-val.png", _labels(cameras)))


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


def begin_export(run: Run) -> None:
    """Begin the mesh in a process of its own, so that processors make it while the GPU renders what comes before.

    Not on a CPU, which has nothing to spare.
    """
    exporter = _exporter(run)
    if run.device.type == "cuda" and run.mesh_ahead is None and hasattr(exporter, "begin"):
        try:
            with torch.no_grad():
                run.mesh_ahead = exporter.begin(run.scene.density, run.device)
        except InputError as error:
            # The mesh stage's to say; first the turntable shows what the matter is.
            logger.debug("the mesh cannot be begun: %s", error)
        except OSError as error:
            logger.warning("the mesh is made after the turntable, no process can make it beside: %s", error)


def export(run: Run) -> int:
    """Write the mesh."""
    exporter, colors = _exporter(run), run.scene.surface_albedo
    with torch.no_grad():
        if run.mesh_ahead is None:
            report = exporter(run.scene.density, colors, run.save_dir, run.device)
        else:
            report = exporter.finish(run.mesh_ahead, colors, run.save_dir, run.device)
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


def _exporter(run: Run) -> Any:
    system = run.config.system
    return registry.find("exporter", system.exporter_type)(system.exporter)


def _labels(cameras: Cameras) -> list[str]:
    return [f"{float(azimuth):.0f}°" for azimuth in cameras.azimuth]
