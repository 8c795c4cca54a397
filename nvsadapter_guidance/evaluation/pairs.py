"""Evaluation of pictures: folders that each hold a ``pred.png`` and its ``target.png``, as the release keeps them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.image_metrics import Lpips, image_psnr, image_ssim
from nvsadapter_guidance.training.views import composite

PREDICTION, TARGET = "pred.png", "target.png"


def find_pairs(folder: Path) -> dict[str, Path]:
    """Folders below ``folder`` (or itself) with a ``target.png``, by their path in it.

    Raises:
        InputError: there are none.
    """
    found = {path.parent.relative_to(folder).as_posix(): path.parent for path in sorted(folder.rglob(TARGET))}
    if not found:
        raise InputError(f"{folder}: no folder below it holds a {TARGET}")
    return found


def read_picture(path: Path) -> Float[Tensor, "1 3 h w"]:
    """A picture in [0, 1], its alpha blended with white.

    Raises:
        InputError: it is missing or cannot be read.
    """
    try:
        with Image.open(path) as picture:
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255.0
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error
    return composite(torch.from_numpy(rgba)).permute(2, 0, 1)[None]


def score_pairs(pairs: dict[str, Path], lpips: Lpips | None, rows: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Score pairs one by one into ``rows``: PSNR, SSIM and, with a backbone, LPIPS.

    Yields:
        after every pair: nothing in the dictionary, or the name and the reason of one that cannot be scored.
    """
    for name, folder in pairs.items():
        try:
            prediction, target = (read_picture(folder / file) for file in (PREDICTION, TARGET))
            if prediction.shape != target.shape:
                sizes = " and ".join(f"{image.shape[3]}x{image.shape[2]}" for image in (prediction, target))
                raise InputError(f"{folder}: {PREDICTION} and {TARGET} are of {sizes} pixels; give them one size")
            row: dict[str, Any] = {"name": name}
            row["psnr"] = round(float(image_psnr(prediction, target)), 5)
            row["ssim"] = round(float(image_ssim(prediction, target)), 5)
            if lpips is not None:
                row["lpips"] = round(float(lpips(prediction, target)), 5)
        except InputError as error:
            yield {"name": name, "reason": str(error)}
            continue
        rows.append(row)
        yield {}


def mean_row(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every number of the rows.

    Raises:
        InputError: there is no row.
    """
    if not rows:
        raise InputError("evaluation: nothing could be scored")
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    return {key: round(sum(row[key] for row in rows) / len(rows), 5) for key in keys}
