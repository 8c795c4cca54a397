"""Averages of model folders."""

from pathlib import Path

import pytest
import torch
from tiny_nvs import tiny_nvs_model

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


@pytest.mark.parametrize("shares", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
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
    with pytest.raises(InputError, match="configuration differs"):
        average_models([folders[0], tmp_path])
