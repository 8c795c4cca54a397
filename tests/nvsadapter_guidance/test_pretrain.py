"""Training the small model: batches, optimisers, resuming, and a loss that falls."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.training import pretrain
from nvsadapter_guidance.training.autoencoder import (
    AutoencoderTraining,
    random_crops,
    reconstruction_loss,
    train_autoencoder,
)
from nvsadapter_guidance.training.colour_start import carry_colours
from nvsadapter_guidance.training.muon import Muon, muon_update, orthogonalise, orthogonalise_all, split_parameters
from nvsadapter_guidance.training.pretrain import (
    FIRST_AND_LAST,
    Pretrainer,
    Pretraining,
    encode_banks,
    settle_gradients,
)
from nvsadapter_guidance.training.validate import silhouette, validate_views
from nvsadapter_guidance.training.views import ViewBank

CONFIG = Pretraining(batch_size=8, copies=2, compile=False, warmup_steps=5, lr=3e-3, adam_lr=3e-3)


def coloured_discs(objects: int = 3) -> ViewBank:
    """Views of balls with a bright half: sixteen cameras as in validation, 32 pixels."""
    azimuth = torch.arange(8).repeat(2) * 45.0
    elevation = torch.tensor([0.0, 30.0]).repeat_interleave(8)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    disc = (x**2 + y**2 < 0.4).float()
    rgba = torch.zeros(objects, 16, 32, 32, 4)
    for index in range(objects):
        shade = 0.2 + 0.3 * (x[None] > torch.sin(torch.deg2rad(azimuth))[:, None, None]).float()
        rgba[index, ..., index % 3] = shade
        rgba[index, ..., 3] = disc
    shape = (objects, 16)
    names = tuple(f"disc{i}" for i in range(objects))
    return ViewBank((rgba * 255).byte(), azimuth.expand(shape), elevation.expand(shape), torch.full(shape, 1.5), names)


def trainer(seed: int = 0) -> Pretrainer:
    model = tiny_nvs_model(adapter=tiny_nvs_model().config.adapter | {"num_query": 4})
    config = replace(CONFIG, seed=seed)
    return Pretrainer(model, encode_banks(model, [coloured_discs()], config), config)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    assert orthogonalise(torch.zeros(1, 4, 4)).abs().max() == 0


def test_padding_into_batches_changes_no_result() -> None:
    generator = torch.Generator().manual_seed(1)
    updates = [torch.randn(shape, generator=generator) for shape in ((8, 20), (20, 8), (10, 3, 3, 3), (70, 90))]
    for update, found in zip(updates, orthogonalise_all(updates), strict=True):
        matrix = update.flatten(1)
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        alone = orthogonalise(wide[None])[0]
        expected = (alone if wide is matrix else alone.mT).reshape(update.shape)
        assert torch.allclose(found, expected, atol=1e-5)


def test_muon_steps_have_the_size_of_adam_steps() -> None:
    weight = torch.zeros(16, 16, requires_grad=True)
    optimiser = Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.3)


@pytest.mark.gpu
def test_a_captured_update_is_the_update() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((16, 48), (48, 16), (10, 3, 3, 3))
    first = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    first[2] = first[2].to(memory_format=torch.channels_last)
    plain, momenta = [t.clone() for t in first], [torch.zeros_like(t) for t in first]
    weights = [t.clone().requires_grad_() for t in first]
    optimiser = Muon(weights, weight_decay=0.1)
    for lr in (0.1, 0.03, 0.01):
        gradients = [torch.randn(t.shape, generator=generator, device="cuda") for t in first]
        muon_update(plain, momenta, gradients, torch.tensor(lr, device="cuda"), 0.95, 0.1)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
    for weight, expected in zip(weights, plain, strict=True):
        assert torch.allclose(weight, expected, atol=1e-5)


def test_parameters_are_divided_without_loss() -> None:
    model = tiny_nvs_model().requires_grad_(True)
    hidden, rest = split_parameters(model, FIRST_AND_LAST)
    assert len(hidden) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim >= 2 for p in hidden)
    assert any(p is model.text_context for p in rest) and any(p is model.network.unet.conv_out.weight for p in rest)


def test_reconstruction_loss_is_zero_only_for_equal_images() -> None:
    image = torch.rand(2, 3, 8, 8)
    assert reconstruction_loss(image, image, 0.5) == 0
    # A constant offset has no gradient error: 0.1 of absolute error alone.
    assert reconstruction_loss(image + 0.1, image, 0.5) == pytest.approx(0.1, rel=1e-4)
    # A shift of all channels alike is no colour; of one channel by 0.3 it is 0.2 there and 0.1 in the others.
    assert reconstruction_loss(image + 0.1, image, 0.0, chroma_weight=5.0) == pytest.approx(0.1, rel=1e-4)
    redder = image + torch.tensor([0.3, 0.0, 0.0]).view(1, 3, 1, 1)
    expected = 0.1 + 5.0 * (0.2 + 0.1 + 0.1) / 3
    assert reconstruction_loss(redder, image, 0.0, chroma_weight=5.0) == pytest.approx(expected, rel=1e-4)


def test_the_autoencoder_learns_and_sets_the_scale_of_its_latents() -> None:
    model = tiny_nvs_model().requires_grad_(True)
    scores = train_autoencoder(model.vae, [coloured_discs()], AutoencoderTraining(seconds=0.5, batch_size=4))
    assert scores["steps"] >= 1 and model.vae.config.scaling_factor == scores["scaling_factor"] > 0


def test_an_autoencoder_that_carries_colours_shows_them_untrained() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        norm_num_groups=1,
        mid_block_add_attention=False,
    )
    halves = torch.full((2, 3, 32, 32), -0.5)
    halves[0, 0] = halves[1, 2] = 0.5
    carry_colours(vae)
    with torch.no_grad():
        colours = vae.decode(vae.encode(halves).latent_dist.mean).sample[..., 8:-8, 8:-8].mean(dim=(2, 3))
    # The red image comes out red and the blue one blue, whatever the scale.
    assert colours[0].argmax() == 0 and colours[1].argmax() == 2
    assert colours[0, 0] - colours[0, 1] > 0.3 and colours[1, 2] - colours[1, 1] > 0.3


def test_crops_lie_around_the_object_and_keep_its_colours() -> None:
    crops = random_crops(coloured_discs(), 16, 12, torch.Generator().manual_seed(0))
    assert crops.shape == (16, 3, 12, 12)
    # The object covers a third of a view; crops around its points show more of it, and none shows white alone.
    assert ((1 - crops).amax(dim=1) > 0.1).float().mean() > 0.5
    assert ((1 - crops).amax(dim=1) > 0.1).flatten(1).any(dim=1).all()


def test_batches_hold_the_support_first_and_mirror_azimuths() -> None:
    run = trainer()
    batch = run.draw()
    assert batch["latents"].shape == (8, 5, 4, 8, 8) and batch["image"].shape == (8, 3, 32, 32)
    signs = run.data[0].azimuth / coloured_discs().azimuth.clamp_min(1.0)[None]
    assert set(signs[..., 1:8].sign().unique().tolist()) == {-1.0, 1.0}


def test_banks_of_different_numbers_of_views_are_drawn_by_their_objects() -> None:
    model = tiny_nvs_model(adapter=tiny_nvs_model().config.adapter | {"num_query": 4})
    many, few = coloured_discs(6), coloured_discs(2)
    few = replace(few, rgba=few.rgba[:, :8], distance=few.distance[:, :8] + 1)
    few = replace(few, azimuth=few.azimuth[:, :8], elevation=few.elevation[:, :8])
    pooled, procedural = encode_banks(model, [many, few, coloured_discs(1)], CONFIG, pooled=2)
    batch = pooled.draw(8, 4, torch.Generator().manual_seed(0))
    assert batch["latents"].shape == (8, 5, 4, 8, 8) and batch["image"].shape == (8, 3, 32, 32)
    assert [int(d > 2) for d in batch["distance"][:, 0]] == [0] * 6 + [1] * 2
    assert [bank.latents.shape[:3] for bank in pooled.banks] == [(2, 6, 16), (2, 2, 8)]
    assert procedural.latents.shape[:3] == (1, 1, 16)
    run = Pretrainer(model, [pooled, procedural], replace(CONFIG, procedural_share=0.25))
    assert run.draw()["latents"].shape == (8, 5, 4, 8, 8)


def test_the_loss_falls_and_inert_parameters_stay() -> None:
    run = trainer()
    inert = [p.clone() for p in run.model.parameters() if not p.requires_grad]
    losses = [float(run.train_step()) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(torch.equal(a, b) for a, b in zip(inert, (p for p in run.model.parameters() if not p.requires_grad)))


def test_a_run_resumes_from_its_state() -> None:
    run = trainer()
    for _ in range(3):
        run.train_step()
    other = trainer()
    other.model.load_state_dict(run.model.state_dict())
    other.load(copy.deepcopy(run.state()))
    other.generator.set_state(run.generator.get_state())
    assert other.step == 3
    assert float(run.train_step()) == float(other.train_step())
    assert all(torch.equal(a, b) for a, b in zip(run.ema, other.ema, strict=True))


def test_steps_without_finite_gradients_change_nothing_and_end_the_run_in_the_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer()
    run.train_step()
    before = [p.clone() for p in (*run.trained, *run.ema)]
    monkeypatch.setattr(pretrain, "settle_gradients", lambda parameters: False)
    monkeypatch.setattr(pretrain, "MOST_DROPPED_IN_A_ROW", 3)
    for _ in range(2):
        run.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, (*run.trained, *run.ema), strict=True))
    assert run.dropped == 2
    with pytest.raises(RuntimeError, match="3 times in a row"):
        run.train_step()


def test_one_bad_gradient_is_found_among_many() -> None:
    weights = [torch.ones(2, 2, requires_grad=True), torch.ones(3, requires_grad=True)]
    weights[0].grad, weights[1].grad = torch.full((2, 2), 2.0), torch.tensor([1.0, 2.0, 3.0])
    assert settle_gradients(weights)
    weights[1].grad[1] = float("inf")
    assert not settle_gradients(weights)


def test_swapping_the_average_twice_changes_nothing() -> None:
    run = trainer()
    run.train_step()
    before = [p.clone() for p in run.trained]
    run.swap_average()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.trained, strict=True))
    run.swap_average()
    assert all(torch.equal(a, b) for a, b in zip(before, run.trained, strict=True))


def test_validation_scores_a_bank() -> None:
    scores, pictures = validate_views(tiny_nvs_model(), coloured_discs(), steps=1)
    assert pictures.shape == (3, 16, 3, 32, 32)
    assert 0 <= scores.mask_iou <= 1 and scores.copy_psnr > 5


def test_silhouettes_are_what_is_not_white() -> None:
    image = torch.ones(1, 3, 4, 4)
    image[0, 1, 2, 3] = 0.5
    assert silhouette(image).nonzero().tolist() == [[0, 2, 3]]
