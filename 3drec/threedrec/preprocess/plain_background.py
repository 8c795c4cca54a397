"""Cutting an object out of a plain background with classical means: no network, no download.

Plain means a backdrop of one colour or a smooth gradient, with moderate noise: a product photograph, a sheet of paper,
a wall. The steps, in CIE Lab where distances follow the eye:

1. Background: a quadratic in x and y per Lab channel, fitted robustly to a band along the frame's border, so that an
   object that leaves the frame on one side does not spoil it. Noise is smoothed as far as it must be.
2. Confidence: most of the band must agree with the fit, and its spread must be small. Otherwise this is no plain
   background, and guessing would cost the user a whole reconstruction.
3. Flood: what has the background's colour, or is its soft shadow, AND is connected to the border is background. What
   has the background's colour inside the object (a white belly before a white wall) stays, unless it is a hole: nothing
   but background within, and a sharp rim.
4. Components: the largest one, and others of comparable size.
5. Edge: fractional alpha by projecting each pixel of a narrow band on the line from local background to local object
   colour; the band takes the object's colour, so that no rim of the backdrop remains.

Steps 1 to 4 see the image at ``WORKING_SIDE`` pixels, for which their constants are stated.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from threedrec.errors import InputError
from threedrec.preprocess.framing import Window, resample

WORKING_SIDE = 512
"""Pixels of the longer side for finding the silhouette."""
MAX_SPREAD = 4.0
"""Lab units (2.3 is just noticeable): median distance of the border from its fit, beyond which nothing is plain."""
MIN_AGREEMENT = 0.6
"""Part of the border that must agree with the fit; the object may cover the rest."""
HOW_TO_MASK = (
    "give an RGBA PNG with the background transparent, or a mask with data.mask_path=FILE,"
    " or install the background remover (in the checkout: pip install -e '.[segment]')"
)
"""Ways to tell what the object is, for error messages."""

_SMOOTHING = (0.7, 1.4, 2.8)  # pixels; the least that makes the border plain is used
_BAND = 0.03  # width of the border band over the shorter side
_THRESHOLDS = (6.0, 14.0)  # Lab units between which the flood's limit is chosen from the border's spread
_SHADOW_DEPTH = 0.25  # least part of the background's light that a shadow leaves
_SHADOW_TINT = 0.06  # most that a shadow may differ between the colour channels, as a ratio of light
_SHADOW_SLOPE = 2.5  # Lab units per pixel; shadows are softer than the outlines of objects
_HOLE_AREA = 3e-4  # part of the frame; smaller enclosed regions are highlights or dirt
_HOLE_RIM = 0.5  # least slope of a hole's rim over that of the outline: one is as sharp as the other
_COMPARABLE = 0.05  # components of at least this part of the largest one are kept

_LINEAR_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    dtype=np.float32,
)
_LINEAR_RGB_TO_RELATIVE_XYZ = _LINEAR_RGB_TO_XYZ / _LINEAR_RGB_TO_XYZ.sum(axis=1, keepdims=True)  # over D65 white
_WHOLE = Window(0.0, 0.0, 1.0, 1.0)
_EIGHT_NEIGHBOURS = np.ones((3, 3))


@dataclass(frozen=True)
class Background:
    """A fitted backdrop, and how the image differs from it."""

    lab: Float[np.ndarray, "H W 3"]
    """The smoothed image, CIE Lab."""
    fit: Float[np.ndarray, "H W 3"]
    """The backdrop, CIE Lab."""
    spread: float
    """Median distance of the border from the fit, Lab units."""

    @property
    def distance(self) -> Float[np.ndarray, "H W"]:
        """Lab distance of each pixel from the backdrop."""
        return np.linalg.norm(self.lab - self.fit, axis=-1)

    @property
    def threshold(self) -> float:
        """Distance up to which a pixel has the backdrop's colour."""
        return float(np.clip(3 * self.spread, *_THRESHOLDS))

    @property
    def slope(self) -> Float[np.ndarray, "H W"]:
        """Lab units by which the image changes from one pixel to the next."""
        along = [ndimage.gaussian_gradient_magnitude(self.lab[..., channel], 1.0) for channel in range(3)]
        return np.linalg.norm(along, axis=0)


def cut_out_plain(rgb: Float[np.ndarray, "H W 3"], path: str) -> Float[np.ndarray, "H W 4"]:
    """Cut the object out of a plain background; returns straight RGBA with a soft, decontaminated edge.

    Args:
        rgb: in [0, 1], sRGB.
        path: named in errors.

    Raises:
        InputError: the border is not plain, or nothing stands out from it.
    """
    height, width = rgb.shape[:2]
    factor = min(1.0, WORKING_SIDE / max(height, width))
    small = resample(rgb, _WHOLE, round(height * factor), round(width * factor)) if factor < 1 else rgb
    inside = largest_components(flood(fit_background(small, path)))
    if not inside.any():
        raise InputError(f"{path}: no object stands out from the background; {HOW_TO_MASK}")
    if factor < 1:
        inside = resample(inside[..., None].astype(np.float32), _WHOLE, height, width)[..., 0] > 0.5
    reach = 1 + round(1 / factor)
    result = np.concatenate([rgb, np.zeros((height, width, 1))], axis=-1, dtype=np.float32)
    around = _box_around(inside, margin=4 * reach)
    result[around] = soften(rgb[around], inside[around], reach)
    return result


def fit_background(rgb: Float[np.ndarray, "H W 3"], path: str) -> Background:
    """Fit the backdrop to the frame's border (steps 1 and 2).

    Raises:
        InputError: the border is not plain.
    """
    height, width = rgb.shape[:2]
    terms = _quadratic_terms(height, width)
    band = _border_band(height, width)
    lab = srgb_to_lab(rgb)
    for sigma in _SMOOTHING:
        smooth = ndimage.gaussian_filter(lab, sigma=(sigma, sigma, 0))
        coefficients, residuals = _robust_fit(terms[band], smooth[band])
        background = Background(smooth, terms @ coefficients, float(np.median(residuals)))
        agreement = float((residuals < background.threshold).mean())
        if background.spread <= MAX_SPREAD and agreement >= MIN_AGREEMENT:
            return background
    raise InputError(
        f"{path}: the background is not plain ({agreement:.0%} of the border agrees with a smooth backdrop, spread"
        f" {background.spread:.1f}), so the object cannot be told from it; {HOW_TO_MASK}"
    )


def flood(background: Background) -> Bool[np.ndarray, "H W"]:
    """Return what the backdrop does not reach from the border, less the holes (step 3)."""
    alike = background.distance < background.threshold
    reached = _from_border(alike)
    reached |= _from_border(alike | _shadows(background))
    return ndimage.binary_opening(~reached & ~_holes(background, alike & ~reached, reached))


def largest_components(inside: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Keep the largest connected component and those of comparable size (step 4); specks and dust go."""
    labels, count = ndimage.label(inside, structure=_EIGHT_NEIGHBOURS)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return (areas >= max(_COMPARABLE * areas.max(), 1))[labels]


def soften(rgb: Float[np.ndarray, "H W 3"], inside: Bool[np.ndarray, "H W"], reach: int) -> Float[np.ndarray, "H W 4"]:
    """Replace a hard silhouette by fractional alpha and the object's own colour along its edge (step 5).

    In a band of ``reach`` pixels to both sides a pixel is ``c = alpha f + (1 - alpha) b`` with f and b the nearest sure
    object and backdrop colours, hence ``alpha = (c - b).(f - b) / |f - b|^2``.
    """
    core = ndimage.binary_erosion(inside, _EIGHT_NEIGHBOURS, iterations=reach, border_value=1)
    # What is thinner than the band (a handle, an antenna) would lose its core: its middle line stands in.
    depth = ndimage.distance_transform_edt(inside)
    middle = inside & (depth >= ndimage.maximum_filter(depth, size=3))
    core |= middle & ~ndimage.binary_dilation(core, iterations=reach + 1)
    outside = ~ndimage.binary_dilation(inside, _EIGHT_NEIGHBOURS, iterations=reach)
    band = ~core & ~outside
    object_color = _nearest_color(rgb, core)
    backdrop_color = _nearest_color(rgb, outside)
    difference = object_color - backdrop_color
    contrast = np.square(difference).sum(axis=-1)
    projected = ((rgb - backdrop_color) * difference).sum(axis=-1) / np.maximum(contrast, 1e-6)
    # Where both colours are alike the projection is noise: the smoothed silhouette is the better guess.
    blurred = ndimage.gaussian_filter(inside.astype(np.float32), 0.5 * reach)
    trust = np.clip(contrast / 0.02, 0, 1)
    alpha = np.where(band, np.clip(trust * projected + (1 - trust) * blurred, 0, 1), core.astype(np.float32))
    color = np.where((band & (alpha < 0.99))[..., None], object_color, rgb)
    return np.concatenate([color, alpha[..., None]], axis=-1).astype(np.float32)


def decontaminate(rgb: Float[np.ndarray, "H W 3"], alpha: Float[np.ndarray, "H W 1"]) -> Float[np.ndarray, "H W 4"]:
    """Join colour and a fractional mask, giving what is not surely object the colour of the nearest sure pixel."""
    sure = alpha[..., 0] > 0.95
    color = np.where(sure[..., None], rgb, _nearest_color(rgb, sure))
    return np.concatenate([color, alpha], axis=-1).astype(np.float32)


def srgb_to_lab(rgb: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Convert sRGB in [0, 1] to CIE L*a*b* under D65 (IEC 61966-2-1; CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    relative = linear.astype(np.float32) @ _LINEAR_RGB_TO_RELATIVE_XYZ.T
    cube = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(cube, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _box_around(inside: Bool[np.ndarray, "H W"], margin: int) -> tuple[slice, slice]:
    rows, columns = ndimage.find_objects(inside.astype(np.uint8))[0]
    return (
        slice(max(rows.start - margin, 0), rows.stop + margin),
        slice(max(columns.start - margin, 0), columns.stop + margin),
    )


def _from_border(passable: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    # One passable pixel all around joins what the object cuts into separate regions at the border.
    regions, _ = ndimage.label(np.pad(passable, 1, constant_values=True))
    return regions[1:-1, 1:-1] == regions[0, 0]


def _shadows(background: Background) -> Bool[np.ndarray, "H W"]:
    """Where the image is the backdrop with less light: the same tint, no darker than a shadow, changing softly."""
    light, full_light = _linear_rgb(background.lab), np.maximum(_linear_rgb(background.fit), 1e-3)
    ratio = light / full_light
    share = ratio.mean(axis=-1)
    tint = np.ptp(ratio, axis=-1) / np.maximum(share, 1e-3)
    soft = background.slope < _SHADOW_SLOPE
    return (share > _SHADOW_DEPTH) & (share < 1.02) & (tint < _SHADOW_TINT) & soft


def _holes(
    background: Background, enclosed: Bool[np.ndarray, "H W"], reached: Bool[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"]:
    """Which enclosed regions of the backdrop's colour one sees the backdrop through."""
    labels, count = ndimage.label(enclosed)
    if count == 0:
        return enclosed
    regions = np.arange(1, count + 1)
    areas = ndimage.sum_labels(enclosed, labels, regions)
    colors = ndimage.median(background.distance, labels, regions)
    slope = background.slope
    rims = ndimage.grey_dilation(labels, size=(3, 3)) * ~enclosed
    sharpness = ndimage.median(slope, rims, regions) / np.median(slope[ndimage.binary_dilation(reached) & ~reached])
    is_backdrop = (colors < 1 + 1.5 * background.spread) & (sharpness > _HOLE_RIM)
    is_hole = is_backdrop & (areas >= _HOLE_AREA * enclosed.size)
    return np.concatenate([[False], is_hole])[labels]


def _linear_rgb(lab: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Invert ``srgb_to_lab`` up to the linear light of the sRGB primaries."""
    middle = (lab[..., 0] + 16) / 116
    cube = np.stack([middle + lab[..., 1] / 500, middle, middle - lab[..., 2] / 200], axis=-1)
    relative = np.where(cube > 6 / 29, cube**3, 3 * (6 / 29) ** 2 * (cube - 4 / 29))
    return relative @ np.linalg.inv(_LINEAR_RGB_TO_RELATIVE_XYZ).T


def _quadratic_terms(height: int, width: int) -> Float[np.ndarray, "H W 6"]:
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).astype(np.float32)


def _border_band(height: int, width: int) -> Bool[np.ndarray, "H W"]:
    thickness = max(2, round(_BAND * min(height, width)))
    band = np.ones((height, width), dtype=bool)
    band[thickness:-thickness, thickness:-thickness] = False
    return band


def _robust_fit(
    terms: Float[np.ndarray, "N 6"], colors: Float[np.ndarray, "N 3"]
) -> tuple[Float[np.ndarray, "6 3"], Float[np.ndarray, " N"]]:
    """Least squares on what agrees, from a constant to a plane to a quadratic; returns coefficients and residuals."""
    coefficients = np.zeros((6, 3), dtype=np.float32)
    coefficients[0] = np.median(colors, axis=0)
    for used in (1, 3, 3, 3, 6, 6, 6):
        residuals = np.linalg.norm(colors - terms @ coefficients, axis=-1)
        agreeing = residuals <= max(2.5 * float(np.median(residuals)), 1.0)
        solution = np.linalg.lstsq(terms[agreeing, :used], colors[agreeing], rcond=None)[0]
        coefficients = np.zeros_like(coefficients)
        coefficients[:used] = solution
    return coefficients, np.linalg.norm(colors - terms @ coefficients, axis=-1)


def _nearest_color(rgb: Float[np.ndarray, "H W 3"], where: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W 3"]:
    """Give every pixel the denoised colour of the nearest pixel of ``where`` (the frame's mean if it is empty)."""
    if not where.any():
        return np.broadcast_to(rgb.mean(axis=(0, 1)), rgb.shape)
    weight = where.astype(np.float32)
    blur = (1.0, 1.0, 0)
    mean = (
        ndimage.gaussian_filter(rgb * weight[..., None], blur)
        / np.maximum(ndimage.gaussian_filter(weight, blur[:2]), 1e-6)[..., None]
    )
    nearest = ndimage.distance_transform_edt(~where, return_distances=False, return_indices=True)
    return mean[tuple(nearest)]
