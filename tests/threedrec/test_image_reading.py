"""Every kind of image file that people have is read the same, or refused by name."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from threedrec.errors import InputError
from threedrec.preprocess import read_gray, read_rgba

HALF = 128 / 255


def two_by_two_blocks() -> np.ndarray:
    """A 16x32 picture of four flat blocks: red, green above blue, gray."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16], pixels[:8, 16:] = (255, 0, 0), (0, 255, 0)
    pixels[8:, :16], pixels[8:, 16:] = (0, 0, 255), (128, 128, 128)
    return pixels


CORNERS = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [HALF, HALF, HALF]]])


def corners(rgba: np.ndarray) -> np.ndarray:
    return rgba[4 :: rgba.shape[0] - 9, 4 :: rgba.shape[1] - 9, :3]


def write(path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    "mode, suffix, tolerance",
    [
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("P", "png", 0),
        ("RGB", "webp", 0),
        ("RGBA", "webp", 0),
        ("RGB", "jpg", 0.03),  # JPEG's own loss
        ("CMYK", "jpg", 0.06),
        ("YCbCr", "jpg", 0.03),
    ],
)
def test_colour_modes(tmp_path, mode, suffix, tolerance):
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    image = Image.fromarray(two_by_two_blocks())
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    rgba = read_rgba(write(tmp_path / f"x.{suffix}", image, **options))
    assert rgba.dtype == np.float32 and rgba.shape == (16, 32, 4)
    np.testing.assert_allclose(corners(rgba), CORNERS, atol=tolerance + 1e-6)
    np.testing.assert_array_equal(rgba[..., 3], 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_gray_modes(tmp_path, mode):
    levels = np.repeat(np.array([[0, 255]], dtype=np.uint8), 16, axis=0).repeat(16, axis=1)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    path = write(tmp_path / "x.png", image)
    rgba = read_rgba(path)
    np.testing.assert_allclose(rgba[0, [0, -1]], [[0, 0, 0, 1], [1, 1, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(read_gray(path)[..., 0], rgba[..., 0], atol=1e-6)


def test_16_bit_gray_keeps_its_precision(tmp_path):
    levels = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) + 30000
    gray = read_gray(write(tmp_path / "depth.png", Image.fromarray(levels)))
    np.testing.assert_allclose(gray[..., 0], levels / 65535, atol=1e-7)


@pytest.mark.parametrize("color_type, channels", [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_png_is_read_at_8_bits(tmp_path, color_type, channels):
    pixel = [0x4000, 0x8000, 0xC000, 0x2000][:channels]
    path = tmp_path / "x.png"
    path.write_bytes(png_16_bit(16, 16, color_type, pixel))
    rgba = read_rgba(path)
    color = [pixel[0]] * 3 if channels == 2 else pixel[:3]
    alpha = pixel[-1] if channels in (2, 4) else 65535
    np.testing.assert_allclose(rgba[3, 5], np.array([*color, alpha]) / 65535, atol=1 / 255)


def png_16_bit(width: int, height: int, color_type: int, pixel: list[int]) -> bytes:
    row = b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * width
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * height)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_palette_and_colour_key_transparency(tmp_path):
    flat = np.zeros((16, 32), dtype=np.uint8)
    flat[:, 16:] = 1
    palette = Image.fromarray(flat).convert("P")
    palette.putpalette([10, 20, 30, 255, 0, 0])
    rgba = read_rgba(write(tmp_path / "p.png", palette, transparency=bytes([0, 128])))
    np.testing.assert_allclose(rgba[0, [0, -1], 3], [0, HALF])
    np.testing.assert_allclose(rgba[0, -1, :3], [1, 0, 0])
    keyed = read_rgba(write(tmp_path / "k.png", Image.fromarray(two_by_two_blocks()), transparency=(255, 0, 0)))
    np.testing.assert_array_equal(corners_alpha(keyed), [[0, 1], [1, 1]])
    gray = read_rgba(write(tmp_path / "g.png", Image.fromarray(flat.astype(np.uint16)), transparency=1))
    np.testing.assert_array_equal(gray[0, [0, -1], 3], [1, 0])


def corners_alpha(rgba: np.ndarray) -> np.ndarray:
    return rgba[4 :: rgba.shape[0] - 9, 4 :: rgba.shape[1] - 9, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    """The stored picture is the upright one, moved as the EXIF standard (CIPA DC-008, 4.6.4) names it."""
    upright = two_by_two_blocks()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    rgba = read_rgba(write(tmp_path / f"x.{suffix}", image, exif=exif, quality=100))
    assert rgba.shape == (16, 32, 4)
    np.testing.assert_allclose(corners(rgba), CORNERS, atol=0.05)


def test_unreadable_orientation_is_no_reason_to_refuse(tmp_path):
    path = write(tmp_path / "x.jpg", Image.fromarray(two_by_two_blocks()), exif=b"Exif\0\0II*\0\xff\xff")
    assert read_rgba(path).shape == (16, 32, 4)


def test_large_images_are_averaged_down_with_their_alpha(tmp_path):
    pixels = np.zeros((64, 4096, 4), dtype=np.uint8)
    pixels[:, 0::2] = (255, 0, 0, 255)
    pixels[:, 1::2] = (0, 255, 0, 0)  # invisible: its green must not show
    path = write(tmp_path / "x.png", Image.fromarray(np.concatenate([pixels] * 8)))
    rgba = read_rgba(path)
    assert rgba.shape == (256, 2048, 4)
    np.testing.assert_allclose(rgba[100, 1000], [1, 0, 0, 0.5], atol=0.01)


def damaged(tmp_path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def encoded(fmt: str, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, fmt)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.png", b"", "empty"),
        ("text.png", b"this is not a picture", "not an image"),
        ("cut.png", encoded("PNG")[:500], "damaged or cut short"),
        ("cut.jpg", encoded("JPEG")[:800], "damaged or cut short"),
        ("cut.webp", encoded("WEBP")[:300], "not an image|damaged"),
        ("animation.png", encoded("GIF"), "GIF files are not supported"),
        ("scan.jpg", encoded("TIFF"), "TIFF files are not supported"),
        ("pixel.png", encoded("PNG", (1, 1)), "too few"),
        ("thin.png", encoded("PNG", (15, 400)), "too few"),
        ("strip.png", encoded("PNG", (600, 20)), "narrower than 20:1"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    path = damaged(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as raised:
        read_rgba(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="absent.png: no such file"):
        read_rgba(tmp_path / "absent.png")
    with pytest.raises(InputError, match="is a folder"):
        read_rgba(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_rgba(tmp_path / ("x" * 5000))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        read_rgba(tmp_path / "pipe.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    path = damaged(tmp_path, "secret.png", encoded("PNG"))
    os.chmod(path, 0)
    with pytest.raises(InputError, match="permission denied"):
        read_rgba(path)


def test_permission_error_of_the_system_is_named(tmp_path, monkeypatch):
    path = damaged(tmp_path, "secret.png", encoded("PNG"))

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match=r"secret\.png: cannot be read: permission denied"):
        read_rgba(path)


def test_decompression_bomb_is_refused_before_it_explodes(tmp_path):
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    empty = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path = damaged(tmp_path, "bomb.png", b"\x89PNG\r\n\x1a\n" + chunk + empty)
    with pytest.raises(InputError, match="more than 178 million pixels"):
        read_rgba(path)


def test_damaged_bytes_never_escape_as_other_errors(tmp_path):
    draw = random.Random(0)
    originals = [encoded(fmt, (24, 24)) for fmt in ("PNG", "JPEG", "WEBP")]
    path = tmp_path / "x.bin"
    for _ in range(150):
        content = bytearray(draw.choice(originals))
        for _ in range(draw.choice([1, 4, 16])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(1, len(content) + 1)] if draw.random() < 0.3 else content)
        try:
            pixels = read_rgba(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1
