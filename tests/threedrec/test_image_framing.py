"""Windows and resampling: what is where, how much of it, and nothing invented at edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedrec.preprocess import Window, resample, silhouette_window, whole_window

WHOLE = Window(0, 0, 1, 1)


def rectangle(height: int, width: int, top: int, left: int, tall: int, wide: int) -> np.ndarray:
    alpha = np.zeros((height, width, 1), dtype=np.float32)
    alpha[top : top + tall, left : left + wide] = 1
    return alpha


def box(alpha: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero((alpha > 0.5).any(axis=(1, 2))), np.flatnonzero((alpha > 0.5).any(axis=(0, 2)))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def test_identity_returns_the_pixels_untouched():
    image = np.random.default_rng(0).random((7, 11, 4), dtype=np.float32)
    np.testing.assert_array_equal(resample(image, WHOLE, 7, 11), image)


def test_shift_by_whole_pixels_fills_with_nothing():
    image = np.ones((4, 4, 1), dtype=np.float32)
    moved = resample(image, Window(0.25, 0, 1.25, 1), 4, 4)
    np.testing.assert_array_equal(moved[..., 0], [[1, 1, 1, 0]] * 4)


def test_halving_weighs_neighbours_by_a_triangle():
    """Radius 2 about x = 1 weighs the pixels at -0.5, 0.5, 1.5, 2.5 by 1, 3, 3, 1 (of 8); the first is outside."""
    image = np.array([0, 8, 0, 0], dtype=np.float32).reshape(1, 4, 1)
    np.testing.assert_allclose(resample(image, WHOLE, 1, 2)[0, :, 0], [3, 1], atol=1e-6)


def test_doubling_interpolates_linearly():
    image = np.array([0, 4], dtype=np.float32).reshape(1, 2, 1)
    np.testing.assert_allclose(resample(image, WHOLE, 1, 4)[0, :, 0], [0, 1, 3, 3], atol=1e-6)


def test_whole_window_pads_the_shorter_side():
    assert whole_window(100, 50) == Window(-0.5, 0, 1.5, 1)
    assert whole_window(50, 100) == Window(0, -0.5, 1, 1.5)


@settings(max_examples=40, deadline=None)
@given(
    tall=st.integers(6, 60), wide=st.integers(6, 60), top=st.integers(0, 40), left=st.integers(0, 60),
    fill=st.floats(0.3, 1.0), size=st.sampled_from([64, 128, 200]),
)  # fmt: skip
def test_the_box_is_centred_fills_what_it_should_and_keeps_its_aspect(tall, wide, top, left, fill, size):
    alpha = rectangle(100, 120, top, left, tall, wide)
    framed = resample(alpha, silhouette_window(alpha, fill), size, size)
    y0, x0, y1, x1 = box(framed)
    scale = fill * size / max(tall, wide)
    assert y1 - y0 == pytest.approx(tall * scale, abs=1.01)
    assert x1 - x0 == pytest.approx(wide * scale, abs=1.01)
    assert (y0 + y1) / 2 == pytest.approx(size / 2, abs=0.51)
    assert (x0 + x1) / 2 == pytest.approx(size / 2, abs=0.51)
    # Mass: every input pixel becomes scale^2 output pixels, unless the filter leaves the frame (fill near 1).
    if fill < 0.9:
        assert framed.sum() == pytest.approx(tall * wide * scale**2, rel=0.04)


def test_framing_twice_changes_nothing():
    y, x = np.mgrid[:90, :130]
    alpha = (((x - 40) / 25) ** 2 + ((y - 60) / 14) ** 2 < 1).astype(np.float32)[..., None]
    once = resample(alpha, silhouette_window(alpha, 0.7), 128, 128)
    twice = resample(once, silhouette_window(once, 0.7), 128, 128)
    np.testing.assert_allclose(box(once), box(twice), atol=1)
    assert ((once > 0.5) != (twice > 0.5)).mean() < 0.01


def test_faint_halos_do_not_shift_the_object():
    alpha = rectangle(50, 50, 20, 20, 10, 10)
    with_halo = np.maximum(alpha, rectangle(50, 50, 0, 0, 30, 30) * 0.3)
    assert silhouette_window(with_halo, 0.7) == silhouette_window(alpha, 0.7)


def test_premultiplied_colours_leave_no_fringe():
    """Whatever the colour under transparent pixels, a red square stays purely red at its edges."""
    alpha = rectangle(40, 40, 10, 10, 17, 17)
    hidden = np.random.default_rng(0).random((40, 40, 3), dtype=np.float32)
    rgb = np.where(alpha > 0, np.array([1, 0, 0], dtype=np.float32), hidden)
    framed = resample(np.concatenate([rgb * alpha, alpha], axis=-1), silhouette_window(alpha, 0.6), 33, 33)
    edge = (framed[..., 3] > 0) & (framed[..., 3] < 1)
    assert edge.any()
    np.testing.assert_allclose(framed[..., 0], framed[..., 3], atol=1e-6)
    np.testing.assert_array_equal(framed[..., 1:3], 0)
