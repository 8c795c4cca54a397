"""What may lie in and beside a checkpoint and is wrong: one line says so; and folders of ours are known for theirs."""

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_checkpoints import SETTINGS, released_tensors, write_released
from tiny_nvs import tiny_nvs_model
from torch import Tensor

from nvsadapter_guidance.checkpoints import convert, convert_released, identify
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX, TEXT_PREFIX, UNET_PREFIX
from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.encoders import TOKENIZER_VARIABLE
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, MINI_MODEL, WEIGHTS_NAME
from nvsadapter_guidance.weights import load_model


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return released_tensors()


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"), tensors)


def refusals(path: Path) -> list[str]:
    """What `identify` and `load_model` say."""
    said = []
    for look in (lambda: identify(path), lambda: load_model(str(path))):
        with pytest.raises(InputError) as caught:
            look()
        said.append(str(caught.value))
        assert "\n" not in said[-1]
    return said


BLOCK = f"{UNET_PREFIX}unet.input_blocks.1.1.transformer_blocks.0"
LAYER = f"{TEXT_PREFIX}model.transformer.resblocks."
TENSORS: dict[str, tuple[str, Tensor, str]] = {
    "eight bits": (f"{UNET_PREFIX}unet.out.2.bias", torch.zeros(4).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "complex": (f"{UNET_PREFIX}unet.out.2.bias", torch.zeros(4).to(torch.complex64), "holds torch.complex64"),
    "rays": (f"{UNET_PREFIX}pe_blocks.0.weight", torch.zeros(3), "has shape (3,)"),
    "tokens": (f"{BLOCK}.support_emb", torch.zeros(3), "has shape (3,)"),
    "width": (f"{TEXT_PREFIX}model.token_embedding.weight", torch.zeros(100, 200), "cannot be divided into attention"),
    "positions": (f"{IMAGE_PREFIX}visual.positional_embedding", torch.zeros(1, 64), "has 1 positions"),
    "layer of many digits": (f"{LAYER}{'9' * 5000}.ln_1.bias", torch.zeros(3), "is not known"),
    "layer of ten digits": (f"{LAYER}1000000000.ln_1.bias", torch.zeros(3), "is not known"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_fit_no_model_are_named(case: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name, value, message = TENSORS[case]
    path = write_released(tmp_path, {}).with_suffix(".safetensors")
    save_file({key: v.contiguous() for key, v in {**tensors, name: value}.items()}, path)
    assert all(message in said and str(path) in said for said in refusals(path))


YAMLS: dict[str, tuple[str, Any, str]] = {
    "no settings": ("sd_config", None, "sd_config holds no settings"),
    "text for settings": ("sd_config", "x", "sd_config holds no settings"),
    "no side": ("latent_resolution", None, "latent_resolution is None"),
    "side": ("latent_resolution", "abc", "latent_resolution is 'abc'"),
    "views": ("num_query", 0, "num_query is 0"),
    "no levels": ("sd_config.params.channel_mult", [], "no model can be built"),
    "levels": ("sd_config.params.channel_mult", 3, "sd_config is damaged"),
    "heads": ("sd_config.params.num_head_channels", 0, "sd_config is damaged"),
    "context": ("sd_config.params.context_dim", "x", "no model can be built"),
    "depth": ("sd_config.params.transformer_depth", 10**9, "transformer_layers_per_block is 1000000000"),
}


def write_yaml(path: Path, settings: Any) -> Path:
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("case", YAMLS)
def test_values_in_the_yaml_are_checked(case: str, checkpoint: Path, tmp_path: Path) -> None:
    key, value, message = YAMLS[case]
    settings = copy.deepcopy(SETTINGS)
    place = settings["model"]["params"]["network_config"]["params"]
    *sections, name = key.split(".")
    for section in sections:
        place = place[section]
    place[name] = value
    path = write_yaml(tmp_path / "x.yaml", settings)
    with pytest.raises(InputError) as caught:
        load_model(str(checkpoint), config=str(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "conditioners", [["x"], [{"params": 3}], [{"params": {"emb_models": [None]}}]], ids=["text", "number", "none"]
)
def test_conditioners_in_the_yaml_are_checked(conditioners: Any, checkpoint: Path, tmp_path: Path) -> None:
    settings = copy.deepcopy(SETTINGS)
    settings["model"]["params"]["conditioner_config"] = {"params": {"conditioners_config": conditioners}}
    path = write_yaml(tmp_path / "x.yaml", settings)
    with pytest.raises(InputError, match="x.yaml: params holds no settings"):
        load_model(str(checkpoint), config=str(path))


@pytest.mark.parametrize("content", ["2024-99-99", "[" * 5000, "a: [", "3"], ids=["date", "deep", "cut", "number"])
def test_other_files_are_no_yaml(content: str, checkpoint: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "x.yaml", content)
    with pytest.raises(InputError, match="x.yaml") as caught:
        load_model(str(checkpoint), config=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error:\nfull"), RuntimeError("write failed\nat x")],
)
def test_a_full_disk_leaves_neither_files_nor_folders(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(convert, "save_file", full)
    for folder, remains in ((tmp_path / "new" / "out", tmp_path / "new"), (tmp_path, tmp_path / "out")):
        with pytest.raises(InputError, match="cannot be written") as caught:
            convert_released(checkpoint, folder)
        assert "\n" not in str(caught.value) and not remains.exists()
    assert list(tmp_path.iterdir()) == []


def test_converted_files_have_the_permissions_of_others(checkpoint: Path, tmp_path: Path) -> None:
    convert_released(checkpoint, tmp_path / "out")
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "new", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1


def test_a_saved_pipeline_is_identified_and_checked(tmp_path: Path) -> None:
    pipeline = NVSAdapterPipeline.from_model(tiny_nvs_model())
    pipeline.save_pretrained(tmp_path)
    report = identify(tmp_path)
    assert report.kind == "pipeline" and report.tensors == len(pipeline.model.state_dict())
    file = next((tmp_path / "vae").glob("*.safetensors"))
    state = pipeline.vae.state_dict()
    first = next(iter(state))
    for broken, message in (
        ({**state, first: torch.full_like(state[first], torch.nan)}, f"'{first}' holds NaN"),
        ({key: value for key, value in state.items() if key != first}, f"'{first}' is missing"),
    ):
        save_file(broken, file)
        with pytest.raises(InputError, match=message):
            identify(tmp_path)


def test_the_weights_of_a_model_folder_are_identified_with_their_settings() -> None:
    assert identify(MINI_MODEL / WEIGHTS_NAME) == identify(MINI_MODEL)


def words(number: int, begin: int) -> dict[str, int]:
    names = [f"word{index}" for index in range(number)]
    names[begin : begin + 2] = ["<|startoftext|>", "<|endoftext|>"]
    return {name: index for index, name in enumerate(names)}


VOCABULARIES: dict[str, tuple[dict[str, int] | None, str]] = {
    "no files": (None, "no CLIP tokenizer"),
    "fewer words": (words(54, 52), "has other words"),
    "another beginning": (words(100, 10), "has other words"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_prompts_are_never_read_with_another_vocabulary(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, message = VOCABULARIES[case]
    if vocabulary is not None:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    else:
        (tmp_path / CONFIG_NAME).write_text("{}")
    monkeypatch.setenv(TOKENIZER_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=f"prompt 'a red chair': .*{message}.*{TOKENIZER_VARIABLE}"):
        load_model(str(checkpoint)).text_tokens("a red chair")


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "nobody/nothing", "no name at all"])
def test_a_tokenizer_that_is_not_on_the_machine_is_named(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(TOKENIZER_VARIABLE, name)
    with pytest.raises(InputError, match=f"no CLIP tokenizer at '{name}'"):
        load_model(str(checkpoint)).text_tokens("a red chair")
