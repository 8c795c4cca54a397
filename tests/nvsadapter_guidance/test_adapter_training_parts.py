"""Pieces of adapter training: stream, draws, loss, average, warm-up, data sets, sampled pictures."""

import json
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from released_sampler import sigmas_from_alphas, x0_loss
from tiny_nvs import tiny_nvs_model
from tiny_training import tiny_run
from torch import nn
from torch.utils.data import default_collate

from nvsadapter_guidance.cameras import PINHOLE, RELEASED, look_at, relative_to_support
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.schedule import NoiseSchedule
from nvsadapter_guidance.training.adapter import objective
from nvsadapter_guidance.training.adapter.config import DataOptions, OptimOptions
from nvsadapter_guidance.training.adapter.data import ViewRequest, make_splits
from nvsadapter_guidance.training.adapter.ema import MovingAverage
from nvsadapter_guidance.training.adapter.indexed_shards import index_shard
from nvsadapter_guidance.training.adapter.module import warmup_factor
from nvsadapter_guidance.training.adapter.network import build_model
from nvsadapter_guidance.training.adapter.objective import batch_loss, draw, sample_seed, to_convention
from nvsadapter_guidance.training.adapter.previews import sample_views, view_sheet
from nvsadapter_guidance.training.adapter.samples import NumberedViews, StreamSampler
from nvsadapter_guidance.training.adapter.synthetic import SyntheticViews
from nvsadapter_guidance.training.zero123 import camera_matrix, encode_views

LATENT = (4, 8, 8)


def synthetic_batch(count: int = 3, num_query: int = 2, control: bool = False) -> dict[str, torch.Tensor]:
    views = NumberedViews(SyntheticViews(8, num_query, 32, control=control), 0)
    return default_collate([views[(i, i)] for i in range(count)])


def numbers(sampler: StreamSampler, steps: int) -> list[list[int]]:
    return [[number for _, number in batch] for batch in islice(sampler, steps)]


def test_every_object_comes_once_per_shuffling_and_orders_differ() -> None:
    batches = list(islice(StreamSampler(6, 4, 0, 1, seed=0), 6))
    stream = [item for batch in batches for item in batch]
    assert [number for _, number in stream] == list(range(24))
    shufflings = [[index for index, _ in stream[start : start + 6]] for start in range(0, 24, 6)]
    assert all(sorted(order) == list(range(6)) for order in shufflings)
    assert len({tuple(order) for order in shufflings}) > 1


def test_devices_share_the_batch_that_one_device_would_have() -> None:
    alone = list(islice(StreamSampler(7, 4, 0, 1, seed=3), 5))
    parts = [list(islice(StreamSampler(7, 2, rank, 2, seed=3), 5)) for rank in range(2)]
    assert alone == [first + second for first, second in zip(*parts)]


def test_a_stream_goes_on_anywhere() -> None:
    whole = list(islice(StreamSampler(7, 3, 0, 1, seed=1), 8))
    assert list(islice(StreamSampler(7, 3, 0, 1, seed=1, start=15), 3)) == whole[5:]
    assert list(islice(StreamSampler(7, 3, 0, 1, seed=2), 8)) != whole


def test_seeds_of_neighbours_are_unlike() -> None:
    seeds = [sample_seed(seed, number) for seed in range(4) for number in range(1000)]
    assert len(set(seeds)) == 4000 and all(0 <= seed < 2**63 for seed in seeds)
    # Half of the bits flip from one number to the next.
    flips = [bin(a ^ b).count("1") for a, b in zip(seeds[:999], seeds[1:1000])]
    assert 30 < sum(flips) / len(flips) < 33


def test_draws_depend_on_a_sample_alone() -> None:
    together = draw(5, [10, 11, 12], 2, LATENT, 1000, dropout=0.0)
    alone = draw(5, [11], 2, LATENT, 1000, dropout=0.0)
    for name in ("timesteps", "noise", "posterior", "support"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    assert together.noise.shape == (3, 2, *LATENT) and together.posterior.shape == (3, 3, *LATENT)
    assert not torch.equal(draw(6, [11], 2, LATENT, 1000, 0.0).noise, alone.noise)


def test_draws_have_the_right_distributions() -> None:
    draws = draw(0, range(4000), 1, (1, 1, 1), 1000, dropout=0.1)
    assert draws.timesteps.min() >= 0 and draws.timesteps.max() <= 999
    assert abs(float(draws.timesteps.float().mean()) - 499.5) < 20
    assert abs(float(draws.noise.std()) - 1.0) < 0.05 and abs(float(draws.noise.mean())) < 0.06
    assert abs(float(draws.ucg_mask.float().mean()) - 0.1) < 0.02


def test_never_are_all_samples_of_a_batch_unconditional() -> None:
    masks = [draw(0, [2 * i, 2 * i + 1], 1, (1, 1, 1), 10, dropout=0.9).ucg_mask for i in range(200)]
    assert not any(bool(mask.all()) for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) > 150
    assert not bool(draw(0, [7], 1, (1, 1, 1), 10, dropout=0.9).ucg_mask)


def test_the_loss_is_the_released_weighted_error_of_clean_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_nvs_model(adapter={**tiny_nvs_model().config.adapter, "camera_convention": "released"})
    model.schedule = NoiseSchedule(kind="scaled_linear", shift=1.0, prediction_type="epsilon")
    batch, draws = synthetic_batch(), draw(0, [0, 1, 2], 2, LATENT, 1000, 0.0)
    seen = {}
    forward = model.network.forward

    def recorded(latents: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        seen["noisy"], seen["prediction"] = latents, forward(latents, *arguments, **options)
        return seen["prediction"]

    monkeypatch.setattr(model.network, "forward", recorded)
    loss = batch_loss(model, batch, draws)
    alphas = model.schedule.alphas_cumprod[draws.timesteps]
    sigma = sigmas_from_alphas(alphas)
    images = torch.cat((batch["support"][:, None], batch["queries"]), dim=1)
    clean = objective.encode_views(model, images, draws.posterior)[:, 1:]
    # Variance-exploding view: x = x0 + sigma e, and the estimate of x0 is x - sigma e_pred.
    estimate = seen["noisy"] / alphas.sqrt().view(-1, 1, 1, 1, 1) - sigma.view(-1, 1, 1, 1, 1) * seen["prediction"]
    assert torch.allclose(loss, x0_loss(estimate, clean, sigma), rtol=1e-3)


def test_latents_are_samples_of_the_posterior_times_the_scale() -> None:
    model, batch = tiny_nvs_model(), synthetic_batch()
    images = batch["queries"]
    noise = torch.randn(*images.shape[:2], *LATENT, generator=torch.Generator().manual_seed(0))
    latents = objective.encode_views(model, images, noise, chunk=4)
    posterior = model.vae.encode(images.flatten(0, 1)).latent_dist
    expected = (posterior.mean + posterior.std * noise.flatten(0, 1)) * model.vae.config.scaling_factor
    assert torch.allclose(latents.flatten(0, 1), expected, atol=1e-5)


def test_unconditional_samples_do_not_depend_on_the_support_view() -> None:
    model, batch = tiny_nvs_model(unconditional_support="noise"), synthetic_batch()
    mask = torch.tensor([True, False, False])
    draws = replace(draw(0, [0, 1, 2], 2, LATENT, 1000, 0.0), ucg_mask=mask)
    before = batch_loss(model, batch, draws)
    after = batch_loss(model, {**batch, "support": -batch["support"]}, draws)
    assert torch.allclose(before[:1], after[:1], atol=1e-6) and not torch.allclose(before[1:], after[1:], atol=1e-4)


def test_the_same_pose_in_any_form_gives_the_same_rays() -> None:
    angles = torch.tensor([0.0, 70.0, 200.0]), torch.tensor([0.0, 20.0, 40.0]), torch.tensor([1.5, 1.7, 2.0])
    absolute = look_at(*angles, RELEASED)
    for poses in (absolute, relative_to_support(absolute)):
        found = relative_to_support(to_convention(poses, PINHOLE))
        assert torch.allclose(found, relative_to_support(look_at(*angles, PINHOLE)), atol=1e-5)
        assert torch.equal(to_convention(poses, RELEASED), poses)


def test_wrong_sizes_and_missing_control_images_are_named() -> None:
    model, draws = tiny_nvs_model(), draw(0, [0, 1, 2], 2, LATENT, 1000, 0.0)
    batch = synthetic_batch()
    small = {**batch, "support": batch["support"][..., :16, :16], "queries": batch["queries"][..., :16, :16]}
    with pytest.raises(InputError, match="model is for 32x32"):
        batch_loss(model, small, draws)
    model.network.controlnet = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(InputError, match="has no control images"):
        batch_loss(model, batch, draws)


def test_the_average_follows_the_released_rule() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage({"w": weight}, decay=0.9995)
    expected = 0.0
    for n, value in enumerate((1.0, 2.0, -1.0), start=1):
        weight.data.fill_(value)
        average.update()
        decay = min(0.9995, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert float(average.tensors["w"]) == pytest.approx(expected)
    average.updates = 10**6
    assert average.share_kept() == 0.9995
    with average.in_place():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == -1.0


def test_an_average_of_other_weights_is_refused() -> None:
    average = MovingAverage({"w": nn.Parameter(torch.zeros(2))}, 0.9)
    with pytest.raises(InputError, match="'w'"):
        average.load_state_dict({"updates": 1, "tensors": {"w": torch.zeros(3)}})


def test_the_rate_grows_linearly_and_stays() -> None:
    optim = OptimOptions()
    assert warmup_factor(0, optim) == pytest.approx(1e-6)
    assert warmup_factor(5000, optim) == pytest.approx(0.5, abs=1e-5)
    assert warmup_factor(10_000, optim) == warmup_factor(200_000, optim) == 1.0
    assert warmup_factor(0, replace(optim, warmup_steps=0)) == 1.0


def test_a_model_learns_in_its_adapter_alone_or_in_its_unet_too(tmp_path: Path) -> None:
    model = build_model(tiny_run(tmp_path).model, 0)
    assert not any(p.requires_grad for p in (*model.network.unet.parameters(), *model.vae.parameters()))
    assert not model.text_context.requires_grad and not any(p.requires_grad for p in model.image_encoder.parameters())
    whole = build_model(tiny_run(tmp_path, "model.full_finetune=true").model, 0)
    learning = {name for name, p in whole.network.unet.named_parameters() if p.requires_grad}
    still = {name for name, _ in whole.network.unet.named_parameters()} - learning
    # One text token: its attention's queries and keys get no gradient.
    assert still and all(".attn2.to_q." in name or ".attn2.to_k." in name for name in still)


def test_every_trained_parameter_gets_a_gradient(tmp_path: Path) -> None:
    for mode in ("learnable_emb", "all_to_all", "all_to_all_attention", "null"):
        for extra in ("model.full_finetune=true", "model.gradient_checkpointing=true"):
            run = tiny_run(tmp_path, f"model.adapter.query_composer_mode={mode}", extra)
            model = build_model(run.model, 0)
            batch_loss(model, synthetic_batch(), draw(0, [0, 1, 2], 2, LATENT, 1000, 0.0)).mean().backward()
            without = [n for n, p in model.network.named_parameters() if p.requires_grad and p.grad is None]
            assert without == [], (mode, extra)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for flag in ("false", "true"):
        model = build_model(tiny_run(tmp_path, f"model.gradient_checkpointing={flag}").model, 0)
        batch_loss(model, synthetic_batch(), draw(0, [0, 1, 2], 2, LATENT, 1000, 0.1)).mean().backward()
        gradients.append([p.grad for p in model.network.adapter.trainable_parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


def test_a_fresh_adapter_on_a_stored_model_keeps_its_other_weights(tmp_path: Path) -> None:
    stored = tiny_nvs_model()
    stored.save(tmp_path / "stored")
    run = tiny_run(tmp_path, f"model.base={tmp_path / 'stored'}", "model.random_weights=false")
    model, loaded = build_model(run.model, 3), NVSModel.load(tmp_path / "stored")
    ours, theirs = model.state_dict(), loaded.state_dict()
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert {name for name in ours if not name.startswith("network.adapter.")} <= same
    assert any(name.startswith("network.adapter.") for name in set(ours) - same)


def test_sampled_pictures_come_from_the_support_view(tmp_path: Path) -> None:
    model, batch = tiny_nvs_model(), synthetic_batch()
    views = [sample_views(model, batch, 3, 2.0, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert views[0].shape == batch["queries"].shape and torch.equal(*views)
    blind = sample_views(
        model, {**batch, "queries": torch.zeros_like(batch["queries"])}, 3, 2.0, torch.Generator().manual_seed(0)
    )
    assert torch.equal(blind, views[0])
    sheet = view_sheet(batch, views[0])
    assert sheet.shape == (3 * 2 * 32, 3 * 32, 3) and sheet.dtype == np.uint8
    assert np.array_equal(
        sheet[:32, 32:64], (((batch["queries"][0, 0] + 1) / 2).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    )


def test_balls_face_different_ways() -> None:
    batch = synthetic_batch()
    assert batch["support"].shape == (3, 3, 32, 32) and batch["c2w"].shape == (3, 3, 4, 4)
    assert batch["support"].min() >= -1 and batch["support"].max() == 1.0
    assert torch.allclose(batch["c2w"][:, 0], torch.eye(4), atol=1e-5)
    assert not torch.equal(batch["queries"][0, 0], batch["queries"][0, 1])


def test_views_of_a_numbered_sample_are_the_same_every_time() -> None:
    views = NumberedViews(SyntheticViews(4, 1, 16), 0)
    state = torch.get_rng_state()
    first, again, other = views[(2, 9)], views[(2, 9)], views[(2, 10)]
    assert torch.equal(first["queries"], again["queries"]) and not torch.equal(first["c2w"], other["c2w"])
    assert torch.equal(torch.get_rng_state(), state)


def write_renderings(root: Path, objects: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(objects):
        folder = root / f"object{index}"
        folder.mkdir(parents=True)
        rgba = generator.integers(0, 256, (12, 16, 16, 4), dtype=np.uint8)
        cameras = np.stack([camera_matrix(30.0 * view, 5.0 * view, 1.5) for view in range(12)])
        for name, content in encode_views(rgba, cameras).items():
            (folder / name).write_bytes(content)


def write_shard(path: Path, root: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            for view in range(12):
                for kind in ("png", "npy"):
                    tar.add(root / name / f"{view:03d}.{kind}", f"{name}.{kind}_{view:03d}")


def request(kind: str, root: Path | None, control: bool = False) -> ViewRequest:
    return ViewRequest(DataOptions(kind=kind, root=None if root is None else str(root)), 3, 16, control, seed=4)


def test_folders_and_shards_give_the_same_samples(tmp_path: Path) -> None:
    write_renderings(tmp_path / "folder", 4)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "r_train_000000.tar", tmp_path / "folder", ["object0", "object1"])
    write_shard(shards / "r_train_000001.tar", tmp_path / "folder", ["object2"])
    write_shard(shards / "r_valid_000000.tar", tmp_path / "folder", ["object3"])
    from_folder, from_shards = (
        make_splits(request(kind, tmp_path / place)) for kind, place in (("folder", "folder"), ("shards", "shards"))
    )
    assert [len(part) for part in from_folder] == [len(part) for part in from_shards] == [3, 1]
    for index, number in ((0, 0), (2, 5), (1, 7)):
        a, b = (NumberedViews(parts[0], 0)[(index, number)] for parts in (from_folder, from_shards))
        assert a["key"] == b["key"] == f"object{index}"
        assert all(torch.equal(a[name], b[name]) for name in ("support", "queries", "c2w"))
    # Other views in another epoch.
    first, later = (NumberedViews(from_shards[0], 0)[(0, number)] for number in (0, 3))
    assert not torch.equal(first["c2w"], later["c2w"])
    assert first["queries"].shape == (3, 3, 16, 16) and first["c2w"].dtype == torch.float32


def test_an_index_is_kept_and_made_anew_for_a_changed_shard(tmp_path: Path) -> None:
    write_renderings(tmp_path / "folder", 2)
    shard = tmp_path / "train_0.tar"
    write_shard(shard, tmp_path / "folder", ["object0"])
    assert [name for name, _, _ in index_shard(shard)] == ["object0"]
    cache = tmp_path / "train_0.tar.index.json"
    known = json.loads(cache.read_text())
    known["objects"][0][0] = "renamed"
    cache.write_text(json.dumps(known))
    assert [name for name, _, _ in index_shard(shard)] == ["renamed"]
    write_shard(shard, tmp_path / "folder", ["object0", "object1"])
    assert [name for name, _, _ in index_shard(shard)] == ["object0", "object1"]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(InputError, match="no whole tar"):
        index_shard(shard)


def test_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_renderings(tmp_path / "one", 1)
    cases = (
        (request("films", tmp_path), "use one of folder, shards, synthetic"),
        (request("folder", None), "data.root: missing"),
        (request("folder", tmp_path / "nowhere"), "no folder at"),
        (request("folder", tmp_path / "empty"), "000.png"),
        (request("folder", tmp_path / "one"), "holds one object"),
        (request("shards", tmp_path / "empty"), r"holds no \*train\*\.tar"),
        (request("folder", tmp_path / "one", control=True), "no control images"),
    )
    for asked, message in cases:
        with pytest.raises(InputError, match=message):
            make_splits(asked)
