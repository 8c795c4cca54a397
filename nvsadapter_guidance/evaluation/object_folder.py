"""What an evaluation keeps of one object: true and imagined views as pictures, so that all scores can be made anew."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.image_metrics import image_psnr
from nvsadapter_guidance.evaluation.imagine import Imagined
from nvsadapter_guidance.evaluation.truth import TrueViews

RECORD = "object.json"


@dataclass(frozen=True)
class EvaluatedObject:
    """One object's views, read back."""

    truth: TrueViews
    predicted: Float[Tensor, "v 3 h w"]
    """In [0, 1], of a byte per channel."""
    one_step_psnr: list[float] | None
    """dB, of every view."""


def write_object(folder: Path, truth: TrueViews, imagined: Imagined) -> None:
    """Write ``truth_000.png`` (RGBA), ``pred_000.png`` (RGB), … and ``object.json``; the folder appears at the end."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for index, rgba in enumerate(truth.rgba):
            Image.fromarray(rgba).save(temporary / f"truth_{index:03d}.png")
        pixels = (imagined.views.clamp(0, 1) * 255.0).round().byte().permute(0, 2, 3, 1).numpy()
        for index, rgb in enumerate(pixels):
            Image.fromarray(rgb).save(temporary / f"pred_{index:03d}.png")
        once = None if imagined.one_step is None else image_psnr(imagined.one_step, truth.rgb).tolist()
        record = {"name": truth.name, "views": len(truth.rgba), "one_step_psnr": once}
        (temporary / RECORD).write_text(json.dumps(record) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_object(folder: Path) -> EvaluatedObject:
    """Read what :func:`write_object` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        rgba, rgb = (
            np.stack([np.asarray(Image.open(folder / f"{kind}_{i:03d}.png")) for i in range(record["views"])])
            for kind in ("truth", "pred")
        )
        truth = TrueViews(record["name"], rgba)
        return EvaluatedObject(truth, torch.from_numpy(rgb).permute(0, 3, 1, 2) / 255.0, record["one_step_psnr"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: cannot be read ({error}); delete it to evaluate the object again") from error
