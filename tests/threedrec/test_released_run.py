"""The configs of the full-size models, run whole on tiny checkpoints in the released layouts: from image to mesh."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import trimesh

from nvsadapter_guidance.checkpoints import convert_released
from nvsadapter_guidance.checkpoints.sources import BASE_VARIABLE, IMAGE_ENCODER_VARIABLE
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.weight_files import RELEASED_CHECKPOINT, RELEASED_CONFIG
from threedrec import cli

STEPS = 4
SMALL = (
    "name=tiny",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "data.height=[16,24,32]",
    "data.width=[16,24,32]",
    "data.resolution_milestones=[2,3]",
    "data.random_camera.height=[12,16,20]",
    "data.random_camera.width=[12,16,20]",
    "data.random_camera.batch_size=[8,8,4]",
    "data.random_camera.eval_height=24",
    "data.random_camera.eval_width=24",
    "data.random_camera.n_val_views=2",
    "data.random_camera.n_test_views=4",
    "system.geometry.pos_encoding_config.n_levels=4",
    "system.geometry.pos_encoding_config.log2_hashmap_size=10",
    "system.renderer.num_samples_per_ray=24",
    "system.renderer.occupancy_resolution=16",
    "system.exporter.isosurface_resolution=24",
    "system.exporter.face_budget=400",
    "system.exporter.texture_size=64",
)


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    """An empty folder for checkpoints, and no other place where some could be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for variable in (BASE_VARIABLE, IMAGE_ENCODER_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def tiny(repository):
    """The module that writes tiny checkpoints."""
    sys.path.insert(0, str(repository / "tests" / "nvsadapter_guidance"))
    import tiny_checkpoints

    return tiny_checkpoints


@pytest.fixture
def released(tiny, checkpoints) -> Path:
    """A tiny checkpoint under the released names."""
    path = tiny.write_released(checkpoints, name=RELEASED_CHECKPOINT)
    (checkpoints / "tiny.yaml").rename(checkpoints / RELEASED_CONFIG)
    return path


@pytest.fixture
def on_sd15(tiny, checkpoints) -> Path:
    """A tiny adapter of our layout, beside a base model with the text tower of Stable Diffusion 1.5."""
    whole = tiny.write_released(checkpoints / "whole", tiny.released_tensors("huggingface"))
    torch.save({"state_dict": tiny.ldm_tensors("huggingface")}, checkpoints / "v1-5-pruned-emaonly.ckpt")
    image_encoder = {key: value for key, value in tiny.released_tensors().items() if key.startswith(tiny.IMAGE_PREFIX)}
    image_encoder = {key.removeprefix(tiny.IMAGE_PREFIX): value for key, value in image_encoder.items()}
    torch.save(image_encoder, checkpoints / "open_clip_pytorch_model.bin")
    convert_released(whole, checkpoints / "nvsadapter-sd15")
    return checkpoints / "nvsadapter-sd15"


@pytest.fixture
def judged(monkeypatch) -> list:
    """Every result of score distillation."""
    results, judge = [], ScoreDistillation.__call__

    def remember(self, *arguments):
        results.append((self, judge(self, *arguments)))
        return results[-1][1]

    monkeypatch.setattr(ScoreDistillation, "__call__", remember)
    return results


def launch(config: str, repository: Path, *overrides: str) -> tuple[int, Path]:
    """``launch.py --train`` on the CPU; the exit code and the run's folder."""
    image = repository / "load" / "images" / "robot.png"
    run_dir = Path("run").absolute()
    values = [f"data.image_path={image}", *SMALL, f"trial_dir={run_dir}", *overrides]
    return cli.launch_main(["--config", f"configs/{config}.yaml", "--train", "--gpu", "cpu", *values]), run_dir


def logged(run_dir: Path, name: str) -> list[float]:
    """Every value of a column of the logs."""
    rows = csv.DictReader((run_dir / "csv_logs" / "version_0" / "metrics.csv").open())
    return [float(cell) for row in rows for key, cell in row.items() if key.endswith(f"/{name}") and cell]


def check(run_dir: Path, judged: list, reason: str) -> ScoreDistillation:
    """Every step asked the released kind of guidance, and there is a mesh at the end."""
    assert len(judged) == STEPS
    guidance = judged[0][0]
    assert guidance.model.config.unconditional_support == "noise"
    assert guidance.model.config.image_preprocessing == "clip"
    assert guidance.guidance_scale == 3.0 and guidance.num_query == 4
    # Its own keys and values are kept; those of the noise are not.
    assert guidance.conditions.conditional is not None and guidance.conditions.unconditional is None
    norms = logged(run_dir, "sds_grad_norm")
    assert len(norms) == STEPS and all(math.isfinite(norm) and norm > 0 for norm in norms)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["startup", "prepare", "coarse", "fine", "test", "mesh"]
    assert reason in metrics["model"]
    assert (run_dir / "save" / "turntable.mp4").stat().st_size > 0
    mesh = trimesh.load(run_dir / "save" / "model.glb", force="mesh")
    assert len(mesh.faces) > 20
    return guidance


def test_the_released_config_runs_as_it_is(released, judged, repository):
    code, run_dir = launch("nvsadapter-released", repository)
    assert code == 0
    check(run_dir, judged, f"released checkpoint {released}")


def test_auto_finds_the_released_weights_and_takes_their_recipe(released, judged, repository):
    code, run_dir = launch("nvsadapter", repository, "system.guidance.memory=low")
    assert code == 0
    guidance = check(run_dir, judged, f"released weights {released}")
    assert guidance.memory.groups_per_call == 1
    assert json.loads((run_dir / "metrics.json").read_text())["recipe"] == "full-gpu"


def test_an_adapter_on_sd15_runs_with_the_base_model_that_is_named(on_sd15, judged, repository, monkeypatch):
    # Real ones are told apart by the width of their text tokens, and found by their file names.
    monkeypatch.setenv(BASE_VARIABLE, str(on_sd15.parent / "v1-5-pruned-emaonly.ckpt"))
    code, run_dir = launch("nvsadapter-sd15", repository, "system.guidance.precision=bfloat16")
    assert code == 0
    guidance = check(run_dir, judged, f"adapter {on_sd15}")
    assert guidance.model.dtype == torch.bfloat16
    assert guidance.model.prompt_encoder.token_ids("").tolist() == [[98, 99, 99, 99, 99, 99, 99]]


def test_without_its_adapter_the_sd15_config_ends_in_one_line(repository, capsys):
    code, run_dir = launch("nvsadapter-sd15", repository)
    assert code == 2 and not run_dir.exists()
    assert "weights: none at 'checkpoints/nvsadapter-sd15'" in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_memory_mode_is_named(repository, capsys):
    code, _ = launch("nvsadapter-released", repository, "system.guidance.memory=tiny")
    assert code == 2
    assert "system.guidance.memory: expected one of auto, normal, low" in capsys.readouterr().err
