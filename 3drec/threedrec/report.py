"""What a person looks at: turntable videos and sheets of views."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from threedrec.files import atomic_path
from threedrec.video import write_video

_DEPTH_ANCHORS = ((0.99, 0.91, 0.15), (0.37, 0.79, 0.38), (0.13, 0.57, 0.55), (0.23, 0.32, 0.55), (0.27, 0.00, 0.33))
"""Near to far, evenly spaced: yellow to violet, of even steps in lightness (viridis, reversed)."""
CELL = 128
"""Pixels: the height of a view in a sheet."""
_GAP = 4
_LABEL = 16


Images = Float[Tensor, "T H W C"] | UInt8[Tensor, "T H W 3"]
"""What a renderer returns, or finished pictures of it."""


@torch.no_grad()
def to_rgb(
    frames: Mapping[str, Float[Tensor, "T H W C"]], depth_range: tuple[float, float] | None = None
) -> dict[str, Float[Tensor, "T H W 3"]]:
    """Turn what a renderer returns into pictures over white, by name, on the device where it is.

    ``depth`` is coloured from near (yellow) to far (violet) over ``depth_range``, by default the range that all frames
    share; ``normal``, in [-1, 1], is shifted to [0, 1]; one channel becomes grey. Depth and normals are shown where
    ``opacity``, if it is among the frames, exceeds one half.
    """
    frames = {name: images.detach().float() for name, images in frames.items()}
    pictures = {}
    for name, images in frames.items():
        if name in ("depth", "normal"):
            seen = _seen(images, frames.get("opacity"))
            if name == "depth":
                colored = _depth_colors(images, depth_range or _depth_range(images, seen))
            else:
                colored = 0.5 * images + 0.5
            images = torch.where(seen, colored, 1.0)
        pictures[name] = images.expand(*images.shape[:3], 3).nan_to_num(0.0).clamp(0.0, 1.0)
    return pictures


@torch.no_grad()
def to_bytes(frames: Mapping[str, Images]) -> dict[str, UInt8[Tensor, "T H W 3"]]:
    """Return the pictures of `to_rgb` as bytes on the host, made where the frames are and copied a row at a time.

    A sheet of them needs no device any more, so that another thread can draw it.
    """
    raw = {name: images.detach().float() for name, images in frames.items() if images.dtype != torch.uint8}
    depths = depth_range(raw) if "depth" in raw else None
    pictures = {name: images.cpu() for name, images in frames.items() if name not in raw}
    for name in raw:
        shown = {key: raw[key] for key in (name, "opacity") if key in raw}
        # Frame by frame, since a video of floats would fill the memory.
        frame_by_frame = ({key: value[i : i + 1] for key, value in shown.items()} for i in range(len(raw[name])))
        pictures[name] = torch.cat([_rounded(to_rgb(frame, depths)[name]) for frame in frame_by_frame]).cpu()
    return {name: pictures[name] for name in frames}


@torch.no_grad()
def side_by_side(
    frames: Mapping[str, Float[Tensor, "T H W C"]], depth_range: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "T H W2 3"]:
    """Return the pictures of `to_rgb` beside each other, made where the frames are."""
    return _bytes(torch.cat(list(to_rgb(frames, depth_range).values()), dim=2))


def depth_range(frames: Mapping[str, Float[Tensor, "T H W C"]]) -> tuple[float, float]:
    """Return the range over which to colour the depth of ``frames``, and of others of the same object."""
    return _depth_range(frames["depth"], _seen(frames["depth"], frames.get("opacity")))


def write_turntable(frames: Mapping[str, Images], path: str | os.PathLike[str], fps: int = 24) -> Path:
    """Write a video whose frames show every entry of ``frames`` (see :func:`to_rgb`) side by side.

    See `threedrec.video.write_video`.
    """
    return write_video(np.concatenate(list(_pictures(frames).values()), axis=2), path, fps)


def contact_sheet(
    rows: Mapping[str, Images],
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    cell: int = CELL,
) -> Path:
    """Write a PNG with one row per entry of ``rows`` (see :func:`to_rgb`) and one labelled column per view.

    Args:
        columns: labels of the views, such as azimuths.
        cell: height of a cell in pixels; images are resized to it.

    Raises:
        InputError: the file cannot be written.
        ValueError: there are no images, or more views than labels.
    """
    pictures = {name: [_resized(image, cell) for image in images] for name, images in _pictures(rows).items()}
    return _write_sheet(pictures, path, columns)


def before_after_sheet(
    image: Float[Tensor, "H W C"],
    views: Images,
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    cell: int = 192,
) -> Path:
    """Write a PNG with the input photograph (RGBA over white) and, beside it, views of the result.

    Raises:
        InputError: the file cannot be written.
    """
    image = image.detach().float().cpu()
    if image.shape[-1] == 4:
        image = image[..., :3] * image[..., 3:] + 1.0 - image[..., 3:]
    photograph = _resized(_bytes(image[None])[0], cell)
    pictures = [photograph, *(_resized(view, cell) for view in _bytes(views))]
    return _write_sheet({"": pictures}, path, ["input", *(columns or [""] * len(views))])


def preview_grid(images: Float[Tensor, "N H W 3"], path: str | os.PathLike[str], columns: int = 4) -> Path:
    """Write a PNG with the images in reading order, ``columns`` of them in a row.

    Raises:
        InputError: the file cannot be written.
    """
    cells = list(_bytes(images))
    rows = {" " * i: cells[start : start + columns] for i, start in enumerate(range(0, len(cells), columns))}
    return _write_sheet(rows, path, None)


def _write_sheet(
    rows: Mapping[str, Sequence[UInt8[np.ndarray, "H W 3"]]],
    path: str | os.PathLike[str],
    columns: Sequence[str] | None,
) -> Path:
    count = max((len(cells) for cells in rows.values()), default=0)
    if count == 0:
        raise ValueError("a sheet needs at least one image")
    if columns is not None and len(columns) < count:
        raise ValueError(f"a sheet of {count} columns got {len(columns)} labels")
    font = ImageFont.load_default(size=11)
    left = max(int(font.getlength(name.strip())) for name in rows)
    left, top = left + 2 * _GAP if left else _GAP, _LABEL if columns else _GAP
    widths = [max(cells[i].shape[1] for cells in rows.values() if i < len(cells)) for i in range(count)]
    heights = [max(cell.shape[0] for cell in cells) for cells in rows.values()]
    size = (left + sum(widths) + _GAP * count, top + sum(heights) + _GAP * len(heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    y = top
    for (name, cells), height in zip(rows.items(), heights):
        draw.text((_GAP, y + height // 2), name.strip(), fill="black", font=font, anchor="lm")
        x = left
        for i, picture in enumerate(cells):
            sheet.paste(Image.fromarray(picture), (x, y))
            if columns and y == top:
                draw.text((x + widths[i] // 2, top // 2), columns[i], fill="black", font=font, anchor="mm")
            x += widths[i] + _GAP
        y += height + _GAP
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)


def _pictures(frames: Mapping[str, Images]) -> dict[str, UInt8[np.ndarray, "T H W 3"]]:
    return {name: images.numpy() for name, images in to_bytes(frames).items()}


def _seen(images: Tensor, opacity: Tensor | None) -> Tensor:
    """Where depths or normals show something."""
    return opacity > 0.5 if opacity is not None else images.norm(dim=-1, keepdim=True) > 1e-6


def _depth_range(depth: Tensor, seen: Tensor) -> tuple[float, float]:
    """The central 98% of the depths seen; a single stray ray must not flatten the picture."""
    values = depth[seen]
    if len(values) == 0:
        return 0.0, 0.0
    near, far = np.quantile(values.detach().float().cpu().numpy(), [0.01, 0.99])
    return float(near), float(far)


def _depth_colors(depth: Tensor, near_far: tuple[float, float]) -> Tensor:
    near, far = near_far
    anchors = torch.tensor(_DEPTH_ANCHORS, device=depth.device)
    place = ((depth - near) / max(far - near, 1e-6)).nan_to_num(0.0).clamp(0.0, 1.0) * (len(anchors) - 1)
    low = place.long().clamp(max=len(anchors) - 2).squeeze(-1)
    return torch.lerp(anchors[low], anchors[low + 1], place - low.unsqueeze(-1))


def _resized(picture: UInt8[np.ndarray, "H W 3"], height: int) -> UInt8[np.ndarray, "h w 3"]:
    width = max(round(picture.shape[1] * height / picture.shape[0]), 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _bytes(images: Images) -> UInt8[np.ndarray, "N H W 3"]:
    return _rounded(images).cpu().numpy()


def _rounded(images: Images) -> UInt8[Tensor, "N H W 3"]:
    if images.dtype == torch.uint8:
        return images
    return (images.detach().float().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
