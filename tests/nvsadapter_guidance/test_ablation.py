"""The ablation: every variant is trained and scored alike, and one command writes the table."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from test_pretrain import coloured_discs
from tiny_nvs import tiny_nvs_model
from torch import Tensor

from nvsadapter_guidance.cameras import RELEASED, look_at, relative_to_support
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training import ablation
from nvsadapter_guidance.training.ablation import (
    VARIANTS,
    Budget,
    VariantTraining,
    score_variant,
    view_groups,
)
from nvsadapter_guidance.training.adapter.config import ModelOptions
from nvsadapter_guidance.training.adapter.network import build_model, trainable
from nvsadapter_guidance.training.mesh_dataset import pack, tile
from nvsadapter_guidance.training.pretrain import LatentBank
from nvsadapter_guidance.training.views import composite

BUDGET = Budget(steps=30, batch_size=8, lr=1e-2, copies=1, sampling_steps=2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with the tiny model's weights."""
    tiny_nvs_model().save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation_script", repository / "scripts" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablation_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """Three objects of sixteen views, as scripts/render_training_views.py packs them."""
    bank, staging = coloured_discs(), tmp_path / "staging"
    staging.mkdir()
    for index, name in enumerate(bank.names):
        picture = io.BytesIO()
        Image.fromarray(tile(bank.rgba[index].numpy())).save(picture, "webp", lossless=True)
        (staging / f"{name}.webp").write_bytes(picture.getvalue())
        angles = {"azimuth": bank.azimuth[index].tolist(), "elevation": bank.elevation[index].tolist()}
        (staging / f"{name}.json").write_text(json.dumps({**angles, "distance": 1.5, "fovy": 49.1, "size": 32}))
    pack(staging, list(bank.names), tmp_path / "views.tar")
    return tmp_path / "views.tar"


def variant(base: Path, **options: Any) -> NVSModel:
    return build_model(ModelOptions(base=str(base), **options), 0)


def latents(model: NVSModel) -> LatentBank:
    return LatentBank(model, coloured_discs(), 1, torch.Generator().manual_seed(0))


def test_groups_cover_all_targets_and_are_spread_over_them() -> None:
    assert view_groups(torch.arange(14), 4).tolist() == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 0], [3, 7, 11, 1]]
    assert view_groups(torch.tensor([5, 7]), 1).tolist() == [[5], [7]]


def test_the_rate_rises_stays_and_falls_to_nothing(base: Path) -> None:
    model = variant(base)
    training = VariantTraining(model, latents(model), Budget(steps=10, warmup=0.2, decay=0.5), 0)
    rates = [training.rate(step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_training_lowers_the_validation_loss_and_leaves_the_rest_alone(base: Path) -> None:
    model = variant(base)
    bank, before = coloured_discs(), {name: value.clone() for name, value in model.state_dict().items()}
    fresh = score_variant(model, bank, BUDGET)
    VariantTraining(model, latents(model), BUDGET, 0).run()
    trained = score_variant(model, bank, BUDGET)
    assert trained["loss"] < 0.98 * fresh["loss"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"network.{name}" for name in trainable(model)}


def test_the_base_learns_at_a_tenth_of_the_rate(base: Path) -> None:
    model = variant(base, full_finetune=True)
    training = VariantTraining(model, latents(model), BUDGET, 0)
    slow = {id(p) for name, p in trainable(model).items() if not name.startswith("adapter.")}
    groups = [group for optimiser in training.optimisers for group in optimiser.param_groups]
    rates = {(id(p) in slow, group["lr"]) for group in groups for p in group["params"]}
    assert rates == {(False, 1e-2), (False, 5e-3), (True, 1e-3), (True, 5e-4)}


def test_all_variants_are_set_the_same_task(base: Path) -> None:
    """A fresh adapter leaves the base's answer as it is, however many query views it takes at once."""
    losses = []
    for queries in (1, 4, 6):
        model = variant(base, adapter={"num_query": queries, "zero_init": True, "query_composer_mode": None})
        losses.append(score_variant(model, coloured_discs(), BUDGET)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_each_target_is_sampled_from_its_own_camera(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sampler that looks up the true view of every pose, all scores are perfect."""
    bank = coloured_discs()
    truth = composite(bank.rgba.float() / 255.0).movedim(-1, 2) * 2.0 - 1.0
    poses = relative_to_support(look_at(bank.azimuth[0], bank.elevation[0], bank.distance[0], RELEASED))

    def look_up(model: NVSModel, batch: dict[str, Tensor], *_: Any) -> Tensor:
        objects = [int((truth[:, 0] - image).abs().flatten(1).sum(1).argmin()) for image in batch["support"]]
        wanted = batch["c2w"][:, 1:]
        places = (wanted[:, :, None] - poses).abs().sum(dim=(-1, -2)).argmin(dim=-1)
        return torch.stack([truth[index, place] for index, place in zip(objects, places, strict=True)])

    monkeypatch.setattr(ablation, "sample_views", look_up)
    for queries in (1, 4, 6):
        found = score_variant(variant(base, adapter={"num_query": queries}), bank, BUDGET)
        assert found["psnr"] == pytest.approx(100.0) and found["ssim"] == pytest.approx(1.0, abs=1e-5)
        assert found["mask_iou"] == 1.0


def test_variants_are_shipped_configurations(script: ModuleType) -> None:
    """Those of the paper's tables; what differs is what the names say."""
    options = {name: script.model_options(variant, "mini") for name, variant in VARIANTS.items()}
    assert [options[f"query_{n}"].adapter["num_query"] for n in (1, 2, 6)] == [1, 2, 6]
    assert options["base"].adapter["num_query"] == 4 and options["base"] == options["base_other_seed"]
    assert options["no_global_semantic"].adapter["image_attn_mode"] is None
    assert {options[name].adapter["ray_embedding"] for name in ("rays_origin_direction", "extrinsic")} == {
        "rayo_rayd",
        "extrinsic",
    }
    assert options["full_finetune"].full_finetune and not options["base"].full_finetune
    different = [json.dumps(vars(value), sort_keys=True) for value in options.values()]
    assert len(set(different)) == len(VARIANTS) - 1


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, words)])
    return int(script.main())


def test_one_command_writes_the_table_and_goes_on(
    script: ModuleType, base: Path, views: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    places = ("-o", tmp_path / "rows", "--results", tmp_path / "table", "--device", "cpu")
    words = ("--views", views, views, "--validation", views, "--base", base, "--steps", 2, "--batch", 2, *places)
    words += ("--sampling-steps", 1, "--objects", 2)
    assert call(script, monkeypatch, *words, "--variants", "base", "query_2") == 0
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"base.json", "query_2.json"}
    # What is there is not trained again.
    trained = []
    original = script.VariantTraining
    monkeypatch.setattr(script, "VariantTraining", lambda m, *rest: trained.append(m.num_query) or original(m, *rest))
    assert call(script, monkeypatch, *words, "--variants", "base", "query_1", "query_2") == 0
    assert trained == [1]
    table = json.loads((tmp_path / "table" / "ablation.json").read_text())
    assert list(table["variants"]) == ["base", "query_1", "query_2"]
    assert {"psnr", "ssim", "mask_iou", "loss", "parameters"} <= set(table["variants"]["base"])
    assert table["settings"]["validation_objects"] == 2 and table["baselines"]["copy-reference"]["psnr"] > 0
    page = (tmp_path / "table" / "ablation.md").read_text().splitlines()
    assert len([line for line in page if line.startswith("|")]) == 2 + 1 + 3
    capsys.readouterr()
    for more, message in (
        (("--steps", "3"), "base.json: was made with another steps; choose another --output"),
        (("--variants", "query_7"), "--variants: 'query_7' is unknown; use some of base"),
        (("--views", "none.tar"), "--views: no file none.tar"),
        (("--base", tmp_path), "--base: no file"),
        (("--batch", "0"), "--batch is 0; it must be greater than 0"),
    ):
        assert call(script, monkeypatch, *words, *more) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
