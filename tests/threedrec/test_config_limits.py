"""Values that a run could not use are refused with the config; keys that do nothing say so."""

import logging

import pytest
from tiny_run import tiny_config, write_inputs

from threedrec.errors import InputError

CAMERA = "data.random_camera"


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        (f"{CAMERA}.n_val_views", 0, 1),
        (f"{CAMERA}.n_test_views", 0, 1),
        (f"{CAMERA}.eval_batch_size", 0, 1),
        (f"{CAMERA}.eval_height", 15, 16),
        (f"{CAMERA}.eval_width", 15, 16),
        (f"{CAMERA}.eval_fovy_deg", 0.0, 1.0),
        (f"{CAMERA}.eval_fovy_deg", 180.0, 179.0),
        ("system.geometry.pos_encoding_config.per_level_scale", 0.9, 1.0),
        ("system.renderer.occupancy_decay", -0.1, 0.0),
        ("system.renderer.occupancy_decay", 1.1, 1.0),
    ],
)
def test_limits_hold_where_they_stand(tmp_path, key, bad, good):
    config = write_inputs(tmp_path)
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        tiny_config(config, f"{key}={bad}")
    tiny_config(config, f"{key}={good}")


@pytest.mark.parametrize(
    ("key", "meant", "harmless"),
    [
        ("system.geometry.isosurface_resolution", 256, 128),
        ("system.geometry.isosurface_method", "mc", "mt"),
        ("system.geometry.isosurface_threshold", 10.0, "auto"),
        ("system.geometry.isosurface_remove_outliers", "false", "true"),
        ("system.exporter.context_type", "cuda", "gl"),
    ],
)
def test_a_key_that_does_nothing_warns_when_it_asks_for_something(tmp_path, caplog, key, meant, harmless):
    config = write_inputs(tmp_path)
    with caplog.at_level(logging.WARNING):
        tiny_config(config, f"{key}={harmless}", "system.renderer.return_comp_normal=true")
        assert "is ignored" not in caplog.text
        tiny_config(config, f"{key}={meant}")
    assert f"{key} is ignored" in caplog.text
