"""Which part of an image is the object: its own alpha, ``rembg`` when installed, or classical means."""

import logging
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from threedrec.errors import InputError
from threedrec.lookup import find_path
from threedrec.preprocess.framing import SILHOUETTE
from threedrec.preprocess.plain_background import HOW_TO_MASK, cut_out_plain, decontaminate

METHODS = ("auto", "alpha", "rembg", "plain")
"""Values of ``data.segmentation``."""

MIN_COVERAGE, MAX_COVERAGE = 0.001, 0.99
"""Part of the frame that a usable silhouette covers."""

_log = logging.getLogger(__name__)


def cut_out(
    rgba: Float[np.ndarray, "H W 4"], method: str, path: str, rembg_model: str = "u2net"
) -> Float[np.ndarray, "H W 4"]:
    """Return straight RGBA whose alpha says where the object is.

    Args:
        rgba: straight RGBA in [0, 1]; an alpha channel that is 1 everywhere counts as none.
        method: "alpha" uses the image's own; "rembg" and "plain" (see ``plain_background``) cut out what they see,
            composited over white if need be; "auto" takes the first of alpha, rembg and plain that there is.
        path: of the image, named in errors.
        rembg_model: name of a rembg model, or the path of an ISNet network (.onnx).

    Raises:
        InputError: no object can be told apart, or it covers next to nothing or all of the frame.
    """
    has_alpha = bool(rgba[..., 3].min() < 1)
    rgb = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
    if method == "alpha" or (method == "auto" and has_alpha):
        if not has_alpha:
            raise InputError(f"{path}: has no transparency, but data.segmentation=alpha asks for it; {HOW_TO_MASK}")
        result = rgba
    elif method == "rembg":
        result = _cut_out_rembg(rgb, path, rembg_model)
    elif method == "plain":
        result = cut_out_plain(rgb, path)
    elif method == "auto":
        result = _cut_out_auto(rgb, path, rembg_model)
    else:
        raise InputError(f"data.segmentation: unknown method {method!r}; use one of {', '.join(METHODS)}")
    check_coverage(result[..., 3:], path)
    return result


def check_coverage(alpha: Float[np.ndarray, "H W 1"], path: str) -> None:
    """Raise InputError when the silhouette (alpha over one half) is next to nothing or the whole frame."""
    coverage = float((alpha > SILHOUETTE).mean())
    if coverage < MIN_COVERAGE:
        raise InputError(
            f"{path}: the object covers {coverage:.2%} of the frame, less than {MIN_COVERAGE:.1%}: nothing to"
            f" reconstruct; crop the image around the object, or: {HOW_TO_MASK}"
        )
    if coverage > MAX_COVERAGE:
        raise InputError(
            f"{path}: the object covers {coverage:.1%} of the frame, more than {MAX_COVERAGE:.0%}: no outline to"
            f" follow; leave some background around the object, or: {HOW_TO_MASK}"
        )


def _cut_out_auto(rgb: Float[np.ndarray, "H W 3"], path: str, model: str) -> Float[np.ndarray, "H W 4"]:
    """Use rembg when it is installed and works, otherwise classical means; say so when rembg fails."""
    try:
        return _cut_out_rembg(rgb, path, model)
    except _RembgMissingError:
        return cut_out_plain(rgb, path)
    except InputError as error:
        _log.warning("%s; falling back to the segmentation of plain backgrounds", error)
        return cut_out_plain(rgb, path)


class _RembgMissingError(InputError):
    """rembg is not installed, which is no failure where it is optional."""


def _cut_out_rembg(rgb: Float[np.ndarray, "H W 3"], path: str, model: str) -> Float[np.ndarray, "H W 4"]:
    """Ask rembg for the mask.

    Raises:
        InputError: rembg is missing, or fails (its models are downloaded at first use, which fails offline).
    """
    try:
        import rembg
    except ModuleNotFoundError as error:
        if error.name != "rembg":
            raise InputError(f"{path}: rembg cannot be imported ({error}); install its missing part") from error
        raise _RembgMissingError(
            f"{path}: data.segmentation=rembg needs the package rembg; in the checkout: pip install -e '.[segment]'"
        ) from error
    except (Exception, SystemExit) as error:  # rembg exits the process when onnxruntime is missing
        raise InputError(f"{path}: rembg cannot be imported ({_reason(error)}); reinstall it") from error
    if model.endswith(".onnx") and not find_path(model).is_file():
        raise InputError(f"data.rembg_model: {model}: no such file; give the path of an ISNet network")
    try:
        session = _session(rembg, model)
        image = Image.fromarray(np.rint(rgb * 255).astype(np.uint8))
        mask = rembg.remove(image, session=session, only_mask=True)
        alpha = np.asarray(mask.convert("L"), dtype=np.float32)[..., None] / 255
    except (Exception, SystemExit) as error:  # downloads, onnxruntime and models fail in ways of their own
        raise InputError(
            f"{path}: rembg failed with its model {model!r} ({_reason(error)}); its models are downloaded at first"
            " use: give data.rembg_model=FILE.onnx when offline"
        ) from error
    return decontaminate(rgb, alpha)


def _session(rembg: Any, model: str) -> Any:
    if not model.endswith(".onnx"):
        return rembg.new_session(model)
    file = find_path(model).resolve()
    # rembg only opens networks inside its home, which this variable of its names.
    with _environment("U2NET_HOME", str(file.parent)):
        return rembg.new_session("dis_custom", model_path=str(file))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 160)}" if lines else type(error).__name__
