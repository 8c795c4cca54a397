"""``index.html``: what came out, to look at in any browser without a network."""

import html
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from threedrec.batch.manifest import DONE, Line
from threedrec.errors import InputError
from threedrec.files import atomic_path
from threedrec.preprocess import read_rgba

logger = logging.getLogger(__name__)

PER_PAGE = 500
THUMBNAILS = "thumbnails"
_SIDE = 192

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem}
h1{font-size:1.3rem;margin:0 0 .3rem}
nav a{margin-right:.6rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:1rem;margin-top:1rem}
.card{border:1px solid #8886;border-radius:8px;padding:.7rem;overflow-wrap:anywhere}
.card.failed{border-color:#c33}
.card h2{font-size:.95rem;margin:0 0 .4rem}
.pictures{display:flex;gap:.5rem;align-items:center;min-height:96px;background:#8881;border-radius:4px}
.pictures img{max-width:96px;max-height:96px;background:#fff}
.pictures video,.pictures img.spin{width:100%;min-width:0;background:#fff}
.none{color:#888;padding:0 .6rem}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 .6rem;margin:.5rem 0 0;font-size:.85rem}
dt{color:#888}dd{margin:0}
.error{color:#c33;margin:.5rem 0 0}
"""


def write_gallery(lines: Sequence[Line], root: Path, output: Path) -> None:
    """Write the pages; failures come first.

    Args:
        lines: the line that counts of every image.
        root: folder that the inputs' names are relative to.
        output: the batch's folder.

    Raises:
        InputError: a page cannot be written.
    """
    ordered = sorted(lines, key=lambda line: (line.status == DONE, line.input))
    pages = [ordered[start : start + PER_PAGE] for start in range(0, len(ordered), PER_PAGE)] or [[]]
    for number, page in enumerate(pages):
        cards = "\n".join(_card(line, root, output) for line in page)
        with atomic_path(output / _page_name(number)) as temporary:
            text = _page(cards, lines, number, len(pages))
            temporary.write_bytes(text.encode("utf-8", "replace"))


def _page_name(number: int) -> str:
    return "index.html" if number == 0 else f"index-{number + 1}.html"


def _page(cards: str, lines: Sequence[Line], number: int, count: int) -> str:
    done = sum(line.status == DONE for line in lines)
    title = f"{len(lines)} images: {done} done, {len(lines) - done} failed"
    links = "".join(f'<a href="{_page_name(page)}">{page + 1}</a>' for page in range(count)) if count > 1 else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f'<body><h1>{title}</h1><nav>{links} <a href="summary.csv">summary.csv</a>'
        f'<a href="manifest.jsonl">manifest.jsonl</a></nav>\n<div class="grid">\n{cards}\n</div></body></html>\n'
    )


def _card(line: Line, root: Path, output: Path) -> str:
    thumbnail = _thumbnail(line, root, output)
    picture = f'<img loading="lazy" alt="input" src="{_link(thumbnail)}">' if thumbnail else ""
    heading = f"<h2>{html.escape(line.input)}</h2>"
    if line.status != DONE:
        shown = picture or '<span class="none">no picture</span>'
        error = f'<p class="error">{html.escape(line.error or "")}</p>'
        numbers = _numbers([("attempts", str(line.attempt)), ("seconds", f"{line.seconds:.1f}")])
        return f'<div class="card failed">{heading}<div class="pictures">{shown}</div>{error}{numbers}</div>'
    body = f'{heading}<div class="pictures">{picture}{_turntable(line, output)}</div>{_numbers(_metrics(line))}'
    return f'<div class="card">{body}{_files(line, output)}</div>'


def _turntable(line: Line, output: Path) -> str:
    save = f"{line.output}/save"
    if (output / save / "turntable.mp4").is_file():
        source = _link(f"{save}/turntable.mp4")
        return f'<video controls muted loop playsinline preload="metadata" src="{source}"></video>'
    if (output / save / "turntable.gif").is_file():
        return f'<img class="spin" loading="lazy" alt="turntable" src="{_link(f"{save}/turntable.gif")}">'
    return ""


def _metrics(line: Line) -> list[tuple[str, str]]:
    found = line.metrics
    rows = [("PSNR", "psnr", "{:.2f} dB"), ("SSIM", "ssim", "{:.3f}"), ("mask IoU", "mask_iou", "{:.3f}")]
    rows += [("faces", "faces", "{:,}"), ("memory", "peak_memory_gb", "{:.2f} GB")]
    shown = [(label, form.format(found[key])) for label, key, form in rows if found.get(key) is not None]
    shown.append(("seconds", f"{line.seconds:.1f}"))
    return [*shown, ("same as", line.copy_of)] if line.copy_of else shown


def _numbers(rows: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{label}</dt><dd>{html.escape(value)}</dd>' for label, value in rows)}</dl>"


def _files(line: Line, output: Path) -> str:
    """Links to the meshes and the log."""
    save = output / line.output / "save"
    meshes = sorted(file.name for file in save.glob("*") if file.suffix in (".glb", ".obj", ".ply"))
    links = [f'<a href="{_link(f"{line.output}/save/{name}")}">{html.escape(name)}</a>' for name in meshes]
    return f"<p>{' '.join(links)}</p>" if links else ""


def _thumbnail(line: Line, root: Path, output: Path) -> str | None:
    """Return a small picture of the input, relative to ``output``; None when there is none to be had."""
    if line.hash is None:
        return None
    name = f"{THUMBNAILS}/{line.hash[:16]}.jpg"
    if not (output / name).is_file():
        try:
            pixels = (read_rgba(root / line.input) * 255).round().astype("uint8")
        except InputError as error:
            logger.debug("no thumbnail: %s", error)
            return None
        image = Image.fromarray(pixels)
        image.thumbnail((_SIDE, _SIDE))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        with atomic_path(output / name) as temporary:
            Image.alpha_composite(white, image).convert("RGB").save(temporary, format="JPEG", quality=85)
    return name


def _link(path: str) -> str:
    return quote(os.fsencode(path))
