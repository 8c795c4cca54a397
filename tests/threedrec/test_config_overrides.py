"""Overrides of the command line, interpolations and the functions that they may call."""

import pytest
from omegaconf import OmegaConf

from threedrec.config import load_config
from threedrec.config_resolvers import RESOLVERS, register_resolvers
from threedrec.recipes import recipe_names


@pytest.fixture
def small(tmp_path):
    """A user's own config with a few keys."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\ndata:\n  image_path: a.png\n  random_camera: {batch_size: 4}\ntrainer:\n  max_steps: 5\n"
    )
    return path


def test_text_is_taken_letter_by_letter(small):
    for text in ("1.png", "a: b.png", "[x].png", "{y}.png", "yes", "#1.png", "a=b.png"):
        assert load_config(small, [f"data.image_path={text}"]).data.image_path == text
    assert load_config(small, ["tag=007"]).tag == "007"
    assert load_config(small, ["resume=null"]).resume is None
    odd = "${odd} name.png"
    assert load_config(small, values={"data": {"image_path": odd}}).data.image_path == odd


def test_interpolation_sees_defaults_and_overrides(small):
    assert load_config(small, ["tag=${data.image_path}_${trainer.max_steps}", "trainer.max_steps=9"]).tag == "a.png_9"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_needs_nothing_of_the_file(small, recipe):
    config = load_config(small, [f"recipe={recipe}"])
    assert config.data.random_camera.resolution_milestones == config.data.resolution_milestones != []


def test_a_loss_weight_with_a_schedule_asks_for_normals():
    for schedule, expected in (("[0,8.0,1.0,500]", True), ("[0,0.0,500]", False)):
        override = f"system.loss.lambda_normal_smooth={schedule}"
        assert load_config("configs/nvsadapter.yaml", [override]).system.renderer.return_comp_normal is expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("${add:2,3}", 5),
        ("${sub:2,3}", -1),
        ("${mul:2,3.5}", 7.0),
        ("${div:7,2}", 3.5),
        ("${idiv:7,2}", 3),
        ("${basename:a/b c.png}", "b c.png"),
        ("${stem:a/b c.png}", "b c"),
        ("${rmspace:${basename:a/b c d.png},_}", "b_c_d.png"),
        ("${tuple2:3}", [3.0, 3.0]),
        ("${gt0:0}", False),
        ("${gt0:0.1}", True),
        ("${gt0:[0,8.0,1.0,500]}", True),
        ("${gt0:[0,0.0,0.0,500]}", False),
        ("${cmaxgt0:0}", False),
        ("${cmaxgt0:[0,0,0.05,100]}", True),
        ("${cmaxgt0:[0,0.0,100]}", False),
        ("${cmaxgt0:[0,0,0,10,3,20]}", True),
        ("${cmaxgt0orcmaxgt0:0,[0,1,0,5]}", True),
        ("${cmaxgt0orcmaxgt0:0,0}", False),
        ("${not:true}", False),
        ("${calc_exp_lr_decay_rate:0.01,2}", 0.1),
    ],
)
def test_resolvers(expression, expected):
    register_resolvers()
    value = OmegaConf.to_container(OmegaConf.create({"x": expression}), resolve=True)["x"]
    assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_every_resolver_of_threestudio_is_there():
    assert set(RESOLVERS) >= {
        "calc_exp_lr_decay_rate",
        "add",
        "sub",
        "mul",
        "div",
        "idiv",
        "basename",
        "rmspace",
        "tuple2",
        "gt0",
        "cmaxgt0",
        "not",
        "cmaxgt0orcmaxgt0",
    }
