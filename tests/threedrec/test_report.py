import logging
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from threedrec.errors import InputError
from threedrec.report import (
    before_after_sheet,
    contact_sheet,
    depth_range,
    preview_grid,
    side_by_side,
    to_rgb,
    write_turntable,
)
from threedrec.video import BackgroundVideo


def renders(frames: int = 4, size: int = 33) -> dict[str, torch.Tensor]:
    opacity = torch.zeros(frames, size, size, 1)
    opacity[:, 8:24, 8:24] = 1.0
    normal = torch.zeros(frames, size, size, 3)
    normal[..., 0] = opacity[..., 0]
    depth = torch.linspace(1.0, 2.0, size)[None, None, :, None] * opacity
    rgb = torch.ones(frames, size, size, 3)
    rgb[:, 8:24, 8:24] = torch.tensor([1.0, 0.0, 0.0])
    rgb[torch.arange(frames), torch.arange(frames), -1] = 0.0  # no two frames are the same
    return {"rgb": rgb, "normal": normal, "depth": depth, "opacity": opacity}


def test_what_renderers_return_becomes_pictures_over_white() -> None:
    pictures = to_rgb(renders())
    assert all(picture.shape == (4, 33, 33, 3) for picture in pictures.values())
    assert (pictures["normal"][:, 0, 0] == 1).all() and (pictures["depth"][:, 0, 0] == 1).all()
    torch.testing.assert_close(pictures["normal"][0, 16, 16], torch.tensor([1.0, 0.5, 0.5]))
    near, far = pictures["depth"][0, 16, 8], pictures["depth"][0, 16, 23]
    torch.testing.assert_close(near, torch.tensor([0.99, 0.91, 0.15]), atol=0.05, rtol=0)
    torch.testing.assert_close(far, torch.tensor([0.27, 0.0, 0.33]), atol=0.05, rtol=0)
    assert (pictures["opacity"][0, 16, 16] == 1).all() and (pictures["opacity"][0, 0, 0] == 0).all()


def test_depth_of_nothing_is_white_and_of_a_plane_is_even() -> None:
    empty = {name: torch.zeros_like(value) for name, value in renders().items()}
    assert (to_rgb(empty)["depth"] == 1).all()
    plane = to_rgb({"depth": torch.full((1, 4, 4, 1), 2.0)})["depth"]
    assert (plane == plane[0, 0, 0]).all() and plane.isfinite().all()


def test_the_turntable_tiles_its_rows_and_has_every_frame(tmp_path: Path) -> None:
    path = write_turntable(renders(6), tmp_path / "turntable.mp4", fps=8)
    assert path == tmp_path / "turntable.mp4" and list(tmp_path.iterdir()) == [path]
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
        frames = [np.asarray(frame) for frame in reader]
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 8
    assert len(frames) == 6 and frames[0].shape == (34, 132, 3)  # 33 and 4 · 33, made even
    np.testing.assert_allclose(frames[0][16, 16], [255, 0, 0], atol=25)  # colour is stored at half the size
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playable while it still loads


def test_without_ffmpeg_a_gif_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("threedrec.video._ffmpeg_problem", lambda: "No ffmpeg exe could be found.")
    with caplog.at_level(logging.WARNING):
        path = write_turntable(renders(3), tmp_path / "turntable.mp4")
    assert path == tmp_path / "turntable.gif" and "a .gif is written instead" in caplog.text
    with Image.open(path) as image:
        assert image.n_frames == 3 and image.size == (132, 34)


def test_a_video_written_while_frames_come_is_the_same(tmp_path: Path) -> None:
    frames = renders(6)
    write_turntable(frames, tmp_path / "whole.mp4")
    with BackgroundVideo(tmp_path / "parts.mp4") as video:
        for start in (0, 4):
            part = {name: value[start : start + 4] for name, value in frames.items()}
            video.add(side_by_side(part, depth_range(frames)))
    assert (tmp_path / "parts.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_frames_that_end_in_an_error_leave_no_video(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rendering failed"), BackgroundVideo(tmp_path / "t.mp4") as video:
        video.add(side_by_side(renders(30)))
        raise RuntimeError("rendering failed")
    assert list(tmp_path.iterdir()) == []


def test_the_encoders_error_reaches_the_renderer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/t\.mp4: cannot be written"):
        with BackgroundVideo(tmp_path / "file" / "t.mp4") as video:
            video.add(side_by_side(renders(30)))


def test_an_unwritable_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/t\.mp4: cannot be written"):
        write_turntable(renders(2), tmp_path / "file" / "t.mp4")


def test_a_video_that_ffmpeg_leaves_incomplete_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a full disk: ffmpeg ends without a word to its caller.
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (2, 0.1))
    with pytest.raises(InputError, match=r"t\.mp4: cannot be written"):
        write_turntable(renders(3), tmp_path / "t.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_contact_sheet_has_a_row_per_kind_and_a_column_per_view(tmp_path: Path) -> None:
    path = contact_sheet(renders(3), tmp_path / "sheet.png", ["0°", "90°", "180°"], cell=40)
    with Image.open(path) as image:
        width, height = image.size
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert height == 16 + 4 * (40 + 4) and width > 3 * (40 + 4)
    left = width - 3 * (40 + 4)
    red = (pixels[:, :, 0] > 200) & (pixels[:, :, 1:].max(axis=2) < 60)
    assert all(red[16 + 20, left + 44 * i + 20] for i in range(3))
    assert (pixels[:16] < 128).any() and (pixels[:, :left] < 128).any()  # labels above and on the left
    assert (pixels[-1] == 255).all()


def test_sheets_need_images_and_enough_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="3 columns got 2 labels"):
        contact_sheet(renders(3), tmp_path / "a.png", ["0", "1"])


def test_the_photograph_is_put_over_white_beside_the_views(tmp_path: Path) -> None:
    photograph = torch.zeros(20, 40, 4)
    path = before_after_sheet(photograph, renders(2)["rgb"], tmp_path / "a.png", cell=32)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (16 + 32 + 4, 4 + 64 + 4 + 2 * 36, 3)
    assert (pixels[20:40, 8:60] == 255).all()


def test_a_grid_breaks_its_rows(tmp_path: Path) -> None:
    path = preview_grid(renders(5, 32)["rgb"], tmp_path / "a.png", columns=2)
    with Image.open(path) as image:
        assert image.size == (4 + 2 * 36, 4 + 3 * 36)
