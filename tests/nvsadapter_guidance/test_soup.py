"""Averages of model folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance import model as model_module
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.soup import average_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models: one of random weights and one whose weights are all minus three times those."""
    root = tmp_path_factory.mktemp("soup")
    model = tiny_nvs_model()
    model.save(root / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3.0)
    model.save(root / "b")
    return [root / "a", root / "b"]


@pytest.mark.parametrize(("shares", "factor"), [(None, -1.0), ([3.0, 1.0], 0.0), ([0.5, 0.5], -1.0)])
def test_weights_are_averaged_by_their_shares(folders: list[Path], shares: list[float] | None, factor: float) -> None:
    average, first = average_models(folders, shares), NVSModel.load(folders[0])
    for (name, mean), weight in zip(average.named_parameters(), first.parameters(), strict=True):
        # Half a step of the eight bits that the folders are kept in.
        error = (mean - factor * weight).abs().max()
        assert error <= 0.03 * weight.abs().max() + 1e-6, name


def test_the_average_of_a_model_with_itself_is_the_model(folders: list[Path]) -> None:
    average, first = (m.state_dict() for m in (average_models([folders[0]] * 2), NVSModel.load(folders[0])))
    assert all(torch.equal(average[key], first[key]) for key in first)


@pytest.mark.parametrize("shares", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1e308, 1e308]])
def test_impossible_shares_are_refused(folders: list[Path], shares: list[float]) -> None:
    with pytest.raises(InputError, match="shares"):
        average_models(folders, shares)


def test_one_folder_is_no_average(folders: list[Path]) -> None:
    with pytest.raises(InputError, match="at least two"):
        average_models(folders[:1])


def test_models_of_different_configurations_are_refused(folders: list[Path], tmp_path: Path) -> None:
    config = (folders[0] / "config.json").read_text()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    (tmp_path / "config.json").write_text(config.replace('"fov_deg": ', '"fov_deg": 1'))
    with pytest.raises(InputError, match=r"its fov_deg is 1\d+.*, but \d+.* in .*a; models must be alike"):
        average_models([folders[0], tmp_path])


@pytest.mark.parametrize("script", ["average_models", "deepen_model"])
def test_an_output_that_cannot_be_written_is_said_in_one_line(folders: list[Path], tmp_path: Path, script: str) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "file").write_text("mine")
    models = [str(folder) for folder in folders[: 2 if script == "average_models" else 1]]
    command = [sys.executable, str(root / "scripts" / f"{script}.py"), *models, "-o", str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "3drec")])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2 and "a model cannot be written there" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and (tmp_path / "file").read_text() == "mine"


def test_a_model_is_written_whole_or_not_at_all(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NVSModel.load(folders[0])
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model_module, "save_file", full)
    model.config.name = "another"
    with pytest.raises(InputError, match="no space left"):
        model.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
