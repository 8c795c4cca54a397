"""Where the object lies in the frame: square windows on an image, and resampling through them.

A window is given in fractions of the image's width and height, so that one window frames an image and the depth, normal
and mask maps that belong to it, whatever their sizes.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import sparse

SILHOUETTE = 0.5
"""Alpha above it belongs to the silhouette, as in the released data module."""


@dataclass(frozen=True)
class Window:
    """An axis-aligned part of an image, which may reach beyond it. Fractions: (0, 0) top left, (1, 1) bottom right."""

    left: float
    top: float
    right: float
    bottom: float


def whole_window(height: int, width: int) -> Window:
    """Return the smallest square window, in pixels, that holds the whole image in its middle."""
    side = max(height, width)
    return _square(0.5 * width, 0.5 * height, side, height, width)


def silhouette_window(alpha: Float[np.ndarray, "H W 1"], fill: float) -> Window:
    """Return the square window in which the silhouette's box is centred and its longer side takes ``fill`` of the side.

    The silhouette is where alpha exceeds one half, so that faint shadows and halos do not shift the object.
    ``alpha`` must have such a pixel.
    """
    height, width = alpha.shape[:2]
    inside = alpha[..., 0] > SILHOUETTE
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left) / fill
    return _square(0.5 * (left + right), 0.5 * (top + bottom), side, height, width)


def resample(
    image: Float[np.ndarray, "H W C"], window: Window, height: int, width: int
) -> Float[np.ndarray, "height width C"]:
    """Resample what ``window`` shows of ``image`` to ``height`` x ``width`` pixels; outside the image is 0.

    Separable triangle filter, as wide as an output pixel when it shrinks (which antialiases) and as an input pixel when
    it enlarges (which is bilinear interpolation). It has no negative lobes, hence no ringing at silhouettes, and a
    window that falls on the pixel grid at scale 1 returns the pixels untouched. Colours with alpha must come
    premultiplied.
    """
    rows = _filter(image.shape[0], window.top, window.bottom, height)
    columns = _filter(image.shape[1], window.left, window.right, width)
    channels = image.shape[2]
    tall = rows @ image.reshape(image.shape[0], -1)
    wide = columns @ tall.reshape(height, -1, channels).transpose(1, 0, 2).reshape(image.shape[1], -1)
    return np.ascontiguousarray(wide.reshape(width, height, channels).transpose(1, 0, 2), dtype=np.float32)


def _square(x: float, y: float, side: float, height: int, width: int) -> Window:
    """The square of ``side`` pixels about pixel coordinates (x, y)."""
    half = 0.5 * side
    return Window((x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height)


def _filter(length: int, start: float, stop: float, count: int) -> sparse.csr_array:
    """The (count, length) matrix that resamples ``length`` pixels to ``count`` over the fractions start..stop."""
    step = (stop - start) * length / count
    radius = max(step, 1.0)
    centres = start * length + (np.arange(count) + 0.5) * step
    taps = np.floor(centres - radius)[:, None] + np.arange(int(np.ceil(2 * radius)) + 1)
    weights = np.clip(1 - np.abs(taps + 0.5 - centres[:, None]) / radius, 0, None)
    # Normalised before taps outside the image are dropped: the outside counts as 0, it does not vanish.
    weights /= weights.sum(axis=1, keepdims=True)
    inside = (taps >= 0) & (taps < length)
    rows = np.broadcast_to(np.arange(count)[:, None], taps.shape)[inside]
    entries = (weights[inside].astype(np.float32), (rows, taps[inside].astype(np.int64)))
    return sparse.csr_array(entries, shape=(count, length))
