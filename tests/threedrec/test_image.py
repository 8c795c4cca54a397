"""The support view: from a file to composited, framed tensors and a camera."""

import numpy as np
import pytest
import torch
from PIL import Image

from threedrec.errors import InputError
from threedrec.image import SingleImageConfig, SupportView, companion_path, load_support_view, save_support_view


def save(path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def disc_rgba(height: int = 48, width: int = 64, alpha: int = 255) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    pixels[(x - 0.4 * width) ** 2 + (y - 0.5 * height) ** 2 < (0.3 * height) ** 2] = (200, 100, 0, alpha)
    return pixels


@pytest.fixture
def disc(tmp_path) -> str:
    return save(tmp_path / "disc.png", disc_rgba())


def test_view_has_the_promised_shapes_and_camera(disc):
    config = SingleImageConfig(
        image_path=disc,
        default_elevation_deg=10.0,
        default_azimuth_deg=0.0,
        default_camera_distance=1.5,
        default_fovy_deg=49.1,
    )
    view = load_support_view(config, size=64)
    assert view.rgb.shape == (64, 64, 3) and view.mask.shape == (64, 64, 1)
    assert view.rgb.dtype == view.mask.dtype == torch.float32
    assert view.depth is None and view.normal is None and view.path == disc
    assert len(view.camera) == 1 and (view.camera.height, view.camera.width) == (64, 64)
    assert view.camera.fovy.item() == pytest.approx(49.1)
    expected = 1.5 * torch.tensor([np.cos(np.radians(10.0)), 0.0, np.sin(np.radians(10.0))], dtype=torch.float32)
    torch.testing.assert_close(view.camera.positions[0], expected)
    torch.testing.assert_close(view.camera.light_positions, view.camera.positions)
    assert torch.equal(view.rgb[0, 0], torch.ones(3))
    torch.testing.assert_close(view.rgb[32, 32], torch.tensor([200, 100, 0]) / 255)


@pytest.mark.parametrize("fill", [0.4, 0.7, 0.9])
def test_object_fills_the_frame_as_told(disc, fill):
    mask = load_support_view(SingleImageConfig(image_path=disc, fill=fill), size=128).mask[..., 0] > 0.5
    rows = torch.nonzero(mask.any(dim=1))
    assert (rows[-1] - rows[0] + 1).item() == pytest.approx(fill * 128, abs=1)


def test_fractional_alpha_is_composited_over_white(tmp_path):
    """alpha 0.2 of black over white is 0.8; 0.6 of (1, 0, 0.5) over white is (1, 0.4, 0.7)."""
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    pixels[:, :10] = (255, 0, 128, 153)
    pixels[:, 10:] = (0, 0, 0, 51)
    view = load_support_view(SingleImageConfig(image_path=save(tmp_path / "x.png", pixels), recenter=False), size=20)
    torch.testing.assert_close(view.mask[0, :, 0], torch.tensor([0.6] * 10 + [0.2] * 10))
    torch.testing.assert_close(view.rgb[5, 3], torch.tensor([1.0, 0.4, 0.6 * 128 / 255 + 0.4]))
    torch.testing.assert_close(view.rgb[5, 15], torch.tensor([0.8, 0.8, 0.8]))


def test_own_framing_is_kept_and_padded_to_a_square(disc):
    view = load_support_view(SingleImageConfig(image_path=disc, recenter=False), size=64)
    expected = torch.zeros(64, 64)
    expected[8:56] = torch.from_numpy(disc_rgba()[..., 3] / 255.0)
    torch.testing.assert_close(view.mask[..., 0], expected)


def test_colours_below_transparent_pixels_never_show(tmp_path, disc):
    hidden = disc_rgba()
    hidden[hidden[..., 3] == 0, :3] = (0, 255, 255)
    shown, plain = (
        load_support_view(SingleImageConfig(image_path=path), size=50).rgb
        for path in (save(tmp_path / "hidden.png", hidden), disc)
    )
    torch.testing.assert_close(shown, plain)


def test_saved_view_loads_again_as_the_same_view(tmp_path, disc):
    view = load_support_view(SingleImageConfig(image_path=disc), size=64)
    save_support_view(view, tmp_path / "sub" / "input.png")
    again = load_support_view(
        SingleImageConfig(image_path=str(tmp_path / "sub" / "input.png"), recenter=False), size=64
    )
    torch.testing.assert_close(again.mask, view.mask, atol=0.6 / 255, rtol=0)
    torch.testing.assert_close(again.rgb, view.rgb, atol=1.2 / 255, rtol=0)
    assert [file.name for file in (tmp_path / "sub").iterdir()] == ["input.png"]


def test_saving_where_nothing_can_be_written_names_the_path(tmp_path, disc):
    view = load_support_view(SingleImageConfig(image_path=disc), size=32)
    with pytest.raises(InputError, match=r"disc\.png/input\.png"):
        save_support_view(view, f"{disc}/input.png")


def test_resizing_averages_and_keeps_the_field_of_view(disc):
    view = load_support_view(SingleImageConfig(image_path=disc), size=64)
    half = view.resized(32, 32)
    blocks = view.rgb.reshape(32, 2, 32, 2, 3).mean(dim=(1, 3))
    torch.testing.assert_close(half.rgb, blocks)
    assert (half.camera.height, half.camera.width) == (32, 32)
    torch.testing.assert_close(half.camera.fovy, view.camera.fovy)
    for size in (24, 100):
        other = view.resized(size, size)
        assert other.rgb.shape == (size, size, 3) and other.mask.shape == (size, size, 1)
        assert other.mask.mean().item() == pytest.approx(view.mask.mean().item(), rel=0.02)
        assert 0 <= other.rgb.min() and other.rgb.max() <= 1 + 1e-6


def test_moving_keeps_everything(disc):
    view = load_support_view(SingleImageConfig(image_path=disc), size=16).to("cpu")
    assert isinstance(view, SupportView) and view.camera.c2w.device.type == "cpu"


@pytest.mark.parametrize(
    "image, depth", [("x.png", "x_depth.png"), ("a/x_rgba.png", "a/x_depth.png"), ("x.y.jpg", "x.y_depth.png")]
)
def test_companions_are_named_as_threestudio_names_them(image, depth):
    assert companion_path(image, "depth") == depth


def test_depth_and_normal_are_framed_with_the_image(tmp_path, disc):
    """Maps that equal the image's own alpha and colour must come out as its mask and (uncomposited) colour."""
    pixels = disc_rgba()
    save(tmp_path / "disc_depth.png", pixels[..., 3].astype(np.uint16) * 257)
    save(tmp_path / "disc_normal.png", pixels[..., :3])
    view = load_support_view(SingleImageConfig(image_path=disc, requires_depth=True, requires_normal=True), size=64)
    torch.testing.assert_close(view.depth, view.mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(view.normal + (1 - view.mask), view.rgb, atol=1e-5, rtol=0)
    small = view.resized(32, 32)
    assert small.depth.shape == (32, 32, 1) and small.normal.shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["depth", "normal"])
def test_missing_map_is_named_exactly(disc, kind):
    config = SingleImageConfig(image_path=disc, requires_depth=kind == "depth", requires_normal=kind == "normal")
    with pytest.raises(InputError, match=rf"disc_{kind}\.png: no such file; data\.requires_{kind}"):
        load_support_view(config)


def test_map_of_another_shape_is_refused(tmp_path, disc):
    save(tmp_path / "disc_depth.png", np.zeros((48, 48), dtype=np.uint8))
    with pytest.raises(InputError, match=r"disc_depth\.png: is 48x48, which does not fit the 64x48 pixels"):
        load_support_view(SingleImageConfig(image_path=disc, requires_depth=True))


def test_mask_file_replaces_segmentation(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    image = save(tmp_path / "busy.png", rgb)
    mask = np.zeros((80, 80), dtype=np.uint8)
    mask[20:60, 20:60] = 255
    config = SingleImageConfig(image_path=image, mask_path=save(tmp_path / "mask.png", mask), recenter=False)
    view = load_support_view(config, size=40)
    assert view.mask[11:29, 11:29].min() > 0.99 and view.mask[:9].max() == 0
    torch.testing.assert_close(view.rgb[20, 20], torch.from_numpy(rgb[20, 20]) / 255)
    black = SingleImageConfig(image_path=image, mask_path=save(tmp_path / "black.png", 0 * mask))
    with pytest.raises(InputError, match=r"black\.png: the object covers 0\.00%"):
        load_support_view(black)


@pytest.mark.parametrize("alpha, message", [(0, r"covers 0\.00%"), (100, r"covers 0\.00%")])
def test_silhouettes_of_nothing_are_refused(tmp_path, alpha, message):
    path = save(tmp_path / "x.png", disc_rgba(alpha=alpha))
    with pytest.raises(InputError, match=message) as raised:
        load_support_view(SingleImageConfig(image_path=path))
    assert path in str(raised.value)


def test_silhouettes_of_everything_are_refused(tmp_path):
    pixels = np.full((40, 40, 4), 255, dtype=np.uint8)
    pixels[0, 0, 3] = 0
    with pytest.raises(InputError, match=r"covers 99\.9% of the frame"):
        load_support_view(SingleImageConfig(image_path=save(tmp_path / "x.png", pixels)))


def test_no_image_is_said_by_its_key():
    with pytest.raises(InputError, match=r"data\.image_path"):
        load_support_view(SingleImageConfig())


def test_released_defaults():
    config = SingleImageConfig()
    assert (config.height, config.width, config.default_azimuth_deg) == (96, 96, -180.0)
    assert (config.default_camera_distance, config.default_fovy_deg, config.rays_noise_scale) == (1.2, 60.0, 2e-3)


def test_sizes_follow_the_milestones():
    config = SingleImageConfig(height=[128, 160, 512], width=[128, 160, 512], resolution_milestones=[2000, 5000])
    sizes = [config.size_at(step) for step in (0, 1999, 2000, 4999, 5000, 9000)]
    assert sizes == [(128, 128), (128, 128), (160, 160), (160, 160), (512, 512), (512, 512)]
    assert SingleImageConfig().size_at(10**6) == (96, 96)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"height": [64, 128], "width": [64], "resolution_milestones": [10]}, "width"),
        ({"height": 64, "width": 96}, "^height: 64 beside a width of 96; .* square"),
        ({"height": [64, 128], "width": [64, 96], "resolution_milestones": [10]}, "^height: "),
        ({"height": [64, 128], "width": [64, 128]}, "resolution_milestones"),
        ({"height": [1, 2, 3], "width": [1, 2, 3], "resolution_milestones": [9, 3]}, "must not decrease"),
    ],
)
def test_sizes_that_do_not_fit_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        SingleImageConfig(**keys)
