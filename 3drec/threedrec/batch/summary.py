"""``summary.csv``: one row an image, for spreadsheets."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from threedrec.batch.manifest import Line
from threedrec.files import atomic_path

STAGES = ("prepare", "views", "fit", "coarse", "fine", "test", "mesh")
COLUMNS = ("input", "status", "error", "kind", "attempt", "seconds", "output", "copy_of")
METRICS = ("psnr", "ssim", "mask_iou", "vertices", "faces", "watertight", "peak_memory_gb", "device", "model", "recipe")


def write_summary(lines: Iterable[Line], path: Path) -> None:
    """Write a row for every line, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *METRICS, *(f"seconds_{stage}" for stage in STAGES)])
    for line in lines:
        stages = line.metrics.get("stages") or {}
        own = [_plain(getattr(line, column)) for column in COLUMNS]
        numbers = [_plain(line.metrics.get(name)) for name in METRICS]
        writer.writerow([*own, *numbers, *(_plain(stages.get(stage)) for stage in STAGES)])
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "replace"))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value
