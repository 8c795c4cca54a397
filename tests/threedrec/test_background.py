"""Backgrounds: colours, learning, augmentation."""

import pytest
import torch
from torch.nn import functional

from threedrec.errors import InputError
from threedrec.field import NeuralEnvironmentMap, SolidBackground

DIRECTIONS = functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_solid_background_is_one_colour_and_learns_only_when_asked():
    fixed = SolidBackground(SolidBackground.Config(color=(0.2, 0.4, 0.6)))
    torch.testing.assert_close(fixed(DIRECTIONS), torch.tensor([0.2, 0.4, 0.6]).expand(50, 3))
    assert not list(fixed.parameters())
    learned = SolidBackground(SolidBackground.Config(learned=True))
    learned(DIRECTIONS).sum().backward()
    torch.testing.assert_close(learned.color.grad, torch.full((3,), 50.0))


def test_environment_map_depends_on_direction_and_stays_in_range():
    torch.manual_seed(0)
    background = NeuralEnvironmentMap(NeuralEnvironmentMap.Config())
    colors = background(DIRECTIONS)
    assert colors.shape == (50, 3) and 0 < colors.min() and colors.max() < 1
    assert colors.std(dim=0).min() > 1e-3


def test_environment_map_shows_the_evaluation_colour_outside_training():
    background = NeuralEnvironmentMap(NeuralEnvironmentMap.Config(eval_color=(1.0, 0.0, 0.0)))
    assert not torch.equal(background(DIRECTIONS)[0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(background.eval()(DIRECTIONS), torch.tensor([1.0, 0.0, 0.0]).expand(50, 3))


def test_augmentation_is_seeded_and_for_training_only():
    background = SolidBackground(SolidBackground.Config(random_aug=True, random_aug_prob=1.0))
    first = background(DIRECTIONS, torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, background(DIRECTIONS, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, torch.ones(50, 3))
    torch.testing.assert_close(first, first[:1].expand(50, 3))
    torch.testing.assert_close(background.eval()(DIRECTIONS), torch.ones(50, 3))


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(InputError, match=r"background\.color"):
        SolidBackground.Config(color=(1.0, 1.0))  # type: ignore[arg-type]
