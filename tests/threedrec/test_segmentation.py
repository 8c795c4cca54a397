"""Cutting objects out of plain backgrounds, measured against alpha that is known."""

import numpy as np
import pytest

from threedrec.errors import InputError
from threedrec.preprocess import cut_out
from threedrec.preprocess.plain_background import (
    cut_out_plain,
    decontaminate,
    fit_background,
    flood,
    largest_components,
    srgb_to_lab,
)
from threedrec.preprocess.reading import read_rgba

SIZE = 128


def iou(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first > 0.5, second > 0.5
    return float((first & second).sum() / (first | second).sum())


def disc(radius: float, x: float = 64, y: float = 64) -> np.ndarray:
    """Coverage of a disc with an antialiased edge."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    return np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1).astype(np.float32)[..., None]


def over(alpha: np.ndarray, color, background) -> np.ndarray:
    image = alpha * np.asarray(color) + (1 - alpha) * np.broadcast_to(background, (SIZE, SIZE, 3))
    return (np.round(image.clip(0, 1) * 255) / 255).astype(np.float32)


def backgrounds() -> dict[str, np.ndarray]:
    y, x = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j][..., None]
    noise = np.random.default_rng(0).standard_normal((SIZE, SIZE, 3))
    shadow = np.exp(-(((x - 0.5) / 0.3) ** 2 + ((y - 0.85) / 0.1) ** 2))
    return {
        "white": np.ones((1, 1, 3)),
        "blue": np.array([[[0.3, 0.5, 0.8]]]),
        "gradient": (0.95 - 0.35 * y - 0.1 * x) * np.ones(3),
        "vignette": (0.92 - 0.55 * ((x - 0.5) ** 2 + (y - 0.45) ** 2)) * np.ones(3),
        "noise": 0.75 + 0.03 * noise,
        "shadow": (0.93 - 0.3 * shadow) * np.ones(3),
    }


@pytest.mark.parametrize("name", backgrounds())
def test_a_disc_is_found_on_plain_backgrounds(name):
    alpha = disc(35)
    result = cut_out_plain(over(alpha, (0.7, 0.2, 0.1), backgrounds()[name]), "x.png")
    assert iou(result[..., 3:], alpha) > 0.97
    assert np.abs(result[..., 3:] - alpha).mean() < 0.006


@pytest.mark.parametrize("sample", ["chair", "teapot", "penguin", "robot"])
@pytest.mark.parametrize("name", ["white", "gradient", "shadow"])
def test_samples_are_cut_out_of_plain_backgrounds(repository, sample, name):
    """Thin legs, see-through handles, and white parts before white and gray."""
    rgba = read_rgba(repository / "load" / "images" / f"{sample}.png")[::2, ::2]
    alpha = rgba[..., 3:]
    result = cut_out_plain(over(alpha, rgba[..., :3], backgrounds()[name]), sample)
    assert iou(result[..., 3:], alpha) > 0.9


def test_edges_get_their_true_alpha_and_no_rim_of_the_backdrop():
    alpha = disc(35.3)
    result = cut_out_plain(over(alpha, (0.8, 0.1, 0.1), (0.1, 0.8, 0.1)), "x.png")
    np.testing.assert_allclose(result[..., 3:], alpha, atol=0.05)
    visible = result[..., 3] > 0.05
    np.testing.assert_allclose(result[visible][:, :3], [[0.8, 0.1, 0.1]] * visible.sum(), atol=0.04)


def test_background_coloured_parts_inside_the_object_stay():
    """A belly that fades into the backdrop's white is object: its rim is soft. A sharp window shows the backdrop."""
    body = disc(45)
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    belly = np.exp(-(((columns - 64) / 16) ** 2 + ((rows - 64) / 16) ** 2))[..., None].clip(0, 0.8) / 0.8
    color = (1 - belly) * np.array([0.2, 0.2, 0.6]) + belly
    faded = cut_out_plain(over(body, color, (1, 1, 1)), "x.png")
    assert faded[64, 64, 3] == 1
    ring = body * (1 - disc(20))
    window = cut_out_plain(over(ring, (0.2, 0.2, 0.6), (1, 1, 1)), "x.png")
    assert window[64, 64, 3] == 0 and iou(window[..., 3:], ring) > 0.96


def test_object_that_leaves_the_frame_on_one_side():
    alpha = disc(50, y=118)
    result = cut_out_plain(over(alpha, (0.1, 0.3, 0.2), backgrounds()["gradient"]), "x.png")
    assert iou(result[..., 3:], alpha) > 0.97


def test_specks_go_and_parts_of_comparable_size_stay():
    inside = (disc(20, x=40) + disc(12, x=95) + disc(2, x=70, y=10))[..., 0] > 0.5
    kept = largest_components(inside)
    assert kept[64, 40] and kept[64, 95] and not kept[10, 70]
    assert not largest_components(np.zeros((8, 8), dtype=bool)).any()


@pytest.mark.parametrize(
    "image",
    [
        np.random.default_rng(0).random((SIZE, SIZE, 3)),
        np.kron(np.indices((16, 16)).sum(axis=0) % 2, np.ones((8, 8)))[..., None] * np.ones(3),
    ],
    ids=["noise", "chessboard"],
)
def test_backgrounds_that_are_not_plain_are_refused(image):
    with pytest.raises(InputError, match="photo.jpg: the background is not plain") as raised:
        cut_out_plain(image.astype(np.float32), "photo.jpg")
    for way in ("RGBA PNG", "data.mask_path", "pip install"):
        assert way in str(raised.value)


def test_nothing_before_a_plain_background_is_refused():
    with pytest.raises(InputError, match="empty.jpg: no object stands out"):
        cut_out_plain(over(disc(30), (0.8, 0.8, 0.8), (0.8, 0.8, 0.8)), "empty.jpg")


def test_the_backdrop_is_fitted_through_an_object_at_the_border():
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j][..., None]
    backdrop = (0.8 - 0.1 * y + 0.05 * x * y) * np.ones(3)
    background = fit_background(over(disc(40, x=128), (0.9, 0.2, 0.1), backdrop), "x.png")
    expected = srgb_to_lab(over(np.zeros((1, 1, 1)), 0, backdrop))
    assert np.abs(background.fit - expected).max() < 1.0
    assert flood(background)[64, 100] and not flood(background)[64, 20]


def test_lab_of_known_colours():
    """Reference values for D65 (Lindbloom's calculator, rounded)."""
    colors = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(srgb_to_lab(colors), expected, atol=0.02)


def test_large_images_are_segmented_at_full_resolution():
    rows, columns = np.mgrid[:700, :1300] + 0.5
    alpha = np.clip(200.5 - np.hypot(columns - 600, rows - 350), 0, 1)[..., None]
    image = (alpha * np.array([0.1, 0.2, 0.7]) + (1 - alpha) * 0.9).astype(np.float32)
    result = cut_out_plain(image, "x.png")
    assert result.shape == (700, 1300, 4) and iou(result[..., 3:], alpha) > 0.995


def test_decontamination_takes_colour_from_the_nearest_sure_pixel():
    alpha = np.zeros((5, 9, 1), dtype=np.float32)
    alpha[:, :4], alpha[:, 4] = 1, 0.5
    rgb = np.where(alpha == 1, [[[0.9, 0.1, 0.2]]], [[[0.1, 0.9, 0.9]]]).astype(np.float32)
    result = decontaminate(rgb, alpha)
    np.testing.assert_allclose(result[..., :3], np.broadcast_to([0.9, 0.1, 0.2], (5, 9, 3)), atol=1e-5)
    np.testing.assert_array_equal(result[..., 3:], alpha)


def with_alpha(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.broadcast_to(alpha, (SIZE, SIZE, 1))], axis=-1).astype(np.float32)


def test_alpha_is_taken_as_it_is():
    rgba = with_alpha(np.random.default_rng(0).random((SIZE, SIZE, 3)), 0.8 * disc(30))
    for method in ("auto", "alpha"):
        np.testing.assert_array_equal(cut_out(rgba, method, "x.png"), rgba)


def test_opaque_alpha_counts_as_none():
    alpha = disc(30)
    rgba = with_alpha(over(alpha, (0.7, 0.2, 0.1), (1, 1, 1)), np.ones((1, 1, 1)))
    assert iou(cut_out(rgba, "plain", "x.png")[..., 3:], alpha) > 0.97
    with pytest.raises(InputError, match=r"x\.png: has no transparency, but data\.segmentation=alpha"):
        cut_out(rgba, "alpha", "x.png")


def test_unknown_method_is_named():
    with pytest.raises(InputError, match=r"data\.segmentation: unknown method 'magic'; use one of auto, alpha"):
        cut_out(with_alpha(np.ones((SIZE, SIZE, 3)), np.ones((1, 1, 1))), "magic", "x.png")
