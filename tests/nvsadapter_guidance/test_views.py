"""Banks of views: drawing batches, saving, and augmentations that keep an object one object."""

import colorsys

import pytest
import torch

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.augment import AugmentConfig, augment, hue_rotation, mirror, part_weights
from nvsadapter_guidance.training.views import (
    ViewBank,
    ViewBatch,
    composite,
    load_tar,
    relative_azimuth,
    sample_batch,
    take,
)


def make_bank(objects: int = 3, views: int = 8, size: int = 8) -> ViewBank:
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randint(256, (objects, views, size, size, 4), generator=generator, dtype=torch.uint8)
    azimuth = torch.linspace(0, 315, views).expand(objects, views).contiguous()
    elevation = torch.tensor([0.0, 0.0, 0.0, 20.0, 30.0, 50.0, 60.0, 70.0])[:views].expand(objects, views).contiguous()
    return ViewBank(rgba, azimuth, elevation, torch.full((objects, views), 1.5), tuple("abcdef"[:objects]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_bank_survives_saving(tmp_path):
    bank = make_bank()
    bank.save(tmp_path / "bank.safetensors")
    again = ViewBank.load(tmp_path / "bank.safetensors")
    assert again.names == bank.names and again.fovy == bank.fovy
    assert torch.equal(again.rgba, bank.rgba) and torch.equal(again.azimuth, bank.azimuth)


@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "views.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"views\.tar"):
        ViewBank.load(path)
    with pytest.raises(InputError, match=r"views\.tar"):
        load_tar(path)


def test_queries_are_distinct_and_never_the_support():
    bank = make_bank()
    index = sample_batch(bank, 200, 5, seeded())
    for support, queries in zip(index.support.tolist(), index.queries.tolist()):
        assert support not in queries
        assert len(set(queries)) == 5
    assert set(index.queries.flatten().tolist()) == set(range(8))
    assert set(index.objects.tolist()) == {0, 1, 2}


def test_support_views_are_level_in_three_draws_of_four_and_never_high():
    bank = make_bank()
    index = sample_batch(bank, 4000, 1, seeded())
    elevation = bank.elevation[index.objects, index.support]
    assert (elevation == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert elevation.max() <= 35


def test_a_share_of_support_views_shows_the_front():
    bank = make_bank()
    index = sample_batch(bank, 4000, 1, seeded(), level_share=1.0, front_share=0.4)
    front = bank.azimuth[index.objects, index.support] == 0
    # one of the three level views is a front, and the other 60 % of draws take any of them
    assert front.float().mean().item() == pytest.approx(0.4 + 0.6 / 3, abs=0.03)


def test_objects_without_level_views_still_serve():
    bank = make_bank()
    high = ViewBank(bank.rgba, bank.azimuth, torch.full_like(bank.elevation, 60.0), bank.distance, bank.names)
    assert sample_batch(high, 16, 2, seeded()).queries.shape == (16, 2)


def test_too_many_queries_are_an_error():
    with pytest.raises(InputError, match="num_query=8"):
        sample_batch(make_bank(), 2, 8, seeded())


def test_the_same_seed_draws_the_same_batch():
    first, second = (sample_batch(make_bank(), 16, 3, seeded(5)) for _ in range(2))
    assert torch.equal(first.queries, second.queries) and torch.equal(first.support, second.support)


def test_take_puts_the_support_first():
    bank = make_bank()
    index = sample_batch(bank, 4, 2, seeded())
    batch = take(bank, index)
    assert batch.rgba.shape == (4, 3, 8, 8, 4)
    expected = bank.rgba[index.objects, index.support].float() / 255
    assert torch.equal(batch.rgba[:, 0], expected)
    assert torch.all(batch.relative_azimuth[:, 0] == 0)


def test_relative_azimuth_wraps():
    azimuth, support = torch.tensor([350.0, 10.0, 180.0, 0.0]), torch.tensor([10.0, 350.0, 0.0, 0.0])
    assert relative_azimuth(azimuth, support).tolist() == [-20.0, 20.0, -180.0, 0.0]


def test_the_first_objects_alone():
    bank = make_bank(3, 6)
    assert bank.first(2).names == bank.names[:2]
    assert torch.equal(bank.first(2).rgba, bank.rgba[:2])


def test_compositing_over_white():
    rgba = torch.tensor([[0.2, 0.4, 0.6, 0.0], [0.2, 0.4, 0.6, 1.0], [0.2, 0.4, 0.6, 0.5]])
    expected = torch.tensor([[1.0, 1.0, 1.0], [0.2, 0.4, 0.6], [0.6, 0.7, 0.8]])
    torch.testing.assert_close(composite(rgba), expected)


def example_batch(objects: int = 4) -> ViewBatch:
    return take(make_bank(3), sample_batch(make_bank(3), objects, 3, seeded(1)))


def test_mirroring_flips_images_and_turns_the_other_way():
    batch = example_batch()
    flipped = mirror(batch, seeded(), probability=1.0)
    assert torch.equal(flipped.rgba, batch.rgba.flip(3))
    assert torch.equal(flipped.azimuth, -batch.azimuth)
    assert torch.equal(flipped.elevation, batch.elevation)
    torch.testing.assert_close(
        torch.remainder(flipped.relative_azimuth + batch.relative_azimuth, 360), torch.zeros(4, 4)
    )


def test_mirroring_is_per_object():
    batch = example_batch(64)
    flipped = (mirror(batch, seeded()).azimuth != batch.azimuth)[:, 1:].float()
    assert 0.2 < flipped.mean() < 0.8


def test_augmentation_keeps_silhouettes_and_range():
    batch = example_batch()
    changed = augment(batch, seeded(), AugmentConfig(mirror=0.0, recolour=1.0))
    assert torch.equal(changed.rgba[..., 3], batch.rgba[..., 3])
    assert changed.rgba.min() >= 0 and changed.rgba.max() <= 1
    assert not torch.allclose(changed.rgba, batch.rgba, atol=0.02)


def test_no_recolouring_leaves_the_views():
    batch = example_batch()
    assert torch.equal(augment(batch, seeded(), AugmentConfig(mirror=0.0, recolour=0.0)).rgba, batch.rgba)


def test_one_colour_becomes_one_colour_in_every_view():
    batch = example_batch()
    plain = batch.rgba.clone()
    plain[..., :3] = torch.tensor([0.7, 0.3, 0.2])
    changed = augment(ViewBatch(plain, batch.azimuth, batch.elevation, batch.distance), seeded(3)).rgba[..., :3]
    spread = changed.flatten(1, 3).std(dim=1)
    assert spread.max() < 1e-5


def test_hue_rotation_by_120_degrees_permutes_channels_and_keeps_grey():
    rotation = hue_rotation(torch.tensor([120.0]))[0]
    torch.testing.assert_close(rotation @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(rotation @ torch.full((3,), 0.4), torch.full((3,), 0.4))
    red = hue_rotation(torch.tensor([60.0]))[0] @ torch.tensor([0.6, 0.3, 0.3])
    assert colorsys.rgb_to_hsv(*red.tolist())[0] == pytest.approx(1 / 6, abs=0.02)


def test_parts_follow_colour_across_shading():
    rgba = torch.ones(1, 2, 8, 8, 4)
    rgba[..., :4, :, :3] = torch.tensor([0.8, 0.1, 0.1])
    rgba[..., 4:, :, :3] = torch.tensor([0.1, 0.1, 0.8])
    rgba[:, 1, ..., :3] *= 0.75  # the other view is in the shade
    weights = part_weights(rgba, seeded(1), 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 8, 8))
    lit, shaded = weights[0, 0].argmax(-1), weights[0, 1].argmax(-1)
    assert torch.equal(lit, shaded)
