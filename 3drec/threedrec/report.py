"""What a person looks at: turntable videos and sheets of views."""

import errno
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from threedrec.files import atomic_path

logger = logging.getLogger(__name__)

_DEPTH_ANCHORS = ((0.99, 0.91, 0.15), (0.37, 0.79, 0.38), (0.13, 0.57, 0.55), (0.23, 0.32, 0.55), (0.27, 0.00, 0.33))
"""Near to far, evenly spaced: yellow to violet, of even steps in lightness (viridis, reversed)."""
_GAP = 4
_LABEL = 16


Images = Float[Tensor, "T H W C"] | UInt8[Tensor, "T H W 3"]
"""What a renderer returns, or a finished picture of it (see :func:`compact`)."""


@torch.no_grad()
def to_rgb(
    frames: Mapping[str, Float[Tensor, "T H W C"]], depth_range: tuple[float, float] | None = None
) -> dict[str, Float[Tensor, "T H W 3"]]:
    """Turn what a renderer returns into pictures over white, by name.

    ``depth`` is coloured from near (yellow) to far (violet) over ``depth_range``, by default the range that all frames
    share; ``normal``, in [-1, 1], is shifted to [0, 1]; one channel becomes grey. Depth and normals are shown where
    ``opacity``, if it is among the frames, exceeds one half.
    """
    frames = {name: images.detach().float().cpu() for name, images in frames.items()}
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
def compact(frames: Mapping[str, Float[Tensor, "T H W C"]]) -> dict[str, Images]:
    """Turn what a renderer returns into what needs less memory and looks the same in a video or on a sheet.

    All become pictures of a byte per channel, but ``depth``: its colours depend on the range of frames shown together.
    It stays a distance, 0 where nothing is seen.
    """
    pictures = to_rgb({name: images for name, images in frames.items() if name != "depth"})
    small: dict[str, Images] = {}
    for name, images in frames.items():
        if name == "depth":
            small[name] = torch.where(_seen(images, frames.get("opacity")), images, 0.0).detach().float().cpu()
        else:
            small[name] = torch.from_numpy(_bytes(pictures[name]))
    return small


def write_turntable(frames: Mapping[str, Images], path: str | os.PathLike[str], fps: int = 24) -> Path:
    """Write a video whose frames show every entry of ``frames`` (see :func:`to_rgb`) side by side.

    H.264 in yuv420p, which every player and browser shows. Without a working ffmpeg a ``.gif`` is written instead,
    and a warning says so.

    Returns:
        The file written.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    pictures = np.concatenate(list(_pictures(frames).values()), axis=2)
    # yuv420p stores colour at half the size, hence even sides.
    pictures = np.pad(pictures, [(0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)], mode="edge")
    problem = _ffmpeg_problem()
    if problem is None:
        with atomic_path(path) as temporary:
            _encode(pictures, temporary, fps)
        return path
    logger.warning("%s: ffmpeg is not usable (%s), so a .gif is written instead.", path, problem)
    path = path.with_suffix(".gif")
    images = [Image.fromarray(picture).quantize(128) for picture in pictures]
    with atomic_path(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return path


def contact_sheet(
    rows: Mapping[str, Images],
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    cell: int = 128,
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
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def _pictures(frames: Mapping[str, Images]) -> dict[str, UInt8[np.ndarray, "T H W 3"]]:
    """Pictures as bytes; frame by frame, since a video of floats would fill the memory."""
    raw = {name: images.detach().float().cpu() for name, images in frames.items() if images.dtype != torch.uint8}
    depth_range = _depth_range(raw["depth"], _seen(raw["depth"], raw.get("opacity"))) if "depth" in raw else None
    pictures = {}
    for name, images in frames.items():
        if name not in raw:
            pictures[name] = images.cpu().numpy()
            continue
        shown = {key: raw[key] for key in (name, "opacity") if key in raw}
        parts = [
            _bytes(to_rgb({key: value[i : i + 1] for key, value in shown.items()}, depth_range)[name])
            for i in range(len(images))
        ]
        pictures[name] = np.concatenate(parts)
    return pictures


def _seen(images: Tensor, opacity: Tensor | None) -> Tensor:
    """Where depths or normals show something."""
    return opacity > 0.5 if opacity is not None else images.norm(dim=-1, keepdim=True) > 1e-6


def _depth_range(depth: Tensor, seen: Tensor) -> tuple[float, float]:
    """The central 98% of the depths seen; a single stray ray must not flatten the picture."""
    values = depth[seen]
    if len(values) == 0:
        return 0.0, 0.0
    near, far = np.quantile(values.numpy(), [0.01, 0.99])
    return float(near), float(far)


def _depth_colors(depth: Tensor, depth_range: tuple[float, float]) -> Tensor:
    near, far = depth_range
    anchors = torch.tensor(_DEPTH_ANCHORS)
    place = ((depth - near) / max(far - near, 1e-6)).nan_to_num(0.0).clamp(0.0, 1.0) * (len(anchors) - 1)
    low = place.long().clamp(max=len(anchors) - 2).squeeze(-1)
    return torch.lerp(anchors[low], anchors[low + 1], place - low.unsqueeze(-1))


def _resized(picture: UInt8[np.ndarray, "H W 3"], height: int) -> UInt8[np.ndarray, "h w 3"]:
    width = max(round(picture.shape[1] * height / picture.shape[0]), 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _bytes(images: Images) -> UInt8[np.ndarray, "N H W 3"]:
    if images.dtype == torch.uint8:
        return images.cpu().numpy()
    return (images.detach().float().cpu().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()


def _ffmpeg_problem() -> str | None:
    """Why ffmpeg cannot be used, or None where it can."""
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _encode(pictures: UInt8[np.ndarray, "T H W 3"], path: Path, fps: int) -> None:
    import imageio.v2 as imageio
    import imageio_ffmpeg

    try:
        writer: Any = imageio.get_writer(
            path,
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=1,
            quality=None,
            output_params=["-movflags", "+faststart", "-crf", "20"],
        )
        with writer:
            for picture in pictures:
                writer.append_data(picture)
        # ffmpeg runs in a process of its own, and its failure at the end of a file goes unnoticed.
        written = imageio_ffmpeg.count_frames_and_secs(path)[0] if path.exists() else 0
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
            raise
        written = 0
    if written != len(pictures):
        full = shutil.disk_usage(path.parent).free < pictures.nbytes
        raise OSError(errno.ENOSPC if full else errno.EIO, "ffmpeg did not finish the video")
