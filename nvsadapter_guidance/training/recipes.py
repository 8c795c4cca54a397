"""Random objects with a front: furniture, vehicles, vessels, creatures, appliances, lamps, and free assemblies.

Each kind is a recipe over :class:`~nvsadapter_guidance.training.sdf.Parts` that draws all its objects at once. Objects
stand upright, face +x, and are about one unit across; the renderer brings them to size.
"""

import math
from collections.abc import Callable
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.training.sdf import Parts
from nvsadapter_guidance.training.shapes import PART_COUNT, Draw


def chair(draw: Draw) -> None:
    """A seat on legs, a back at the rear, perhaps arms and cushions."""
    width, depth = draw.between(0.2, 0.45), draw.between(0.2, 0.3)
    seat, leg = draw.between(0.03, 0.12), draw.between(0.015, 0.05)
    height, back = draw.between(0.2, 0.45), draw.between(0.2, 0.45)
    round_leg = draw.chance(0.5)
    for side in (1, -1):
        draw.part(
            (side * (depth - leg), width - leg, -height / 2),
            (leg, leg, height / 2),
            round_corner=round_leg,
            mirrored=1.0,
            paint=1,
            profile=(draw.between(-0.1, 0.4), 0.0, 0.0),
        )
    draw.part((0.0, 0.0, 0.0), (depth, width, seat), round_corner=0.5, rounding=draw.between(0.01, 0.08), paint=0)
    draw.part(
        (-depth, 0.0, back), (draw.between(0.02, 0.06), width, back), rounding=0.03, tilt=draw.between(-18, 0), paint=0
    )
    arms = draw.chance(0.5)
    draw.part(
        (0.0, width, draw.between(0.12, 0.25)),
        (depth * 0.9, draw.between(0.02, 0.06), 0.03),
        mirrored=1.0,
        present=arms,
        paint=1,
    )
    draw.part((depth * 0.7, width, 0.09), (0.025, 0.025, 0.1), mirrored=1.0, present=arms, paint=1)
    draw.part(
        (-depth * 0.6, draw.between(-0.15, 0.15), 0.14),
        (0.05, 0.12, 0.12),
        round_corner=0.3,
        rounding=0.05,
        tilt=-20.0,
        present=draw.chance(0.4),
        paint=3,
    )


def vehicle(draw: Draw) -> None:
    """A long body with a cabin off its middle, wheels, lamps, perhaps a load."""
    length, width = draw.between(0.38, 0.6), draw.between(0.18, 0.26)
    body, wheel = draw.between(0.07, 0.16), draw.between(0.08, 0.13)
    cabin, cabin_length = draw.between(0.07, 0.16), draw.between(0.14, 0.3)
    draw.part((0.0, 0.0, 0.0), (length, width, body), round_corner=0.4, rounding=draw.between(0.02, 0.06), paint=0)
    draw.part(
        (draw.between(-0.15, 0.12), 0.0, body + cabin),
        (cabin_length, width * 0.9, cabin),
        round_corner=0.3,
        rounding=0.04,
        profile=(draw.between(-0.35, 0.0), 0.0, 0.0),
        blend=0.03,
        paint=2,
    )
    for place in (0.62, -0.62):
        draw.part(
            (place * length, width, -body),
            (wheel, wheel, 0.04),
            round_corner=1.0,
            rounding=0.02,
            axis="y",
            mirrored=1.0,
            paint=4,
            plain=0.8,
        )
    draw.part(
        (length, width * 0.6, 0.01),
        (0.035, 0.035, 0.035),
        round_corner=1.0,
        rounding=0.03,
        mirrored=1.0,
        paint=3,
        plain=1.0,
    )
    draw.part((length, 0.0, -body * 0.6), (0.03, width * 0.9, 0.03), paint=4)
    draw.part(
        (-length * 0.6, 0.0, body + 0.08),
        (length * 0.3, width * 0.8, draw.between(0.06, 0.2)),
        present=draw.chance(0.4),
    )


def vessel(draw: Draw) -> None:
    """A turned body, open or with a lid, a handle on one side and perhaps a spout on the other."""
    radius, height = draw.between(0.18, 0.36), draw.between(0.2, 0.48)
    slope, bulge, ripple = draw.between(-0.35, 0.35), draw.between(-0.5, 0.1), draw.between(-0.2, 0.2)
    open_top = draw.chance(0.55)
    draw.part(
        (0.0, 0.0, 0.0),
        (radius, radius, height),
        round_corner=1.0,
        rounding=draw.between(0.01, 0.03),
        profile=(slope, bulge, ripple),
        wall=0.012 * open_top,
        paint=0,
        plain=0.25,
    )
    foot = radius * (1 - slope + bulge - ripple * math.sin(3)) - 0.01
    draw.part((0.0, 0.0, 0.03 - height), (foot, foot, 0.03), round_corner=1.0, present=open_top, paint=0)
    turn = draw.between(-180, 180)
    angle, reach = torch.deg2rad(turn), radius * (1 + 0.5 * bulge.clamp_max(0)) + 0.03
    ring = draw.between(0.12, 0.19)
    draw.part(
        (reach * angle.cos(), reach * angle.sin(), 0.0),
        (ring, ring * draw.between(0.9, 1.5), 0.03),
        yaw=turn,
        round_corner=1.0,
        rounding=0.02,
        wall=0.008,
        axis="y",
        present=draw.chance(0.6),
        paint=0,
    )
    draw.part(
        (-reach * angle.cos(), -reach * angle.sin(), height * 0.3),
        (0.04, 0.04, 0.16),
        yaw=turn + 180,
        tilt=50.0,
        round_corner=1.0,
        profile=(-0.3, 0.0, 0.0),
        blend=0.05,
        present=draw.chance(0.4),
        paint=0,
    )
    lid = 1 - open_top
    draw.part((0.0, 0.0, height), (radius * 0.7, radius * 0.7, 0.06), round_corner=1.0, rounding=0.05, present=lid)
    draw.part((0.0, 0.0, height + 0.09), (0.04, 0.04, 0.05), round_corner=1.0, rounding=0.035, present=lid, paint=3)
    draw.part((0.0, 0.0, -height), (radius * 1.3, radius * 1.3, 0.03), round_corner=1.0, present=draw.chance(0.3))


def creature(draw: Draw) -> None:
    """A body with a head in front, eyes, ears, legs in pairs, and a tail."""
    length, girth = draw.between(0.18, 0.4), draw.between(0.12, 0.22)
    head, lift = draw.between(0.1, 0.19), draw.between(0.05, 0.3)
    legs = draw.between(0.08, 0.25)
    upright = draw.chance(0.4)
    front = length * (1 - 0.75 * upright)
    draw.part(
        (0.0, 0.0, 0.0),
        (girth + upright * 0.02, girth, length),
        round_corner=1.0,
        rounding=girth * 0.9,
        axis="x",
        tilt=-80 * upright,
        blend=0.05,
        paint=0,
    )
    x, z = front + 0.3 * head, lift + upright * (0.35 * length + 0.5 * head)
    _face(draw, x, z, head)
    for side in (1, -1):
        draw.part(
            (side * front * 0.65, girth * 0.7, -girth - legs * 0.5 - upright * 0.5 * length),
            (0.05, 0.05, legs + 0.04),
            round_corner=1.0,
            rounding=0.04,
            mirrored=1.0,
            blend=0.04,
            paint=1,
        )
    draw.part(
        (-front - 0.1, 0.0, 0.05),
        (0.03, 0.03, draw.between(0.08, 0.2)),
        round_corner=1.0,
        rounding=0.028,
        tilt=draw.between(-80, -20),
        blend=0.03,
        paint=1,
    )


def _face(draw: Draw, x: Float[Tensor, " n"], z: Float[Tensor, " n"], head: Float[Tensor, " n"]) -> None:
    """A head at ``(x, 0, z)`` of radius ``head``, with ears, eyes and a nose."""
    draw.part(
        (x, 0.0, z),
        (head, head, head),
        round_corner=1.0,
        rounding=head * 0.95,
        blend=0.06,
        stretch=(draw.between(0.85, 1.3), 1.0, draw.between(0.85, 1.1)),
        paint=0,
    )
    draw.part(
        (x, head * 0.6, z + head),
        (0.05, 0.03, draw.between(0.05, 0.16)),
        round_corner=1.0,
        rounding=0.025,
        mirrored=1.0,
        blend=0.02,
        profile=(draw.between(-0.6, 0.2), 0.0, 0.0),
        paint=1,
    )
    draw.part(
        (x + 0.85 * head, head * 0.4, z + 0.25 * head),
        (0.028, 0.028, 0.028),
        round_corner=1.0,
        rounding=0.027,
        mirrored=1.0,
        paint=4,
        plain=1.0,
    )
    draw.part(
        (x + head, 0.0, z - 0.2 * head), (0.05, 0.05, 0.05), round_corner=1.0, rounding=0.045, blend=0.02, paint=3
    )


def appliance(draw: Draw) -> None:
    """A box with a recess or panel in front, knobs, a drawer line, and something on top."""
    depth, width, height = draw.between(0.15, 0.4), draw.between(0.2, 0.45), draw.between(0.2, 0.5)
    draw.part(
        (0.0, 0.0, 0.0),
        (depth, width, height),
        round_corner=draw.between(0, 0.4),
        rounding=draw.between(0.005, 0.05),
        paint=0,
    )
    draw.part(
        (depth, draw.between(-0.06, 0.06), height * 0.2),
        (draw.between(0.03, 0.25), width * 0.75, height * 0.6),
        carve=draw.chance(0.6),
        paint=1,
    )
    draw.part(
        (depth, draw.between(-0.15, 0.15), -height * 0.68),
        (0.02, width * draw.between(0.3, 0.8), height * 0.18),
        paint=2,
    )
    knob = draw.between(0.025, 0.05)
    draw.part(
        (depth + 0.02, width * draw.between(0.2, 0.75), -height * 0.68),
        (knob, knob, 0.04),
        round_corner=1.0,
        axis="x",
        mirrored=draw.chance(0.5),
        paint=4,
    )
    draw.part(
        (depth + 0.03, -width * 0.7, height * 0.2),
        (0.02, 0.02, height * 0.4),
        round_corner=1.0,
        present=draw.chance(0.5),
        paint=3,
    )
    draw.part(
        (-depth * 0.3, width * draw.between(-0.5, 0.5), height + 0.06),
        (0.12, 0.12, 0.08),
        round_corner=draw.chance(0.5),
        present=draw.chance(0.4),
    )
    draw.part(
        (depth * 0.7, width * 0.8, -height - 0.05), (0.04, 0.04, 0.08), mirrored=1.0, present=draw.chance(0.5), paint=4
    )
    draw.part(
        (-depth * 0.7, width * 0.8, -height - 0.05), (0.04, 0.04, 0.08), mirrored=1.0, present=draw.chance(0.5), paint=4
    )


def lamp(draw: Draw) -> None:
    """A foot, a post, an arm to one side or none, a shade, and small parts on the post."""
    post, foot = draw.between(0.2, 0.5), draw.between(0.12, 0.28)
    arm = draw.chance(0.5) * draw.between(0.1, 0.3)
    shade, tall = draw.between(0.12, 0.3), draw.between(0.08, 0.22)
    draw.part((0.0, 0.0, -post), (foot, foot, draw.between(0.02, 0.08)), round_corner=draw.chance(0.7), paint=0)
    thick = draw.between(0.015, 0.05)
    draw.part(
        (0.0, 0.0, 0.0),
        (thick, thick, post),
        round_corner=1.0,
        profile=(draw.between(-0.3, 0.3), 0.0, draw.between(-0.2, 0.2)),
        paint=1,
    )
    draw.part((arm / 2, 0.0, post), (0.025, 0.025, arm / 2 + 0.03), round_corner=1.0, axis="x", paint=1)
    draw.part(
        (arm, 0.0, post),
        (shade, shade, tall),
        round_corner=draw.chance(0.8),
        profile=(draw.between(-0.6, 0.2), 0.0, 0.0),
        tilt=draw.between(-30, 10) * (arm > 0),
        wall=draw.chance(0.5) * 0.015,
        paint=2,
        plain=0.3,
    )
    draw.part(
        (0.0, 0.0, draw.between(-0.2, 0.2)),
        (0.07, 0.07, 0.06),
        round_corner=1.0,
        rounding=0.05,
        present=draw.chance(0.6),
        paint=3,
    )
    draw.part(
        (foot * 0.7, foot * draw.between(-0.5, 0.5), -post + 0.06),
        (0.04, 0.04, 0.05),
        present=draw.chance(0.5),
        paint=4,
    )


def table(draw: Draw) -> None:
    """A top on legs or a pedestal, with things standing on it."""
    width, depth = draw.between(0.3, 0.5), draw.between(0.2, 0.4)
    leg, height = draw.between(0.02, 0.05), draw.between(0.12, 0.4)
    round_top, pedestal = draw.chance(0.35), draw.chance(0.3)
    draw.part((0.0, 0.0, 0.0), (depth, width, draw.between(0.015, 0.06)), round_corner=round_top, paint=0)
    for side in (1, -1):
        draw.part(
            (side * depth * 0.75, width * 0.75, -height),
            (leg, leg, height),
            round_corner=draw.chance(0.5),
            mirrored=1.0,
            present=1 - pedestal,
            paint=1,
        )
    draw.part(
        (0.0, 0.0, -height), (0.16, 0.16, height), round_corner=1.0, profile=(-0.3, 0.5, 0.0), present=pedestal, paint=1
    )
    draw.part((depth * 0.6, 0.0, -0.1), (0.03, width * 0.6, 0.07), present=draw.chance(0.5), paint=2)
    for _ in range(3):
        size, tall = draw.between(0.04, 0.12), draw.between(0.05, 0.2)
        place = depth * draw.between(-0.6, 0.6), width * draw.between(-0.7, 0.7), tall
        draw.part(
            place,
            (size, size, tall),
            round_corner=draw.chance(0.6),
            profile=(draw.between(-0.4, 0.4), 0.0, 0.0),
            yaw=draw.between(0, 90),
            present=draw.chance(0.6),
        )


def assembly(draw: Draw) -> None:
    """Solids of any shape and turn around one body, some mirrored, some carved out of it."""
    for index in range(PART_COUNT):
        reach = 0.0 if index == 0 else 0.32
        low, high = (0.15, 0.38) if index == 0 else (0.04, 0.22)
        half = draw.between(low, high), draw.between(low, high), draw.between(low, high)
        centre = draw.between(-reach, reach), draw.between(-reach, reach), draw.between(-reach, reach)
        draw.part(
            centre,
            half,
            round_corner=draw.chance(0.5) * draw.between(0, 2).clamp_max(1.0),
            rounding=draw.chance(0.6) * draw.between(0, 0.15),
            axis=("z", "x", "z", "y")[index % 4],
            yaw=draw.chance(0.3) * draw.between(-90, 90),
            tilt=draw.chance(0.3) * draw.between(-60, 60),
            profile=(draw.chance(0.4) * draw.between(-0.7, 0.7), draw.chance(0.2) * draw.between(-0.4, 0.4), 0.0),
            wall=draw.chance(0.1) * 0.03,
            carve=(0.0 if index < 3 else draw.chance(0.25)),
            blend=draw.chance(0.4) * draw.between(0, 0.12),
            mirrored=draw.chance(0.35),
            present=1.0 if index < 2 else draw.chance(0.7),
        )


KINDS: dict[str, tuple[Callable[[Draw], None], float]] = {
    "chair": (chair, 0.13),
    "vehicle": (vehicle, 0.13),
    "vessel": (vessel, 0.14),
    "creature": (creature, 0.17),
    "appliance": (appliance, 0.13),
    "lamp": (lamp, 0.06),
    "table": (table, 0.08),
    "assembly": (assembly, 0.16),
}


def random_parts(count: int, generator: torch.Generator) -> tuple[Parts, tuple[str, ...]]:
    """Draw ``count`` objects of all kinds, in random order.

    Args:
        count: number of objects.
        generator: its device is where the objects are made.

    Returns:
        the parts, and the kind of each object.
    """
    shares = torch.tensor([share for _, share in KINDS.values()], device=generator.device)
    drawn = torch.multinomial(shares, count, replacement=True, generator=generator).sort().values
    batches, names = [], []
    for index, (name, (recipe, _)) in enumerate(KINDS.items()):
        number = int((drawn == index).sum())
        if number:
            draw = Draw(number, generator)
            recipe(draw)
            batches.append(draw.parts())
            names += [name] * number
    order = torch.randperm(count, generator=generator, device=generator.device)
    fields_of = [field.name for field in fields(Parts)]
    joined = {name: torch.cat([getattr(parts, name) for parts in batches])[order] for name in fields_of}
    return Parts(**joined), tuple(names[index] for index in order.tolist())
