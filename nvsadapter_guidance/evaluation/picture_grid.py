"""A picture of many objects: what they look like, and below it what was imagined of them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvsadapter_guidance.evaluation.object_folder import EvaluatedObject
from nvsadapter_guidance.training.mesh_dataset import ViewSet

_HEADER, _MARGIN, _GAP, _FONT = 20, 150, 6, 12


def evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` indices, spread over all of them."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / max(limit - 1, 1)) for index in range(limit)]


def picture_grid(
    objects: Sequence[EvaluatedObject], captions: Sequence[str], views: ViewSet, cell: int = 96
) -> Image.Image:
    """Two rows for each object, truth above prediction; one column for each view, its camera at the top.

    Args:
        captions: lines beside each object.
        cell: side of a view in pixels.
    """
    count = len(views.azimuth)
    height = _HEADER + len(objects) * (2 * cell + _GAP)
    sheet = Image.new("RGB", (_MARGIN + count * cell, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT)
    for column, (azimuth, elevation) in enumerate(zip(views.azimuth, views.elevation, strict=True)):
        label = "reference" if column == 0 else f"{azimuth:g}° / {elevation:g}°"
        draw.text((_MARGIN + (column + 0.5) * cell, _HEADER / 2), label, fill="black", font=font, anchor="mm")
    draw.text((4, _HEADER / 2), "azimuth / elevation", fill="black", font=font, anchor="lm")
    for row, (found, caption) in enumerate(zip(objects, captions, strict=True)):
        top = _HEADER + row * (2 * cell + _GAP)
        draw.multiline_text((4, top + 4), f"{caption}\n\ntruth", fill="black", font=font)
        draw.text((4, top + cell + 4), "prediction", fill="black", font=font)
        for line, images in enumerate((found.truth.rgb, found.predicted)):
            for column, image in enumerate(images):
                place = (_MARGIN + column * cell, top + line * cell)
                sheet.paste(_picture(image).resize((cell, cell), Image.Resampling.LANCZOS), place)
    return sheet


def _picture(rgb: Float[Tensor, "3 h w"]) -> Image.Image:
    pixels: np.ndarray = (rgb.clamp(0, 1) * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
