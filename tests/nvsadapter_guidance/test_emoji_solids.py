import numpy as np
import pytest
import trimesh
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.sources.emoji_solids import (
    Inflation,
    commonest_colour,
    drawn_inflation,
    front_and_back,
    inflate,
    spread_colours,
    squared_height,
)


def disc(size=64, radius=24, left=(255, 0, 0), right=(0, 0, 255)):
    """A disc, half of it in one colour and half in another, on nothing."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    pixels = np.zeros((size, size, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(x[..., None] < 0, left, right)
    pixels[..., 3] = 255 * (x**2 + y**2 < radius**2)
    return Image.fromarray(pixels)


def solid_of(part):
    """The part's surface alone, its seam sewn up."""
    mesh = trimesh.Trimesh(part.vertices, part.faces, process=False)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh


def test_squared_height_of_a_disc_is_that_of_a_ball():
    radius = 30.0
    y, x = np.mgrid[-40:41, -40:41]
    r2 = x**2 + y**2
    height = squared_height(r2 < radius**2)
    inside = r2 < 0.8 * radius**2
    np.testing.assert_allclose(height[inside], radius**2 - r2[inside], atol=0.06 * radius**2)
    assert (height[r2 >= radius**2] == 0).all()


def test_squared_height_of_a_strip_by_hand():
    # One row of three cells between walls of zeros: 4a - b = 4, 4b - 2a = 4, so a = 10/7 and b = 12/7.
    inside = np.zeros((3, 5), dtype=bool)
    inside[1, 1:4] = True
    np.testing.assert_allclose(squared_height(inside)[1], [0, 10 / 7, 12 / 7, 10 / 7, 0])


@pytest.mark.parametrize("inside", [np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)], ids=["empty", "full"])
def test_a_silhouette_needs_an_inside_and_a_margin(inside):
    with pytest.raises(InputError, match="margin"):
        squared_height(inside)


def test_a_disc_becomes_a_closed_ball_of_the_depth_asked_for():
    (part,) = inflate(disc(), Inflation(grid=64, depth=0.5, faces=100_000))
    width, height, depth = np.ptp(part.vertices, axis=0)
    assert width == pytest.approx(height, rel=0.02)
    assert depth == pytest.approx(0.5 * width, rel=0.08)
    mesh = solid_of(part)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 24**3 * 0.5, rel=0.12), "positive: faces look outwards"


def test_a_higher_exponent_makes_a_fuller_solid():
    thin, full = (inflate(disc(), Inflation(grid=64, exponent=e, faces=100_000))[0] for e in (2.0, 5.0))
    assert np.ptp(full.vertices[:, 2]) == pytest.approx(np.ptp(thin.vertices[:, 2]), rel=0.05)
    assert solid_of(full).volume > 1.15 * solid_of(thin).volume


def test_the_picture_is_in_front_upright_and_not_mirrored():
    (part,) = inflate(disc(left=(255, 0, 0), right=(0, 0, 255)), Inflation(grid=64, back="mirrored"))
    texture = np.asarray(part.visual.material.baseColorTexture)
    centres, uv = part.triangles_center, part.visual.uv[part.faces].mean(axis=1)
    middle = (part.vertices.max(axis=0) + part.vertices.min(axis=0)) / 2
    column = (uv[:, 0] * texture.shape[1]).astype(int)
    row = ((1 - uv[:, 1]) * texture.shape[0]).astype(int)
    colour = texture[row, column]
    clear = np.abs(centres[:, 0] - middle[0]) > 4
    for side, channel in ((centres[:, 0] < middle[0], 0), (centres[:, 0] > middle[0], 2)):
        assert (colour[side & clear, channel] > 200).all(), "x to the right, seen from +z; the same from behind"
    front = centres[:, 2] > middle[2]
    assert (uv[front, 0] < 0.5).mean() > 0.99
    up = np.corrcoef(centres[:, 1], uv[:, 1])[0, 1]
    assert up > 0.99


def test_decimation_keeps_to_the_faces_asked_for():
    assert len(inflate(disc(), Inflation(faces=600))[0].faces) <= 600


def test_a_plain_back_has_one_colour_in_the_middle_and_the_fronts_at_the_rim():
    texture = np.asarray(front_and_back(disc(size=100, radius=45, right=(255, 0, 0)), "plain")).astype(int)
    assert texture.shape == (100, 200, 3)
    np.testing.assert_allclose(texture[50, 150], [255, 0, 0], atol=3)
    two = np.asarray(front_and_back(disc(size=100, radius=45), "plain")).astype(int)
    assert np.abs(two[50, 130] - two[50, 170]).max() <= 3, "one colour, whatever the front has left and right"
    assert two[50, 106, 0] > 200 and two[50, 193, 2] > 200, "at the rim, the front's colours"


def test_commonest_colour_is_not_a_mixture():
    pixels = np.asarray(disc(size=64)).copy()
    pixels[:, 40:, :3] = (0, 255, 0)
    pixels[:, :40, :3] = (255, 0, 255)
    np.testing.assert_allclose(commonest_colour(pixels / 255.0), [1, 0, 1], atol=0.05)


def test_colours_spread_beyond_the_silhouette():
    rgba = np.zeros((32, 32, 4))
    rgba[12:20, 12:20] = [0.2, 0.6, 0.4, 1.0]
    spread = spread_colours(rgba, 3.0)
    np.testing.assert_allclose(spread[16, 25], [0.2, 0.6, 0.4], atol=1e-3)
    np.testing.assert_allclose(spread[0, 0], [0.2, 0.6, 0.4], atol=1e-3)


def test_an_empty_picture_or_an_unknown_back_is_refused():
    with pytest.raises(InputError, match="silhouette"):
        inflate(Image.new("RGBA", (32, 32)), Inflation())
    with pytest.raises(InputError, match="back 'sideways' is unknown; use one of plain, blurred, mirrored"):
        inflate(disc(), Inflation(back="sideways"))


def test_how_a_name_is_inflated_never_changes_and_differs_between_names():
    drawn = [drawn_inflation(f"n{k}", two_sided=True) for k in range(60)]
    assert drawn == [drawn_inflation(f"n{k}", two_sided=True) for k in range(60)]
    assert {option.back for option in drawn} == {"plain", "blurred", "mirrored"}
    assert all(0.45 <= option.depth <= 0.95 for option in drawn)
    assert "mirrored" not in {drawn_inflation(f"n{k}", two_sided=False).back for k in range(60)}
