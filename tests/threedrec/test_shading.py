"""Materials: what each shading shows, when lights come on, and which draws are made."""

import pytest
import torch

from threedrec.errors import InputError
from threedrec.field import MLPConfig
from threedrec.rendering.shading import DiffusePointLight, NoMaterial

FEATURES = torch.tensor([[0.0, 2.0, -2.0], [1.0, 1.0, 1.0]])
POINTS = torch.zeros(2, 3)
NORMAL = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
LIGHTS = torch.tensor([[0.0, 3.0, 4.0], [0.0, 3.0, 4.0]])


def shade(material, shading: str, ambient_ratio: float | None = 1.0) -> torch.Tensor:
    return material(FEATURES, POINTS, NORMAL, LIGHTS, shading, ambient_ratio)


def test_shadings_by_hand():
    material = DiffusePointLight(DiffusePointLight.Config())
    albedo = torch.sigmoid(FEATURES)
    torch.testing.assert_close(shade(material, "albedo"), albedo)
    torch.testing.assert_close(shade(material, "normal"), 0.5 * NORMAL + 0.5)
    # The light stands at a cosine of 0.8 before the first point and behind the second.
    light = torch.tensor([[0.1 + 0.9 * 0.8], [0.1]]).expand(2, 3)
    torch.testing.assert_close(shade(material, "textureless", None), light)
    torch.testing.assert_close(shade(material, "diffuse", None), albedo * light)
    torch.testing.assert_close(shade(material, "diffuse", 0.25), albedo * torch.tensor([[0.25 + 0.6], [0.25]]))


def test_full_ambient_light_is_albedo_and_needs_no_normal():
    material = DiffusePointLight(DiffusePointLight.Config())
    torch.testing.assert_close(material(FEATURES, POINTS, None, None, "diffuse", 1.0), torch.sigmoid(FEATURES))
    assert not material.requires_normal("diffuse", 1.0)
    assert not material.requires_normal("albedo", 0.3)
    assert material.requires_normal("diffuse", 0.9)
    assert material.requires_normal("diffuse", None)


def test_lights_come_on_after_ambient_only_steps():
    material = DiffusePointLight(DiffusePointLight.Config(ambient_only_steps=100, diffuse_prob=1.0, textureless_prob=0))
    generator = torch.Generator().manual_seed(0)
    material.update(99)
    assert material.choose(None, generator) == "albedo"
    assert material.choose("diffuse", generator) == "diffuse", "an explicit wish counts"
    material.update(100)
    assert material.choose(None, generator) == "diffuse"
    assert material.eval().choose(None, None) == "diffuse"


def test_probabilities_of_shadings():
    material = DiffusePointLight(DiffusePointLight.Config(diffuse_prob=0.75, textureless_prob=0.2))
    material.update(10**6)
    generator = torch.Generator().manual_seed(0)
    draws = [material.choose(None, generator) for _ in range(4000)]
    share = {name: draws.count(name) / 4000 for name in ("albedo", "diffuse", "textureless")}
    assert share == pytest.approx({"albedo": 0.25, "diffuse": 0.6, "textureless": 0.15}, abs=0.03)


def test_soft_shading_draws_the_ambient_share():
    material = DiffusePointLight(DiffusePointLight.Config(soft_shading=True))
    first = material(FEATURES, POINTS, NORMAL, LIGHTS, "textureless", None, torch.Generator().manual_seed(1))
    again = material(FEATURES, POINTS, NORMAL, LIGHTS, "textureless", None, torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, again)
    ambient = first[1, 0]
    torch.testing.assert_close(first[0, 0], ambient + (1 - ambient) * 0.8)


def test_no_material_shows_its_features():
    material = NoMaterial(NoMaterial.Config())
    torch.testing.assert_close(shade(material, material.choose("diffuse", None)), torch.sigmoid(FEATURES))
    network = NoMaterial(NoMaterial.Config(input_feature_dims=3, mlp_network_config=MLPConfig(n_neurons=4)))
    assert shade(network, "albedo").shape == (2, 3)
    assert list(network.parameters())


def test_unknown_shading_is_refused():
    with pytest.raises(InputError, match="glossy"):
        DiffusePointLight(DiffusePointLight.Config()).choose("glossy", None)
