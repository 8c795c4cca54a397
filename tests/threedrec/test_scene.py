"""The scene's colour at its surface."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from threedrec.field.volume import FieldOutput
from threedrec.scene import Scene


class LayeredBall:
    """A ball of radius 0.5 with a soft rim; colours depend on the depth below the surface."""

    def __call__(self, points: Tensor) -> FieldOutput:
        return FieldOutput(self.density(points), self.color(points), None)

    def normal(self, points: Tensor) -> Tensor:
        return points / points.norm(dim=-1, keepdim=True)

    def density(self, points: Tensor) -> Tensor:
        return 2000.0 * (0.5 - points.norm(dim=-1, keepdim=True)).clamp(min=0.0) / 0.01

    def color(self, points: Tensor) -> Tensor:
        """Red outside and at the very surface, blue from 0.001 inside on."""
        inside = (points.norm(dim=-1, keepdim=True) < 0.499).float()
        return torch.cat([1.0 - inside, torch.zeros_like(inside), inside], dim=-1)


class LayeredScene:
    """What `Scene.surface_albedo` uses of a scene."""

    geometry = LayeredBall()
    renderer = SimpleNamespace(material=SimpleNamespace(albedo=lambda features: features))


@pytest.fixture
def surface() -> Tensor:
    directions = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    return 0.5 * directions / directions.norm(dim=-1, keepdim=True)


def test_the_colour_is_what_rays_gather_not_what_lies_at_one_depth(surface: Tensor) -> None:
    scene = LayeredScene()
    assert (scene.geometry.color(surface)[:, 0] == 1).all()  # the surface itself is red ...
    seen = Scene.surface_albedo(scene, surface)  # type: ignore[arg-type]
    assert (seen[:, 2] > 0.99).all()  # ... but what is opaque is blue


def test_empty_surroundings_give_the_colour_of_the_points(surface: Tensor) -> None:
    scene = LayeredScene()
    seen = Scene.surface_albedo(scene, surface * 1.5)  # type: ignore[arg-type]
    assert torch.allclose(seen, torch.tensor([1.0, 0.0, 0.0]).expand(50, 3), atol=1e-3)
