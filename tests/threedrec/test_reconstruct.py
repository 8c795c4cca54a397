"""A whole reconstruction, tiny, from image to mesh."""

import json
from pathlib import Path

import pytest
import torch
import trimesh
from tiny_run import Reconstruction, tiny_config, write_inputs

from threedrec.loop import DivergenceError

STAGES = ["prepare", "views", "fit", "coarse", "fine", "test", "mesh"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    Reconstruction(tiny_config(write_inputs(folder)), folder / "run", "cpu").train()
    return folder / "run"


def test_a_run_leaves_exactly_these_files(finished):
    files = sorted(str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file())
    events = [file for file in files if file.startswith("tb_logs/version_0/events")]
    assert len(events) == 1
    assert [file for file in files if file not in events] == [
        "ckpts/last.ckpt",
        "ckpts/views.safetensors",
        "csv_logs/version_0/metrics.csv",
        "metrics.json",
        "save/before-after.png",
        "save/coarse-val.png",
        "save/fine-val.png",
        "save/fit.png",
        "save/input.png",
        "save/it2-val.png",
        "save/it4-guidance.png",
        "save/it4-val.png",
        "save/model.glb",
        "save/model.mtl",
        "save/model.obj",
        "save/model.ply",
        "save/model.png",
        "save/sampled-views.png",
        "save/turntable.mp4",
        "save/turntable.png",
    ]


def test_metrics_have_the_promised_keys(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["stages"]) == STAGES
    for stage in metrics["stages"].values():
        assert stage["seconds"] >= 0 and stage["peak_memory_gb"] > 0
    assert {"psnr", "ssim", "mask_iou"} == set(metrics["reference"])
    assert metrics["mesh"]["vertices"] > 0 and metrics["mesh"]["faces"] > 0 and metrics["mesh"]["watertight"] is True
    assert metrics["model"] == "true views of four spheres"
    assert metrics["recipe"] == "none" and metrics["device"].startswith("cpu")
    assert {"fit_rgb", "fit_mask", "sds_sds", "ref_rgb", "ref_mask", "ref_orient", "loss"} <= set(metrics["losses"])
    assert "ref_sparsity" not in metrics["losses"]  # only random views are asked to be sparse


def test_the_mesh_opens(finished):
    mesh = trimesh.load(finished / "save" / "model.glb", force="mesh")
    assert len(mesh.faces) == json.loads((finished / "metrics.json").read_text())["mesh"]["faces"]


def test_the_log_has_every_step(finished):
    lines = (finished / "csv_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert {"fit/loss", "coarse/loss", "fine/loss", "fine/sds_sds"} <= set(header)


def test_one_step_ends_in_a_mesh(tmp_path):
    Reconstruction(tiny_config(write_inputs(tmp_path), "trainer.max_steps=1"), tmp_path / "run", "cpu").train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["prepare", "views", "fit", "test", "mesh"]
    assert (tmp_path / "run" / "save" / "model.glb").stat().st_size > 0


def test_without_a_warm_start_all_steps_are_distillation(tmp_path):
    config = tiny_config(
        write_inputs(tmp_path), "system.guidance.warm_start.enabled=false", "trainer.max_steps=2", "system.ref_rays=64"
    )
    Reconstruction(config, tmp_path / "run", "cpu").train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["prepare", "coarse", "test", "mesh"]


def test_evaluation_modes_read_the_checkpoint(finished, tmp_path):
    config = tiny_config(write_inputs(tmp_path), f"resume={finished / 'ckpts' / 'last.ckpt'}")
    reconstruction = Reconstruction(config, tmp_path / "again", "cpu")
    reconstruction.validate()
    reconstruction.test()
    reconstruction.export()
    save = tmp_path / "again" / "save"
    assert (save / "validate-val.png").exists() and (save / "turntable.mp4").exists()
    assert (save / "model.ply").read_bytes() == (finished / "save" / "model.ply").read_bytes()


def test_the_same_seed_gives_the_same_mesh_and_another_seed_another(finished, tmp_path):
    meshes = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        Reconstruction(tiny_config(write_inputs(folder), f"seed={seed}"), folder / "run", "cpu").train()
        meshes.append((folder / "run" / "save" / "model.ply").read_bytes())
    assert meshes[0] == (finished / "save" / "model.ply").read_bytes()
    assert meshes[1] != meshes[0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(write_inputs(tmp_path), "system.guidance.warm_start.enabled=false")
    config.system.loss.lambda_rgb = float("nan")
    with pytest.raises(DivergenceError, match="stage coarse, step 0: the loss is not finite"):
        Reconstruction(config, tmp_path / "run", "cpu").train()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    config = tiny_config(write_inputs(tmp_path), "system.guidance.warm_start.enabled=false")
    mse = torch.nn.functional.mse_loss
    monkeypatch.setattr("threedrec.losses.functional.mse_loss", lambda a, b: Poison.apply(mse(a, b)))
    with pytest.raises(DivergenceError, match="gradient is not finite"):
        Reconstruction(config, tmp_path / "run", "cpu").train()
