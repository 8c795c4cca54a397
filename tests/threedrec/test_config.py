import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from threedrec import registry
from threedrec.config import dump_config, load_config
from threedrec.config_resolvers import register_resolvers
from threedrec.errors import InputError
from threedrec.lookup import configs_dir
from threedrec.recipes import choose_recipe, recipe_names

SHIPPED = sorted(configs_dir().glob("*.yaml"))

# The keys and values of the released project's 3drec/configs/nvsadapter.yaml.
RELEASED = r"""
name: "nvsadapter"
tag: "${data.random_camera.height}_${rmspace:${basename:${data.image_path}},_}_prog${data.random_camera.progressive_until}"
exp_root_dir: "./outputs"
seed: 0
data_type: "single-image-datamodule"
data:
  image_path: ./load/images/hamburger_rgba.png
  height: [128, 128, 512]
  width: [128, 128, 512]
  resolution_milestones: [2000, 5000]
  default_elevation_deg: 0.0
  default_azimuth_deg: 0.0
  default_camera_distance: 1.5
  default_fovy_deg: 49.1
  requires_depth: ${cmaxgt0orcmaxgt0:${system.loss.lambda_depth},${system.loss.lambda_depth_rel}}
  requires_normal: ${cmaxgt0:${system.loss.lambda_normal}}
  random_camera:
    height: [64, 64, 256]
    width: [64, 64, 256]
    batch_size: [16, 16, 8]
    resolution_milestones: ${data.resolution_milestones}
    eval_height: 512
    eval_width: 512
    eval_batch_size: 1
    elevation_range: [-10, 80]
    azimuth_range: [-180, 180]
    camera_distance_range: [ 1.5, 1.5 ]
    fovy_range: [49.1, 49.1]
    progressive_until: 0
    camera_perturb: 0.0
    center_perturb: 0.0
    up_perturb: 0.0
    light_position_perturb: 1.0
    light_distance_range: [7.5, 10.0]
    eval_elevation_deg: 15
    eval_camera_distance: ${data.default_camera_distance}
    eval_fovy_deg: ${data.default_fovy_deg}
    light_sample_strategy: "dreamfusion"
    batch_uniform_azimuth: False
    n_val_views: 30
    n_test_views: 120
system_type: "nvsadapter-system"
system:
  geometry_type: "implicit-volume"
  geometry:
    radius: 1.0
    normal_type: "analytic"
    density_bias: "blob_magic3d"
    density_activation: softplus
    density_blob_scale: 10.
    density_blob_std: 0.5
    pos_encoding_config:
      otype: HashGrid
      n_levels: 16
      n_features_per_level: 2
      log2_hashmap_size: 19
      base_resolution: 16
      per_level_scale: 1.447269237440378
    mlp_network_config:
      otype: "VanillaMLP"
      activation: "ReLU"
      output_activation: "none"
      n_neurons: 64
      n_hidden_layers: 2
  material_type: "diffuse-with-point-light-material"
  material:
    ambient_only_steps: 100000
    textureless_prob: 0.05
    albedo_activation: sigmoid
  background_type: "solid-color-background"
  renderer_type: "nerf-volume-renderer"
  renderer:
    radius: ${system.geometry.radius}
    num_samples_per_ray: 512
    return_comp_normal: ${gt0:${system.loss.lambda_normal_smooth}}
    return_normal_perturb: ${gt0:${system.loss.lambda_3d_normal_smooth}}
  prompt_processor_type: "dummy-prompt-processor"
  prompt_processor:
    pretrained_model_name_or_path: ""
    prompt: ""
  guidance_type: "nvsadapter-guidance"
  guidance:
    pretrained_model_name_or_path: "../checkpoints/base_query_4_step_200000.ckpt"
    pretrained_config: "../checkpoints/base_query_4.yaml"
    cond_image_path: ${data.image_path}
    cond_elevation_deg: ${data.default_elevation_deg}
    cond_azimuth_deg: ${data.default_azimuth_deg}
    cond_camera_distance: ${data.default_camera_distance}
    cond_fovy_deg: ${data.default_fovy_deg}
    guidance_scale: 3.0
    min_step_percent: 0.02
    max_step_percent: [0, 0.98, 0.5, 5000]
    num_query: 4
  freq:
    ref_only_steps: 0
    guidance_eval: 0
  loggers:
    wandb:
      enable: false
      project: "threestudio"
      name: None
  loss:
    lambda_sds: 0.1
    lambda_rgb: 500.
    lambda_mask: 50.
    lambda_depth: 0.
    lambda_depth_rel: 0.
    lambda_normal: 0.
    lambda_normal_smooth: 8.0
    lambda_3d_normal_smooth: 8.0
    lambda_orient: 1.0
    lambda_sparsity: 1.0
    lambda_opaque: 0.1
  optimizer:
    name: AdamW
    args:
      lr: 0.01
      betas: [0.9, 0.99]
      eps: 1.e-8
trainer:
  max_steps: 8000
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  val_check_interval: 200
  enable_progress_bar: true
  precision: 16-mixed
checkpoint:
  save_last: true
  save_top_k: -1
  every_n_train_steps: 200
"""  # noqa: E501


@pytest.fixture
def released(tmp_path):
    path = tmp_path / "released.yaml"
    path.write_text(RELEASED)
    return path


@pytest.fixture
def small(tmp_path):
    """A user's own config with a few keys."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\ndata:\n  image_path: a.png\n  random_camera:\n    batch_size: 4\ntrainer:\n  max_steps: 5\n"
    )
    return path


def problem(path, *overrides, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides, **kwargs)
    return str(caught.value)


def leaves(tree, path=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def reach(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_the_released_yaml_loads_with_every_value(released):
    config = load_config(released)
    register_resolvers()
    expected = OmegaConf.to_container(OmegaConf.load(released), resolve=True)
    checked = 0
    for key, value in leaves(expected):
        found = reach(config, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key
        checked += 1
    assert checked == 112
    assert config.tag == "[64, 64, 256]_hamburger_rgba.png_prog0"
    assert config.data.requires_depth is False and config.system.renderer.return_comp_normal is True
    assert config.system.guidance.max_step_percent == [0, 0.98, 0.5, 5000]
    assert isinstance(config.system.guidance.max_step_percent[3], int)
    assert config.recipe == "none"
    assert config.system.guidance.warm_start.enabled is False


def test_the_released_recipe_is_shipped_value_by_value(released):
    assert load_config(configs_dir() / "nvsadapter-released.yaml") == load_config(released)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(path).name in ("nvsadapter", path.stem)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_fits_the_config(recipe):
    config = load_config("configs/nvsadapter.yaml", [f"recipe={recipe}"])
    assert config.recipe == recipe
    # A recipe holds sizes and lengths; what a run is called and looks at is not its business.
    tree = OmegaConf.to_container(OmegaConf.load(configs_dir() / "recipes" / f"{recipe}.yaml"))
    assert set(tree) <= {"data", "system", "trainer", "checkpoint"}


def test_order_defaults_yaml_recipe_command_line():
    config = load_config("configs/nvsadapter.yaml", ["recipe=mini-cpu"])
    recipe = OmegaConf.load(configs_dir() / "recipes" / "mini-cpu.yaml")
    assert config.trainer.max_steps == recipe.trainer.max_steps
    assert config.system.loss.lambda_rgb == 500.0  # the YAML's
    assert config.trainer.num_sanity_val_steps == 0  # the default
    assert load_config("configs/nvsadapter.yaml", ["recipe=mini-cpu", "trainer.max_steps=7"]).trainer.max_steps == 7


def test_auto_recipe_follows_model_and_device(monkeypatch):
    class Guidance:
        @staticmethod
        def model_family(pretrained):
            return "mini" if pretrained in ("auto", "mini") else "released"

    monkeypatch.setattr(registry, "_registered", {("guidance", "fake"): Guidance})
    assert choose_recipe("fake", "auto", "cpu") == "mini-cpu"
    assert choose_recipe("fake", "mini", "cuda") == "mini-gpu"
    assert choose_recipe("fake", "released", "cuda") == "full-gpu"


def test_auto_recipe_is_chosen_and_recorded():
    overrides = ["system.guidance.pretrained=mini"]
    assert load_config("configs/nvsadapter.yaml", overrides, device_type="cpu").recipe == "mini-cpu"
    assert load_config("configs/nvsadapter.yaml", overrides, device_type="cuda").recipe == "mini-gpu"


def test_dump_round_trips_and_does_not_lay_the_recipe_again(tmp_path):
    config = load_config(
        "configs/nvsadapter.yaml",
        ["recipe=mini-cpu", "trainer.max_steps=7", "data.image_path=a ${b}.png".replace("$", "\\$")],
    )
    path = tmp_path / "configs" / "parsed.yaml"
    dump_config(config, path)
    again = load_config(path)
    config.resolved = True
    assert again == config
    assert again.recipe == "mini-cpu" and again.trainer.max_steps == 7
    assert load_config(path, ["recipe=mini-gpu"]).trainer.max_steps != 7


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("data.image_pth=a.png", "data.image_pth", "unknown key, did you mean 'data.image_path'?"),
        ("trainr.max_steps=3", "trainr", "unknown key, did you mean 'trainer'?"),
        ("system.loss.lambda_sprase=1", "system.loss.lambda_sprase", "did you mean 'system.loss.lambda_sparsity'?"),
        ("system.geometry.zzz=1", "system.geometry.zzz", "unknown key (known here: "),
        ("trainer.max_steps=many", "trainer.max_steps", "expected a whole number, got 'many'"),
        ("trainer.max_steps=2.5", "trainer.max_steps", "expected a whole number, got 2.5"),
        ("trainer.max_steps=true", "trainer.max_steps", "expected a whole number, got True"),
        ("trainer.max_steps=0", "trainer.max_steps", "must be at least 1, got 0"),
        ("trainer.enable_progress_bar=1", "trainer.enable_progress_bar", "expected true or false, got 1"),
        ("trainer.precision=8-bit", "trainer.precision", "expected one of 32-true, 16-mixed, bf16-mixed, got '8-bit'"),
        ("seed=-1", "seed", "must be at least 0, got -1"),
        ("system.optimizer.args.lr=0", "system.optimizer.args.lr", "must be greater than 0, got 0"),
        ("system.optimizer.args.lr=.nan", "system.optimizer.args.lr", "nan is not a finite number"),
        ("system.optimizer.args.betas=[0.9]", "system.optimizer.args.betas", "expected two numbers"),
        ("system.optimizer.name=SGD", "system.optimizer.name", "expected one of Adam, AdamW, got 'SGD'"),
        ("system.loss.lambda_rgb=[1, 2]", "system.loss.lambda_rgb", "[1, 2] is no schedule"),
        ("system.loss.lambda_rgb=[0, a, 1, 2]", "system.loss.lambda_rgb", "expected a number or a schedule"),
        ("system.guidance=3", "system.guidance", "expected a group of keys, got 3"),
        ("system.geometry_type=sphere", "system.geometry_type", "unknown geometry 'sphere'"),
        ("system_type=nvs-system", "system_type", "did you mean 'nvsadapter-system'?"),
        ("data_type=video", "data_type", "unknown data 'video'"),
        ("tag=${nope}", "tag", "'nope' not found"),
        ("tag=${add:1}", "tag", "missing 1 required"),
        ("recipe=mini", "recipe", "unknown recipe 'mini', did you mean 'mini-"),
        ("data.random_camera.batch_size=6", "data.random_camera.batch_size", "multiples of system.guidance.num_query"),
        ("max_steps", "'max_steps'", "expected key=value"),
        ("data.height[0]=3", "'data.height[0]=3'", "expected key=value"),
    ],
)
def test_mistakes_on_the_command_line(small, override, key, words):
    message = problem(small, override)
    assert message.startswith(f"command line: {key}: "), message
    assert words in message
    assert "\n" not in message


def test_mistakes_in_the_file_name_the_file(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("data: {random_camera: {batch_size: 8}}\ntrainer: {max_step: 3}\n")
    assert problem(path) == f"{path}: trainer.max_step: unknown key, did you mean 'trainer.max_steps'?"


def test_all_problems_are_listed_with_their_sources(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("seed: x\nsystem: {geometry_type: blob, freq: {n_reff: 1}}\n")
    message = problem(path, "trainer.max_steps=0", "sytem.loss.lambda_rgb=1")
    assert message.startswith("5 problems:")
    for line in (
        f"{path}: seed: expected a whole number, got 'x'",
        f"{path}: system.geometry_type: unknown geometry 'blob'",
        f"{path}: system.freq.n_reff: unknown key, did you mean 'system.freq.n_ref'?",
        "command line: trainer.max_steps: must be at least 1, got 0",
        "command line: sytem: unknown key, did you mean 'system'?",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "duplicate"),
        (b"- 1\n- 2\n", "expected keys and values"),
        (b"\xff\xfe\x00\x01", "not"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = problem(path)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


def test_missing_file_and_folder(tmp_path):
    assert problem(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: no such config file; the shipped ones are in configs/"
    assert "is a folder" in problem(tmp_path)


def test_a_component_brings_its_own_keys(small, tmp_path):
    config = load_config(small, ["system.background_type=neural-environment-map-background"])
    expected = registry.config_class("background", "neural-environment-map-background")
    assert type(config.system.background) is expected


def test_parameter_groups_are_typed(small):
    config = load_config(small, ["system.optimizer.params={geometry.encoding: {lr: 1}}"])
    assert config.system.optimizer.params["geometry.encoding"].lr == 1.0
    assert "system.optimizer.params.geometry.rate" in problem(small, "system.optimizer.params={geometry: {rate: 1}}")


def test_ignored_keys_warn_only_when_they_say_something(small, released, caplog):
    with caplog.at_level(logging.WARNING):
        load_config(released)
        assert not caplog.records
        load_config(
            small, ["system.loggers.wandb.enable=true", "system.prompt_processor.prompt=a chair", "description=x"]
        )
    assert "system.loggers.wandb.enable is ignored" in caplog.text
    assert "system.prompt_processor.prompt is ignored" in caplog.text
    assert "description is ignored" in caplog.text


def test_paths_are_looked_up_from_the_root_of_the_repository(repository, monkeypatch):
    monkeypatch.chdir(repository / "3drec")
    # Any file that stands in the root alone will do for an image.
    config = load_config("configs/nvsadapter.yaml", ["recipe=none", "data.image_path=./constraints.txt"])
    assert Path(config.data.image_path) == repository / "constraints.txt"
