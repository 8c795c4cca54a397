"""``config.json`` of a model folder: everything in it is looked at, and a mistake is named in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, NVSModel
from nvsadapter_guidance.model_config import read_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_nvs_model().save(folder)
    return folder


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "section": ("adapter", 5, "adapter is 5; it must be settings"),
    "size": ("image_size", "big", "image_size is 'big'"),
    "no size": ("image_size", True, "image_size is True"),
    "angle": ("fov_deg", float("nan"), "fov_deg is nan"),
    "name": ("name", 3, "name is 3"),
    "choice": ("unconditional_support", "bla", "unconditional_support is 'bla'; it must be one of zeros, noise"),
    "preprocessing": ("image_preprocessing", ["clip"], "image_preprocessing is"),
    "unet": ("unet.colour", 1, "unet: unknown key 'colour'"),
    "autoencoder": ("vae.colour", 1, "vae: unknown key 'colour'"),
    "encoder": ("image_encoder.colour", 1, "image_encoder: unknown key 'colour'"),
    "schedule": ("schedule.colour", 1, "schedule: unknown key 'colour'"),
    "depth": ("image_encoder.num_hidden_layers", 10**9, "image_encoder.num_hidden_layers is 1000000000"),
    "channels": ("unet.block_out_channels", 5, "no model can be built"),
    "heads": ("image_encoder.num_attention_heads", 7, "no model can be built"),
    "kind": ("schedule.kind", "x", "'x' is not one of scaled_linear, cosine"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_one_line(saved: Path, tmp_path: Path, mistake: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    key, value, message = MISTAKES[mistake]
    values = json.loads((folder / CONFIG_NAME).read_text())
    *section, name = key.split(".")
    (values[section[0]] if section else values)[name] = value
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        NVSModel.load(folder)
    said = str(caught.value)
    assert said.startswith(str(folder / CONFIG_NAME)) and message in said and "\n" not in said


@pytest.mark.parametrize("content", [b"5", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000, b"{}"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(InputError, match="config.json") as caught:
        read_config(tmp_path / CONFIG_NAME)
    assert "\n" not in str(caught.value)


def test_notes_of_diffusers_are_ignored(saved: Path, tmp_path: Path) -> None:
    values = json.loads((saved / CONFIG_NAME).read_text())
    values["unet"]["_diffusers_version"] = "0.30.0"
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    assert read_config(tmp_path / CONFIG_NAME).unet["_diffusers_version"] == "0.30.0"
