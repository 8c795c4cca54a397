"""Model folders: round trip, strictness, messages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, WEIGHTS_NAME, NVSModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_nvs_model()
    model.vae.register_to_config(scaling_factor=0.5)
    model.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_saved_model_comes_back(saved: Path) -> None:
    original, loaded = tiny_nvs_model(), NVSModel.load(saved)
    assert loaded.vae.config.scaling_factor == 0.5
    assert original.state_dict().keys() == loaded.state_dict().keys()
    for key, tensor in original.state_dict().items():
        largest = max(float(tensor.abs().max()), 1e-6)
        assert (tensor - loaded.state_dict()[key]).abs().max() <= largest / 127, key
    assert not any(p.requires_grad for p in loaded.parameters())


def test_saving_a_loaded_model_changes_nothing(saved: Path, tmp_path: Path) -> None:
    NVSModel.load(saved).save(tmp_path)
    first, second = (load_file(path / WEIGHTS_NAME) for path in (saved, tmp_path))
    assert all((first[key].float() - second[key].float()).abs().max() <= 1e-3 * first[key].float().abs().max() + 1e-6
               for key in first if first[key].dtype != torch.int8)  # fmt: skip
    assert (tmp_path / CONFIG_NAME).read_text() == (saved / CONFIG_NAME).read_text()


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        NVSModel.load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{WEIGHTS_NAME}.*safetensors"):
        NVSModel.load(folder)


def test_missing_surplus_and_nan_tensors_are_named(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_NAME)
    key = "text_context"
    for broken in ({k: v for k, v in state.items() if k != key}, {**state, "extra": torch.ones(2)}):
        save_file(broken, folder / WEIGHTS_NAME)
        with pytest.raises(InputError, match=f"{WEIGHTS_NAME}.*(text_context|extra)"):
            NVSModel.load(folder)
    save_file({**state, key: torch.full_like(state[key], float("nan"))}, folder / WEIGHTS_NAME)
    with pytest.raises(InputError, match=f"{key}.*NaN"):
        NVSModel.load(folder)


def test_unknown_configuration_keys_are_named(folder: Path) -> None:
    values = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(InputError, match="config.json.*'colour'"):
        NVSModel.load(folder)
    (folder / CONFIG_NAME).write_text("{")
    with pytest.raises(InputError, match="config.json.*JSON"):
        NVSModel.load(folder)


def test_latents_have_the_stride_of_the_autoencoder() -> None:
    model = tiny_nvs_model()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = model.encode(model.resize(images))
    assert latents.shape == (2, 4, 8, 8) and model.latent_stride == 4
    assert model.decode(latents).shape == (2, 3, 32, 32)
    assert model.semantic_tokens(model.resize(images)).shape == (2, 1, 12)


def test_the_posterior_is_sampled_only_with_a_generator() -> None:
    model = tiny_nvs_model()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = model.encode(images)
    sampled = [model.encode(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(mean, model.encode(images))
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
