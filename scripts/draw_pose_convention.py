"""Draw docs/pictures/pose-convention.svg: the support view's frame from above, in both pose conventions.

    python scripts/draw_pose_convention.py

Cameras and rays are those that `nvsadapter_guidance.cameras` gives the network; nothing is placed by hand. All cameras
are level, so that the drawing's plane is the x-z plane of the support view, with z up the page and x to the left.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from nvsadapter_guidance.cameras import RELEASED, RELEASED_SAMPLING, CameraConvention, look_at, relative_to_support

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "pose-convention.svg"
AZIMUTHS = (0.0, 30.0, 60.0, 90.0, 120.0)
DISTANCE, RADIUS = 1.5, 0.5
SCALE = 62.0
"""Pixels per world unit."""
WIDTH, HEIGHT = 430.0, 500.0
"""Of one panel, in pixels; the support camera stands in its middle."""
RAY = 0.95
"""Length of the drawn part of a central ray, in world units."""
COLOURS = ("#333333", "#0072b2", "#009e73", "#d55e00", "#aa4499")

Point = tuple[float, float]


def planar_poses(convention: CameraConvention) -> list[tuple[Point, Point]]:
    """Position and central ray of each camera in the support view's frame, as (right, up) on the page."""
    c2w = relative_to_support(look_at(torch.tensor(AZIMUTHS), 0.0, DISTANCE, convention))
    return [((-m[0][3], m[2][3]), (-m[0][2], m[2][2])) for m in c2w.tolist()]


def pixel(point: Point, left: float) -> Point:
    """Page units to pixels of the panel that begins at ``left``."""
    return left + WIDTH / 2 + SCALE * point[0], 30.0 + (HEIGHT - 30.0) / 2 - SCALE * point[1]


def line(start: Point, end: Point, left: float, style: str) -> str:
    """A straight line between two page points."""
    (x1, y1), (x2, y2) = pixel(start, left), pixel(end, left)
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def circle(centre: Point, radius: float, left: float, style: str) -> str:
    """A circle whose radius is in world units."""
    x, y = pixel(centre, left)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius * SCALE:.1f}" {style}/>'


def label(text: str, at: Point, left: float, style: str = "") -> str:
    """Centred text."""
    x, y = pixel(at, left)
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def cameras(convention: CameraConvention, left: float) -> Iterator[str]:
    """A dot, an arrow along the central ray and the azimuth for each camera."""
    for azimuth, colour, (position, ray) in zip(AZIMUTHS, COLOURS, planar_poses(convention)):
        tip = (position[0] + RAY * ray[0], position[1] + RAY * ray[1])
        behind = (position[0] - 0.33 * ray[0], position[1] - 0.33 * ray[1] - 0.07)
        yield line(position, tip, left, f'stroke="{colour}" stroke-width="2" marker-end="url(#arrow)"')
        yield circle(position, 0.09, left, f'fill="{colour}"')
        yield label(f"{azimuth:.0f}°", behind, left, f'fill="{colour}"')


def training_panel(left: float) -> Iterator[str]:
    """What training and the 3D guidance give the network."""
    object_ = (0.0, DISTANCE)
    yield label("training, 3D guidance: (-R, t)", (0.0, 3.75), left, 'font-weight="bold"')
    yield circle(object_, RADIUS, left, 'fill="#dddddd" stroke="#888888"')
    yield circle(object_, DISTANCE, left, 'fill="none" stroke="#bbbbbb" stroke-dasharray="3 4"')
    yield from cameras(RELEASED, left)
    yield label("object", object_, left)
    yield label("every central ray meets the object", (0.0, -3.4), left)


def sampling_panel(left: float) -> Iterator[str]:
    """What the released sampling script and its demo give the network."""
    trained, own = (0.0, DISTANCE), (0.0, -DISTANCE)
    position = planar_poses(RELEASED_SAMPLING)[2][0]
    miss = math.dist(position, trained)
    yield label("sampling script, demo: (+R, t)", (0.0, 3.75), left, 'font-weight="bold"')
    yield circle(trained, RADIUS, left, 'fill="none" stroke="#888888" stroke-dasharray="5 4"')
    yield circle(own, RADIUS, left, 'fill="#dddddd" stroke="#888888"')
    yield circle(own, DISTANCE, left, 'fill="none" stroke="#bbbbbb" stroke-dasharray="3 4"')
    yield line(position, trained, left, 'stroke="#009e73" stroke-dasharray="2 4"')
    yield from cameras(RELEASED_SAMPLING, left)
    yield label("where training has the object", (0.0, 2.15), left)
    yield label("object", own, left)
    yield label("cameras look away from the object", (0.0, -3.4), left)
    yield label(f"{miss:.1f} = 2 · {DISTANCE} · sin 60°", (-1.75, 0.75), left, 'fill="#009e73"')


def drawing() -> str:
    """The whole picture as SVG text."""
    parts = [*training_panel(0.0), *sampling_panel(WIDTH)]
    arrow = '<path d="M0,0 L8,3 L0,6 z" fill="#333333"/>'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH:.0f} {HEIGHT:.0f}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        f'<defs><marker id="arrow" viewBox="0 0 8 6" refX="7" refY="3" markerWidth="8" markerHeight="6" '
        f'orient="auto">{arrow}</marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(drawing(), encoding="utf-8")
