"""Configurations of adapter training: the shipped files, merging, overrides, mistakes."""

from pathlib import Path

import pytest
import yaml

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.adapter.config import TrainConfig
from nvsadapter_guidance.training.adapter.config_files import dump_config, load_config
from nvsadapter_guidance.training.adapter.network import model_config
from nvsadapter_guidance.training.adapter.run import choose_hardware, parse_devices

EXPERIMENTS = {
    "base": {},
    "query_1": {"num_query": 1},
    "query_2": {"num_query": 2},
    "query_6": {"num_query": 6},
    "query_16": {"num_query": 16},
    "emb_scale_0.5": {"query_emb_scale": 0.5},
    "emb_scale_2": {"query_emb_scale": 2.0},
    "no_global_semantic": {"image_attn_mode": None},
    "rays_origin_direction": {"ray_embedding": "rayo_rayd"},
    "extrinsic": {"ray_embedding": "extrinsic"},
    "all_to_all": {"query_composer_mode": "all_to_all"},
    "all_to_all_attention": {"query_composer_mode": "all_to_all_attention"},
    "full_finetune": {},
    "sd15": {},
    "controlnet": {},
    "mini": {},
}


@pytest.fixture(scope="module")
def configs(repository: Path) -> Path:
    return repository / "configs" / "adapter"


def test_every_shipped_config_is_an_experiment_known_here(configs: Path) -> None:
    assert {file.stem for file in configs.glob("*.yaml")} == set(EXPERIMENTS)


def test_the_defaults_are_the_released_recipe(configs: Path) -> None:
    config = load_config([configs / "base.yaml"])
    assert config.optim.lr == 5e-5 and config.optim.warmup_steps == 10_000 and config.optim.warmup_start == 1e-6
    assert config.optim.ema_decay == 0.9995 and config.optim.gradient_clip_norm == 0.5
    assert config.optim.condition_dropout == 0.1 and config.optim.weight_decay == 0.01
    assert config.data.batch_size == 32 and config.trainer.precision == "16-mixed"
    # What the file writes out for readers is what the code does without it.
    plain = load_config([])
    plain.model.adapter = config.model.adapter
    assert config == plain
    assert model_config(config.model).adapter == model_config(load_config([]).model).adapter


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"base"}))
def test_an_experiment_changes_what_its_name_says(configs: Path, name: str) -> None:
    files = [
        configs / "base.yaml",
        *([configs / "sd15.yaml"] if name == "controlnet" else []),
        configs / f"{name}.yaml",
    ]
    base, config = load_config(files[:1]), load_config(files)
    assert config.name == name
    changed = {k: v for k, v in config.model.adapter.items() if v != base.model.adapter[k]}
    assert changed == EXPERIMENTS[name]
    assert config.optim == base.optim
    assert config.model.full_finetune == (name == "full_finetune")
    assert config.model.controlnet == (name == "controlnet")
    assert config.model.base == {"sd15": "sd15", "controlnet": "sd15", "mini": "mini"}.get(name, "sd21")
    model_config(config.model)


def test_later_files_and_words_win(tmp_path: Path, configs: Path) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("optim: {lr: 1.0e-4}\ndata: {batch_size: 7}\n")
    config = load_config([configs / "base.yaml", extra], ["trainer.devices=0,", "data.batch_size=4", "optim.eps=1e-6"])
    assert (config.optim.lr, config.data.batch_size, config.trainer.devices) == (1e-4, 4, "0,")
    assert config.optim.eps == 1e-6 and config.optim.weight_decay == 0.01


def test_a_written_config_reads_back(tmp_path: Path, configs: Path) -> None:
    config = load_config([configs / "base.yaml", configs / "no_global_semantic.yaml"], ["trainer.devices=2"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "again.yaml"]) == config
    assert yaml.safe_load(dump_config(TrainConfig())) == yaml.safe_load(dump_config(load_config([])))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.learning=1", "unknown key 'optim.learning'"),
        ("optim.warmup_step=1", "did you mean 'optim.warmup_steps'"),
        ("model.adapter.num_queries=1", "did you mean 'model.adapter.num_query'"),
        ("optim.lr=fast", "optim.lr"),
        ("model.adapter.num_query=many", "num_query"),
        ("data=5", "'data' is a group of keys"),
        ("data.batch_size", "no key=value"),
        ("data.batch_size=0", "data.batch_size is 0"),
        ("optim.condition_dropout=1.0", "less than 1"),
        ("optim.betas=[0.9]", "two"),
        ("trainer.precision=8-bit", "use one of 32-true"),
        ("model.adapter.ray_embedding=spherical", "ray_embedding 'spherical'"),
        ("trainer.checkpoint_keep=0", "-1 for all"),
        ("seed=-1", "seed is -1"),
        ("name=a/b", "folder's name"),
        ("model.controlnet_weights=x.pth", "set it to true"),
    ],
)
def test_a_mistake_is_named_in_one_line(word: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config([], [word])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bad, listed = tmp_path / "bad.yaml", tmp_path / "list.yaml"
    bad.write_text("optim: [")
    listed.write_text("- 1")
    for file, message in ((tmp_path / "none.yaml", "cannot be read"), (bad, "not YAML"), (listed, "holds no keys")):
        with pytest.raises(InputError, match=message) as caught:
            load_config([file])
        assert str(file) in str(caught.value)


def test_controlnet_needs_sd15(configs: Path) -> None:
    config = load_config([configs / "base.yaml", configs / "controlnet.yaml"])
    with pytest.raises(InputError, match=r"sd15\.yaml before"):
        model_config(config.model)


def test_devices_are_written_as_in_the_released_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert parse_devices("0,", "gpu") == ([0], 1)
    assert parse_devices("1,3", "gpu") == ([1, 3], 2)
    assert parse_devices("2", "gpu") == (2, 2)
    assert parse_devices("auto", "gpu") == (4, 4)
    assert parse_devices("0,", "cpu") == (1, 1) and parse_devices("auto", "cpu") == (1, 1)
    for text in ("4,", "5", "0", "-1", "1,1", "cuda", ","):
        with pytest.raises(InputError, match=r"trainer\.devices"):
            parse_devices(text, "gpu")


def test_what_a_machine_cannot_do_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="16-mixed needs a GPU"):
        choose_hardware(load_config([]).trainer)
    with pytest.raises(InputError, match="no CUDA device"):
        choose_hardware(load_config([], ["trainer.accelerator=gpu"]).trainer)
