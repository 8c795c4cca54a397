"""A folder as people have them: good images of different content, and bad files of ten kinds."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

GOOD_NAMES = (
    "plain {}.png",
    "nested/deep er/{}.png",
    "ünï-写真-{}.png",
    "UPPER {}.PNG",
    "a=b&c #{}.png",
    "photo {}.webp",
)


def picture(number: int, size: int = 64) -> Image.Image:
    """A disc with a stripe on transparency; its colours are the number's."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., :3] = np.random.default_rng(number).integers(0, 256, 3)
    rgba[np.abs(x - y) < 0.1, :3] = number % 256
    rgba[..., 3] = 255 * (x**2 + y**2 < 0.16)
    return Image.fromarray(rgba)


def encoded(image: Image.Image, fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt)
    return buffer.getvalue()


def _bad(path: Path, kind: int, number: int) -> None:
    """Write one bad file; ``number`` makes its content its own."""
    good = picture(1000 + number)
    noise = Image.fromarray(np.random.default_rng(number).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    mark = str(number).encode()
    if kind == 0:
        os.symlink(f"nowhere-{number}", path)
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.write_bytes(b"I am not a picture " + mark)
    elif kind == 3:
        path.write_bytes(encoded(noise)[: 700 + number])
    elif kind == 4:
        path.write_bytes(encoded(noise, "JPEG")[: 700 + number])
    elif kind == 5:
        path.write_bytes(encoded(good.convert("RGB"), "GIF"))
    elif kind == 6:
        path.write_bytes(encoded(noise.crop((0, 0, 2 + number % 5, 3))))
    elif kind == 7:
        path.write_bytes(encoded(noise.resize((700 + number, 20))))
    elif kind == 8:
        good.putalpha(0)
        path.write_bytes(encoded(good))
    else:
        path.write_bytes(b"" if number < 10 else b"\x89PNG\r\n\x1a\n" + mark)


def write_mixed_images(folder: Path, good: int, bad: int) -> None:
    """Write ``good`` images and ``bad`` files of ten kinds, beside files that are neither."""
    for number in range(good):
        path = folder / GOOD_NAMES[number % len(GOOD_NAMES)].format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, lossless=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(bad):
        _bad(folder / f"bad {number}.png", number % 10, number)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
