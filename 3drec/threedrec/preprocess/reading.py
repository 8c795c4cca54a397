"""Reading people's image files: whatever the mode, out comes straight RGBA in [0, 1].

Pillow decodes; this module turns each of its modes into floats and each way in which a file can be unusable into one
clear line. Colours are taken as sRGB: embedded ICC profiles are ignored. PNGs with 16 bits per channel keep them when
they are gray; Pillow reads 16-bit colour at 8 bits.
"""

import logging
import math
import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from threedrec.errors import InputError

MIN_SIDE = 16
"""Pixels; a shorter side below it shows no object."""
MAX_ASPECT = 20.0
"""Longer over shorter side; a frame beyond it is a strip, not a photograph."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit for a file that decompresses to absurd size."""
WORKING_SIDE = 2048
"""Pixels; larger images are averaged down while reading, to bound memory. The optimisation sees at most 512."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_ADVICE = "give a PNG, JPEG or WebP image"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation tag."""

_log = logging.getLogger(__name__)


def read_rgba(path: str | os.PathLike[str]) -> Float[np.ndarray, "H W 4"]:
    """Read an image as straight (not premultiplied) RGBA in [0, 1], upright by its EXIF orientation.

    Images without transparency get alpha 1. Sides longer than ``WORKING_SIDE`` are averaged down by a whole factor.

    Raises:
        InputError: the file is missing, not a readable image, damaged, too small, too large or too narrow.
    """
    image = _open(path)
    if not _is_16_bit(image):
        return _bounded(_to_rgba(image))
    levels = np.asarray(image)
    opaque = levels != image.info.get("transparency", -1)
    gray = _bounded(Image.fromarray(levels.astype(np.float32) / 65535))
    alpha = _bounded(Image.fromarray(opaque.astype(np.float32)))
    return np.concatenate([np.repeat(gray, 3, axis=-1), alpha], axis=-1)


def read_gray(path: str | os.PathLike[str]) -> Float[np.ndarray, "H W 1"]:
    """Read a map of one value per pixel (a mask, a depth map) in [0, 1]; 16-bit PNGs keep their precision.

    Colour images are averaged by luma; transparency is ignored.

    Raises:
        InputError: as ``read_rgba``.
    """
    image = _open(path)
    if _is_16_bit(image):
        return _bounded(Image.fromarray(np.asarray(image).astype(np.float32) / 65535))
    return _bounded(_to_rgba(image).convert("L"))


def check_shape(path: str | os.PathLike[str], height: int, width: int) -> None:
    """Raise InputError when a frame of ``height`` x ``width`` pixels is too small or too narrow to show an object."""
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{path}: {width}x{height} pixels are too few; give an image whose sides have at least {MIN_SIDE}"
            " pixels (256 or more for a good result)"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"{path}: {width}x{height} pixels are narrower than {MAX_ASPECT:g}:1; crop the image around the object"
        )


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Decode the first frame, upright; every failure becomes an InputError."""
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limits below say it better
            with Image.open(path, formats=_FORMATS) as image:
                _check_size(path, *image.size)
                image.load()
                return _upright(image, path)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(_not_an_image(path)) from error
    except Image.DecompressionBombError as error:
        raise InputError(_too_many_pixels(path)) from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: permission denied; change its permissions") from error
    except Exception as error:  # on damaged bytes the decoders raise nearly anything
        raise InputError(
            f"{path}: the image is damaged or cut short ({_first_line(error)}); open and save it again, or copy it anew"
        ) from error


def _check_file(path: str | os.PathLike[str]) -> None:
    try:
        if not Path(path).exists():
            raise InputError(f"{path}: no such file; check the name and the folder")
        if Path(path).is_dir():
            raise InputError(f"{path}: is a folder; {_ADVICE}")
        if not Path(path).is_file():
            raise InputError(f"{path}: is not a regular file; {_ADVICE}")
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; copy it anew")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; check the name and the folder") from error


def _check_size(path: str | os.PathLike[str], width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(_too_many_pixels(path))
    check_shape(path, height, width)


def _too_many_pixels(path: str | os.PathLike[str]) -> str:
    return f"{path}: the image has more than {MAX_PIXELS // 10**6} million pixels; scale it down, 2048 a side is plenty"


def _not_an_image(path: str | os.PathLike[str]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return f"{path}: {image.format} files are not supported; save it as PNG, JPEG or WebP"
    except Exception:  # noqa: BLE001 - unknown to every decoder or damaged: both mean the same here
        return f"{path}: not an image that can be read; {_ADVICE}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_16_bit(image: Image.Image) -> bool:
    """Tell 16-bit gray PNGs, which some versions of Pillow open in mode I."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _to_rgba(image: Image.Image) -> Image.Image:
    """Convert any 8-bit mode; those without a direct way to RGBA (CMYK, YCbCr) go through RGB."""
    return image.convert("RGB" if image.mode in ("CMYK", "YCbCr") else "RGBA").convert("RGBA")


def _upright(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception as error:  # noqa: BLE001 - damaged metadata must not cost a good picture
        _log.warning("%s: its EXIF data cannot be read (%s); taken as upright", path, error)
        orientation = 1
    method = _UPRIGHT.get(orientation)
    return image.copy() if method is None else image.transpose(method)


def _bounded(image: Image.Image) -> Float[np.ndarray, "H W C"]:
    """Float pixels with a channel axis, averaged down to ``WORKING_SIDE`` (Pillow weighs colours by alpha there)."""
    factor = math.ceil(max(image.size) / WORKING_SIDE)
    pixels = np.asarray(image.reduce(factor) if factor > 1 else image)
    pixels = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    return pixels if pixels.ndim == 3 else pixels[..., None]
