"""The shipped configs and the full-size weights: which they name, and which recipe they take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvsadapter_guidance.weight_files import RELEASED_CHECKPOINT, RELEASED_CONFIG, locate
from nvsadapter_guidance.weights import choose_weights
from threedrec.config import load_config
from threedrec.errors import InputError
from threedrec.guidance.nvsadapter import NVSAdapterGuidance, guidance_dtype


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    """An empty folder for checkpoints, and no other place where some could be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(folder))
    return folder


def put_released(folder: Path) -> None:
    for name in (RELEASED_CHECKPOINT, RELEASED_CONFIG):
        (folder / name).write_bytes(b"stands for weights")


@pytest.mark.parametrize(("device", "without"), [("cuda", "mini-gpu"), ("cpu", "mini-cpu")])
def test_auto_takes_the_full_size_recipe_when_released_weights_are_found(checkpoints, device, without):
    assert load_config("configs/nvsadapter.yaml", device_type=device).recipe == without
    put_released(checkpoints)
    config = load_config("configs/nvsadapter.yaml", device_type=device)
    assert config.recipe == "full-gpu" and config.trainer.max_steps == 8000
    assert choose_weights(config.system.guidance.pretrained).path == checkpoints / RELEASED_CHECKPOINT


def test_the_embedded_model_can_still_be_asked_for(checkpoints):
    put_released(checkpoints)
    config = load_config("configs/nvsadapter.yaml", ["system.guidance.pretrained=mini"], device_type="cuda")
    assert config.recipe == "mini-gpu"


def test_the_released_config_finds_its_weights_from_any_folder(checkpoints):
    guidance = load_config("configs/nvsadapter-released.yaml").system.guidance
    with pytest.raises(InputError, match=f"no such file; get it with: 3drec weights download {RELEASED_CHECKPOINT}"):
        choose_weights(guidance.pretrained_model_name_or_path)
    put_released(checkpoints)
    choice = choose_weights(guidance.pretrained_model_name_or_path)
    assert (choice.family, choice.path) == ("released", checkpoints / RELEASED_CHECKPOINT)
    assert locate(guidance.pretrained_config) == checkpoints / RELEASED_CONFIG


def test_the_sd15_config_is_the_full_recipe_with_other_weights():
    sd15 = load_config("configs/nvsadapter-sd15.yaml")
    assert sd15.system.guidance.pretrained == "checkpoints/nvsadapter-sd15"
    full = load_config("configs/nvsadapter.yaml", ["recipe=full-gpu"])
    full.system.guidance.pretrained = sd15.system.guidance.pretrained
    assert replace(sd15, name=full.name) == full


@pytest.mark.parametrize("convention", ["training", "released-sampling"])
def test_the_pose_convention_is_a_key_of_the_guidance(convention):
    overrides = [f"system.guidance.pose_convention={convention}"]
    assert load_config("configs/nvsadapter-released.yaml", overrides).system.guidance.pose_convention == convention
    assert load_config("configs/nvsadapter-released.yaml").system.guidance.pose_convention == "training"


def test_an_unknown_pose_convention_is_named():
    with pytest.raises(InputError, match="system.guidance.pose_convention: expected one of training, released-samp"):
        load_config("configs/nvsadapter-released.yaml", ["system.guidance.pose_convention=script"])


@pytest.mark.parametrize("value", ["off", "'off'", "false"])
def test_graphs_are_switched_off_by_the_word_that_yaml_takes_for_false(value):
    assert load_config("configs/nvsadapter.yaml", [f"system.guidance.graph={value}"]).system.guidance.graph == "off"
    for other in ("on", "true"):
        with pytest.raises(InputError, match="system.guidance.graph: expected one of auto, off"):
            load_config("configs/nvsadapter.yaml", [f"system.guidance.graph={other}"])


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("min_step_percent", -0.1, 0.0),
        ("max_step_percent", 1.1, 1.0),
        ("max_step_percent", [0, 0.98, 1.5, 5000], [0, 0.98, 0.5, 5000]),
        ("grad_clip", -1.0, 1.0),
    ],
)
def test_shares_of_the_noise_schedule_are_shares(key, bad, good):
    with pytest.raises(InputError, match=f"system.guidance.{key}: must be at"):
        load_config("configs/nvsadapter.yaml", [f"system.guidance.{key}={bad}"])
    loaded = load_config("configs/nvsadapter.yaml", [f"system.guidance.{key}={good}"])
    assert getattr(loaded.system.guidance, key) == good


def test_a_yaml_file_beside_weights_that_have_none_is_refused():
    config = load_config("configs/nvsadapter.yaml", ["system.guidance.pretrained=mini", "recipe=none"]).system.guidance
    config.pretrained_config = "nowhere.yaml"
    with pytest.raises(InputError, match="system.guidance.pretrained_config: goes with a released checkpoint alone"):
        NVSAdapterGuidance(config, torch.device("cpu"))


def test_the_embedded_model_refuses_the_sampling_convention():
    config = load_config("configs/nvsadapter.yaml", ["system.guidance.pretrained=mini", "recipe=none"]).system.guidance
    config.pose_convention = "released-sampling"
    with pytest.raises(InputError, match="the embedded model knows training alone"):
        NVSAdapterGuidance(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("precision", "family", "device", "expected"),
    [
        ("auto", "released", "cuda", torch.float16),
        ("auto", "released", "cpu", torch.float32),
        ("auto", "mini", "cuda", torch.float32),
        ("bfloat16", "released", "cuda", torch.bfloat16),
        ("float32", "released", "cuda", torch.float32),
    ],
)
def test_precision_of_the_guidance(precision, family, device, expected):
    assert guidance_dtype(precision, family, torch.device(device)) == expected
