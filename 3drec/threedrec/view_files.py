"""The files of ``3drec views``: numbered pictures, a labelled sheet, a video around the object, a record."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvsadapter_guidance.images import to_bytes
from threedrec.files import atomic_folder
from threedrec.report import preview_grid, write_turntable

RECORD = "views.json"
"""What was asked for, and which views are ours; its name, like every name but the views', begins with no digit."""
SHEET, ORBIT = "sheet.png", "orbit.mp4"
_LABEL = 18
_WIDEST_GAP = 120.0
"""Degrees between neighbouring views beyond which they do not make a circle."""


def pictures_of(
    pixels: Float[np.ndarray, "V H W 3"], resolution: int | None, truncate: bool = False
) -> list[Image.Image]:
    """Pictures of values in [0, 1], resized to ``resolution`` (None: as they are); ``truncate`` see `to_bytes`."""
    pictures = [Image.fromarray(array) for array in to_bytes(pixels, truncate)]
    if resolution is None or pictures[0].size == (resolution, resolution):
        return pictures
    return [picture.resize((resolution, resolution), Image.Resampling.BICUBIC) for picture in pictures]


def view_records(
    elevations: Sequence[float], azimuths: Sequence[float], distances: Sequence[float]
) -> list[dict[str, Any]]:
    """The record's line of each view: its file, degrees, and object diameters."""
    return [
        {"file": view_name(i), "elevation": float(e), "azimuth": float(a), "distance": float(d)}
        for i, (e, a, d) in enumerate(zip(elevations, azimuths, distances))
    ]


def write_views(folder: Path, pictures: Sequence[Image.Image], shown: Image.Image, record: dict[str, Any]) -> None:
    """Write views, sheet, video and record together; views of an earlier record that are not among them disappear.

    Raises:
        InputError: a file cannot be written.
    """
    stale = _recorded_views(folder) - {view["file"] for view in record["views"]}
    with atomic_folder(folder) as temporary:
        for i, picture in enumerate(pictures):
            picture.save(temporary / view_name(i), format="PNG")
        write_sheet(pictures, shown, record["views"], temporary / SHEET)
        write_orbit(pictures, record["views"], temporary / ORBIT)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def write_sheet(
    pictures: Sequence[Image.Image], shown: Image.Image, views: Sequence[dict[str, Any]], path: Path
) -> None:
    """Write the input and all views in reading order, labelled with azimuth and elevation."""
    labels = ["input", *(f"az {view['azimuth']:g}  el {view['elevation']:g}" for view in views)]
    side = max(pictures[0].width, 128)
    cells = [_labelled(picture, label, side) for picture, label in zip([_on_white(shown), *pictures], labels)]
    columns = len(cells) if len(cells) <= 5 else 3 if len(cells) <= 9 else 5
    preview_grid(torch.stack([_tensor(cell) for cell in cells]), path, columns=columns)


def write_orbit(pictures: Sequence[Image.Image], views: Sequence[dict[str, Any]], path: Path, fps: int = 24) -> None:
    """Write the views in the order of their azimuths; back and forth where they do not close a circle."""
    order = orbit_order([view["azimuth"] for view in views])
    hold = max(round(3 * fps / len(order)), 2) if len(order) < 36 else 2
    frames = torch.stack([_tensor(pictures[i]) for i in order for _ in range(hold)])
    write_turntable({"rgb": frames}, path, fps)


def orbit_order(azimuths: Sequence[float]) -> list[int]:
    """Indices of views for a video that loops: once around, or back and forth across the widest gap's other side."""
    order = sorted(range(len(azimuths)), key=lambda i: azimuths[i] % 360.0)
    if len(order) < 3:
        return order
    angles = [azimuths[i] % 360.0 for i in order]
    gaps = [(following - angle) % 360.0 for angle, following in zip(angles, [*angles[1:], angles[0] + 360.0])]
    widest = max(range(len(gaps)), key=lambda i: gaps[i])
    if gaps[widest] <= _WIDEST_GAP:
        return order
    swing = order[widest + 1 :] + order[: widest + 1]
    return swing + swing[-2:0:-1]


def view_name(index: int) -> str:
    """File name of a view."""
    return f"{index:03d}.png"


def _recorded_views(folder: Path) -> set[str]:
    """Files that an earlier command wrote, by its record."""
    try:
        views = json.loads((folder / RECORD).read_text(encoding="utf-8"))["views"]
        names = {str(view["file"]) for view in views}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for i in range(len(names)) if (name := view_name(i)) in names}


def _labelled(picture: Image.Image, label: str, side: int) -> Image.Image:
    cell = Image.new("RGB", (side, side + _LABEL), "white")
    cell.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (0, _LABEL))
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(cell).text((side // 2, _LABEL // 2), label, fill="black", font=font, anchor="mm")
    return cell


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _tensor(picture: Image.Image) -> UInt8[Tensor, "H W 3"]:
    return torch.from_numpy(np.array(picture.convert("RGB")))
