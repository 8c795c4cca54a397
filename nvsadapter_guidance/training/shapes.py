"""Drawing many random objects at once: numbers, palettes, and the parts that recipes put together."""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.training.sdf import Parts

PART_COUNT = 8
Number = Tensor | float


class Draw:
    """Draws numbers for n objects, and collects their parts."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator, self.device = count, generator, generator.device
        self.palette = self._palette()
        self._parts: list[dict[str, Tensor]] = []

    def between(self, low: float, high: float) -> Float[Tensor, " n"]:
        """Uniform numbers."""
        return low + (high - low) * torch.rand(self.count, generator=self.generator, device=self.device)

    def chance(self, probability: float) -> Float[Tensor, " n"]:
        """One with a probability, otherwise zero."""
        return (self.between(0, 1) < probability).float()

    def part(
        self,
        centre: Sequence[Number],
        half: Sequence[Number],
        *,
        round_corner: Number = 0.0,
        rounding: Number = 0.02,
        axis: str = "z",
        yaw: Number = 0.0,
        tilt: Number = 0.0,
        stretch: Sequence[Number] = (1.0, 1.0, 1.0),
        profile: Sequence[Number] = (0.0, 0.0, 0.0),
        wall: Number = 0.0,
        carve: Number = 0.0,
        blend: Number = 0.0,
        mirrored: Number = 0.0,
        present: Number = 1.0,
        paint: int | None = None,
        plain: float = 0.4,
    ) -> None:
        """Add one part to every object.

        Args:
            centre: x, y, z.
            half: outer half sizes a, b across and h along the part's axis.
            round_corner: 0 for a rectangle, 1 for the roundest (a circle where a = b).
            rounding: radius of all edges, cut down to the smallest half size.
            axis: object axis that the part's own axis lies along: x, y or z.
            yaw, tilt: degrees about z and about y, before that.
            stretch, profile, wall, carve, blend, mirrored: as in ``Parts``.
            present: 1 where the part is there.
            paint: index of its colour in the object's palette; any when None.
            plain: probability of one colour without pattern.
        """
        sizes = self._rows(half)
        rounding = torch.minimum(self._row(rounding)[:, 0], 0.98 * sizes.amin(1))[:, None]
        inner = sizes - rounding
        self._parts.append(
            {
                "centre": self._rows(centre),
                "rotation": self._rotation(axis, self._row(yaw)[:, 0], self._row(tilt)[:, 0]),
                "stretch": self._rows(stretch),
                "half": inner,
                "corner": self._row(round_corner) * inner[:, :2].amin(1, keepdim=True),
                "rounding": rounding,
                "profile": self._rows(profile),
                "wall": self._row(wall),
                "carve": self._row(carve),
                "blend": self._row(blend),
                "mirrored": self._row(mirrored),
                "absent": 1 - self._row(present),
                **self._paint(paint, plain),
            }
        )

    def parts(self) -> Parts:
        """All parts so far, with absent ones up to ``PART_COUNT``."""
        while len(self._parts) < PART_COUNT:
            self.part((0.0, 0.0, 0.0), (0.1, 0.1, 0.1), present=0.0)
        names = [field.name for field in fields(Parts)]
        return Parts(**{name: torch.stack([part[name] for part in self._parts], dim=1) for name in names})

    def _row(self, value: Number) -> Float[Tensor, "n 1"]:
        if isinstance(value, Tensor):
            return value.reshape(-1, 1)
        return torch.full((self.count, 1), float(value), device=self.device)

    def _rows(self, values: Sequence[Number]) -> Float[Tensor, "n d"]:
        return torch.cat([self._row(value) for value in values], dim=1)

    def _rotation(self, axis: str, yaw: Tensor, tilt: Tensor) -> Float[Tensor, "n 9"]:
        base = {"z": ((1, 0, 0), (0, 1, 0), (0, 0, 1)), "y": ((1, 0, 0), (0, 0, -1), (0, 1, 0))}
        base["x"] = ((0, 0, -1), (0, 1, 0), (1, 0, 0))
        yaw, tilt = torch.deg2rad(yaw), torch.deg2rad(tilt)
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        about_z = [yaw.cos(), yaw.sin(), zero, -yaw.sin(), yaw.cos(), zero, zero, zero, one]
        about_y = [tilt.cos(), zero, -tilt.sin(), zero, one, zero, tilt.sin(), zero, tilt.cos()]
        turn_z, turn_y = (torch.stack(rows, dim=1).view(-1, 3, 3) for rows in (about_z, about_y))
        start = torch.tensor(base[axis], dtype=torch.float32, device=self.device)
        return (start @ turn_y @ turn_z).flatten(1)

    def _palette(self) -> Float[Tensor, "n 5 3"]:
        """Five colours an object: vivid, woody, grey or dark, and a vivid accent and a near-black at the end."""
        count, generator, device = self.count, self.generator, self.device
        draw = torch.rand((count, 5, 4), generator=generator, device=device)
        hue, amount, value, kind = draw.unbind(-1)
        vivid = _from_hsv(hue, 0.35 + 0.65 * amount, 0.3 + 0.7 * value)
        wood = _from_hsv(0.05 + 0.07 * hue, 0.3 + 0.45 * amount, 0.25 + 0.6 * value)
        grey = _from_hsv(hue, 0.12 * amount, 0.08 + 0.9 * value.sqrt())
        colours = torch.where((kind < 0.45)[..., None], vivid, torch.where((kind < 0.62)[..., None], wood, grey))
        colours[:, 3] = vivid[:, 3]
        colours[:, 4] = 0.12 * grey[:, 4] + 0.03
        return colours

    def _paint(self, paint: int | None, plain: float) -> dict[str, Tensor]:
        rows = torch.arange(self.count, device=self.device)
        random = torch.randint(5, (self.count, 2), generator=self.generator, device=self.device)
        first = self.palette[rows, random[:, 0] if paint is None else torch.full_like(rows, paint)]
        kind = torch.rand((self.count, 1), generator=self.generator, device=self.device)
        edges = torch.tensor([plain, *(plain + (1 - plain) * share for share in (0.3, 0.45, 0.7))], device=self.device)
        pattern = ((kind >= edges) & (kind < torch.cat([edges[1:], edges.new_ones(1)]))).float()
        waves = torch.randn((self.count, 3), generator=self.generator, device=self.device)
        one_axis = torch.nn.functional.one_hot(waves.abs().argmax(1), 3) * waves.sign()
        stripes = pattern[:, :1]
        frequency = math.tau * self.between(1.5, 5.0)[:, None]
        # stripes run along one axis; the other patterns vary along all three
        waves = frequency * torch.where(stripes > 0.5, one_axis.float(), (0.5 + 0.5 * waves.abs()).clamp_max(1.0))
        phases = math.tau * torch.rand((self.count, 3), generator=self.generator, device=self.device)
        colour = torch.cat([first, self.palette[rows, random[:, 1]]], dim=1)
        return {"colour": colour, "pattern": pattern, "waves": torch.cat([waves, phases], dim=1)}


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Float[Tensor, "*b 3"]:
    turns = hue[..., None] + torch.tensor([0.0, 2 / 3, 1 / 3], device=hue.device)
    ramp = ((turns * 6) % 6 - 3).abs().sub(1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - ramp))
