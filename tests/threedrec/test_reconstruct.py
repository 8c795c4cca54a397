"""A whole reconstruction, tiny, from image to mesh."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest
import torch
import trimesh
from tiny_run import Reconstruction, tiny_config, write_inputs

from threedrec.divergence import DivergenceError, FiniteCheck
from threedrec.errors import InputError
from threedrec.image import load_support_view
from threedrec.imagined_views import sample_views
from threedrec.loop import LoopRunner
from threedrec.results import save_reference_metrics

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


@pytest.mark.parametrize(
    "encoding",
    [
        "{otype: ProgressiveBandHashGrid, n_levels: 4, log2_hashmap_size: 10, base_resolution: 4, start_level: 1,"
        " update_steps: 2}",
        "{otype: ProgressiveBandFrequency, n_frequencies: 4, n_masking_step: 8}",
    ],
)
def test_a_progressive_field_is_exported_as_it_was_left(tmp_path, encoding):
    overrides = (f"system.geometry.pos_encoding_config={encoding}", "trainer.max_steps=6")
    config = write_inputs(tmp_path)
    Reconstruction(tiny_config(config, *overrides), tmp_path / "run", "cpu").train()
    resume = f"resume={tmp_path / 'run' / 'ckpts' / 'last.ckpt'}"
    Reconstruction(tiny_config(config, *overrides, resume), tmp_path / "again", "cpu").export()
    meshes = [(tmp_path / run / "save" / "model.ply").read_bytes() for run in ("run", "again")]
    assert meshes[0] == meshes[1]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_the_field_computes_in_float32_and_says_so(tmp_path, caplog, precision):
    config = tiny_config(write_inputs(tmp_path), f"trainer.precision={precision}")
    with caplog.at_level(logging.INFO, "threedrec.reconstruct"):
        run = Reconstruction(config, tmp_path / "run", "cpu")._open()
    assert {parameter.dtype for parameter in run.scene.parameters()} == {torch.float32}
    told = [message for message in caplog.messages if "the field computes in float32" in message]
    assert len(told) == (precision != "32-true")


def test_numbers_of_a_stage_are_written_before_it_counts_as_done(tmp_path, monkeypatch):
    written = []

    def save(keeper, checkpoint):
        folder = tmp_path / "run"
        metrics = json.loads((folder / "metrics.json").read_text())
        logged = sum(len(file.read_text().splitlines()) - 1 for file in folder.glob("csv_logs/*/metrics.csv"))
        written.append((checkpoint, metrics, logged))

    monkeypatch.setattr("threedrec.checkpoint.CheckpointKeeper.save", save)
    Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu").train()
    assert written[-1][0].finished == STAGES[1:]
    for checkpoint, metrics, _ in written:
        assert {checkpoint.stage, *checkpoint.finished} <= set(metrics["stages"])
        assert ("fit" in checkpoint.finished) <= ("fit_rgb" in metrics.get("losses", {}))
    in_fit = [(checkpoint.step, logged) for checkpoint, _, logged in written if checkpoint.stage == "fit"]
    assert len(in_fit) >= 3 and all(step == logged for step, logged in in_fit)


def test_preparing_includes_reading_the_image(tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(0.5)
        return load_support_view(*arguments)

    monkeypatch.setattr("threedrec.reconstruct.load_support_view", slow)
    monkeypatch.setattr("threedrec.reconstruct.plan", lambda run: [])
    Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu").train()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["stages"]["prepare"]["seconds"] >= 0.5


def test_a_refused_image_leaves_no_numbers(tmp_path):
    config = tiny_config(write_inputs(tmp_path))
    config.data.image_path = str(tmp_path / "none.png")
    with pytest.raises(InputError):
        Reconstruction(config, tmp_path / "run", "cpu").train()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_views_that_are_not_square_compare_a_square_photograph(tmp_path, monkeypatch):
    sizes = []

    def measured(rendered, photograph):
        sizes.append((rendered.shape, photograph.shape))
        return 0.0

    monkeypatch.setattr("threedrec.results.psnr", measured)
    config = tiny_config(write_inputs(tmp_path), "data.random_camera.eval_width=40")
    save_reference_metrics(Reconstruction(config, tmp_path / "run", "cpu")._open())
    assert sizes == [((24, 24, 3), (24, 24, 3))]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_fit_to_the_views_or_to_the_photograph_alone(tmp_path, share):
    config = tiny_config(
        write_inputs(tmp_path), f"system.guidance.warm_start.reference_share={share}", "trainer.max_steps=2"
    )
    Reconstruction(config, tmp_path / "run", "cpu").train()
    losses = json.loads((tmp_path / "run" / "metrics.json").read_text())["losses"]
    assert ("fit_reference" in losses, "fit_rgb" in losses) == (share > 0, share < 1)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (None, False),
        ("seed=1", True),
        ("system.guidance.warm_start.guidance_scale=3.0", True),
        ("system.guidance.warm_start.num_inference_steps=3", True),
        ("system.guidance.warm_start.elevations=[0.0,20.0]", True),
    ],
)
def test_views_are_sampled_again_only_when_the_config_asks_for_others(tmp_path, finished, caplog, change, again):
    shutil.copytree(finished / "ckpts", tmp_path / "run" / "ckpts")
    resume = f"resume={tmp_path / 'run' / 'ckpts' / 'last.ckpt'}"
    config = tiny_config(write_inputs(tmp_path), resume, *([change] if change else []))
    run = Reconstruction(config, tmp_path / "run", "cpu")._open()
    sample_views(run)
    assert ("views of another config" in caplog.text) is again
    assert (run.guidance is not None) is again
    assert (run.save_dir / "sampled-views.png").is_file()


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


@pytest.mark.parametrize("picture", ["trainer.val_check_interval=2", "system.freq.guidance_eval=3"])
def test_no_picture_is_made_after_a_step_that_was_not_finite(tmp_path, monkeypatch, picture):
    def poisoned(self, loop, result, index, usual=LoopRunner._descend):
        result.loss = result.loss * (float("nan") if (loop.stage, index) == ("coarse", 1) else 1.0)
        usual(self, loop, result, index)

    monkeypatch.setattr(LoopRunner, "_descend", poisoned)
    monkeypatch.setattr("threedrec.loop.FiniteCheck", lambda late: FiniteCheck(late=True))
    others = ["trainer.val_check_interval=9", "system.freq.guidance_eval=9", "checkpoint.every_n_train_steps=9"]
    changes = ["system.guidance.warm_start.enabled=false", "trainer.log_every_n_steps=9", *others, picture]
    with pytest.raises(DivergenceError, match="stage coarse, step 1: "):
        Reconstruction(tiny_config(write_inputs(tmp_path), *changes), tmp_path / "run", "cpu").train()
    assert [file.name for file in (tmp_path / "run" / "save").iterdir()] == ["input.png"]


@pytest.mark.parametrize("clip", ["null", "1.0"])
@pytest.mark.parametrize("factor", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, clip, factor):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(factor)

    config = tiny_config(
        write_inputs(tmp_path), "system.guidance.warm_start.enabled=false", f"trainer.gradient_clip_val={clip}"
    )
    mse = torch.nn.functional.mse_loss
    monkeypatch.setattr("threedrec.losses.functional.mse_loss", lambda a, b: Poison.apply(mse(a, b)))
    with pytest.raises(DivergenceError, match="gradient is not finite"):
        Reconstruction(config, tmp_path / "run", "cpu").train()
