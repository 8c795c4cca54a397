"""``3drec views`` and the released script's command line: exact files, order, repetition, mistakes."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvsadapter_guidance import weights
from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from threedrec import cli
from threedrec.errors import InputError
from threedrec.view_files import orbit_order, view_name
from threedrec.views import ViewsJob, check_views, choose_dtype

OTHERS = ["orbit.mp4", "sheet.png", "views.json"]


@pytest.fixture(scope="module")
def model(repository, tmp_path_factory) -> Path:
    """A folder with a tiny model."""
    sys.path.insert(0, str(repository / "tests" / "nvsadapter_guidance"))
    from tiny_nvs import tiny_nvs_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_nvs_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def released(repository, tmp_path_factory) -> Path:
    """A tiny checkpoint in the released layout, its YAML file beside it."""
    sys.path.insert(0, str(repository / "tests" / "nvsadapter_guidance"))
    from tiny_checkpoints import write_released

    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def image(tmp_path) -> Path:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[8:32, 12:28] = (200, 60, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "box.png")
    return tmp_path / "box.png"


@pytest.fixture
def command(model, image, tmp_path, capsys):
    """Run ``3drec views``; returns the exit code, the last line of stderr and the folder."""

    def run(*arguments, path=image, output="out"):
        folder = tmp_path / output
        words = ["views", str(path), "-o", str(folder), "--model", str(model), "--gpu", "cpu", "--steps", "2"]
        try:
            code = cli.main([*words, *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.strip().splitlines()[-1:], folder

    return run


@pytest.fixture
def script(repository, model, monkeypatch, capsys):
    """Run the script with the tiny model standing in for the embedded one."""
    monkeypatch.setattr(weights, "MINI_MODEL", model)
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(model / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(model / "none"))

    def run(*arguments):
        path = repository / "scripts" / "novel_view_sampling.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1:]

    return run


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def pixels(folder: Path, index: int) -> np.ndarray:
    return np.asarray(Image.open(folder / view_name(index)))


def test_the_files_are_exactly_these(command, model, image):
    code, _, folder = command()
    assert code == 0 and names(folder) == [view_name(i) for i in range(8)] + OTHERS
    record = json.loads((folder / "views.json").read_text())
    assert [view["azimuth"] for view in record["views"]] == [0, 45, 90, 135, 180, 225, 270, 315]
    views = [record.pop("views")[7], record.pop("seconds") > 0]
    assert views == [{"file": "007.png", "elevation": 0, "azimuth": 315, "distance": 1.5}, True]
    assert record == {
        "image": str(image),
        "model": "tiny",
        "weights": str(model),
        "use_ema": None,
        "pose_convention": "training",
        "prompt": "",
        "scheduler": "euler",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "noise_scale": 1.0,
        "num_query": 4,
        "seed": 0,
        "resolution": 32,
        "device": "cpu",
        "dtype": "float32",
    }
    assert pixels(folder, 0).shape == (32, 32, 3)
    assert Image.open(folder / "sheet.png").size[0] > 3 * 128


def test_a_damaged_checkpoint_is_one_line_and_leaves_no_folder(released, image, tmp_path, capsys):
    damaged = tmp_path / "cut.ckpt"
    damaged.write_bytes(released.read_bytes()[:5000])
    code = cli.main(["views", str(image), "-o", str(tmp_path / "out"), "--model", str(damaged), "--gpu", "cpu"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line.startswith(f"error: {damaged}: is truncated") and not (tmp_path / "out").exists()


def test_a_seed_repeats_the_views(command):
    first, again, other = (
        command("--count", "2", "--seed", seed, output=name)[2] for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert np.array_equal(pixels(first, 1), pixels(again, 1))
    assert not np.array_equal(pixels(first, 1), pixels(other, 1))


def test_fewer_views_take_the_place_of_earlier_ones_and_leave_other_files(command):
    _, _, folder = command()
    (folder / "123.png").write_bytes(b"mine")
    code, _, _ = command("--elevations", "0", "-20", "--azimuths", "30", "-60", "--distances", "1.5", "2")
    assert code == 0 and names(folder) == ["000.png", "001.png", "123.png", *OTHERS]


def test_weights_are_found_where_weights_are_looked_for(command, model, monkeypatch):
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(model.parent))
    code, (line,), folder = command("--count", "1", "--model", f"some/{model.name}")
    assert code == 0 and json.loads((folder / "views.json").read_text())["weights"] == str(model)
    assert "1 view in " in line


def test_resolution_and_scheduler(command):
    code, _, folder = command("--count", "1", "--resolution", "48", "--scheduler", "unipc", "--num-query", "1")
    assert code == 0 and pixels(folder, 0).shape == (48, 48, 3)
    assert json.loads((folder / "views.json").read_text())["scheduler"] == "unipc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--elevations", "0", "0", "--azimuths", "30"], "2 given beside 1 --azimuths"),
        (["--azimuths", "30", "60", "--distances", "1.5"], "2 azimuths, 1 distances"),
        (["--count", "0"], "ask for one or more"),
        (["--count", "3", "--azimuths", "30"], "leave out"),
        (["--azimuths", "left"], "invalid float value: 'left'"),
        (["--elevations", "95"], "between -90 and 90"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--steps", "1001"], "use 1 to 1000"),
        (["--num-query", "0"], "num_query is 0"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0"),
        (["--scheduler", "heun"], "use one of euler, ddim, dpm\\+\\+, unipc"),
        (["--dtype", "fp16"], "no fast half precision"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--offload", "disk"], "--offload disk"),
        (["--resolution", "3"], "--resolution 3"),
        (["--model", "nowhere"], "error: weights: none at 'nowhere'"),
        (["--model-config", "nope.yaml"], "configuration nope.yaml: goes with a released checkpoint alone"),
        (["--raw"], "--raw: goes with a released checkpoint alone"),
        (["--pose-convention", "released-sampling"], "released-sampling is a property of the released"),
        (["--elevation", "3"], "unknown argument --elevation"),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, words):
    code, (line,), folder = command(*arguments)
    assert code == 2 and line.startswith("error: ")
    assert re.search(words, line)
    assert not folder.exists()


def test_bad_images_end_in_one_line(command, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path, words in (("missing.png", "no such file"), (".", "is a folder"), ("text.png", "not an image")):
        code, (line,), folder = command(path=tmp_path / path)
        assert code == 2 and words in line and not folder.exists()


def test_a_view_never_takes_the_place_of_the_input(command, image, tmp_path):
    (tmp_path / "out").mkdir()
    own = tmp_path / "out" / "001.png"
    own.write_bytes(image.read_bytes())
    code, (line,), _ = command(path=own)
    assert code == 2 and "a view would take its place" in line and own.read_bytes() == image.read_bytes()


def test_the_released_line_works_without_the_files(script, image, tmp_path):
    line = ["--name", "nvs", "--input_image_path", image, "--elevations", 0, 0, 0, 0, "--azimuths", 30, 60, 90, 120]
    code, _ = script(*line, "--cfg_scale", "3.0", "--use_ema", "--logdir", tmp_path / "log", "--steps", 1)
    assert code == 0 and names(tmp_path / "log") == ["000.png", "001.png", "002.png", "003.png", *OTHERS]
    record = json.loads((tmp_path / "log" / "views.json").read_text())
    assert record["guidance_scale"] == 3.0 and [v["azimuth"] for v in record["views"]] == [30, 60, 90, 120]


def test_the_released_line_works_with_the_files(script, released, image, tmp_path):
    line = ["--name", "nvs", "--input_image_path", image, "--elevations", 0, 0, 0, 0, "--azimuths", 30, 60, 90, 120]
    files = ["--config_path", released.with_name("tiny.yaml"), "--ckpt_path", released]
    results = {}
    for name, more in (("ema", ["--use_ema"]), ("again", ["--use_ema"]), ("raw", []), ("large", ["--resolution", 128])):
        folder = tmp_path / name
        code, _ = script(*line, *files, "--cfg_scale", "3.0", "--steps", 2, "--logdir", folder, *more)
        assert code == 0 and names(folder) == ["000.png", "001.png", "002.png", "003.png", *OTHERS]
        results[name] = pixels(folder, 3)
    assert np.array_equal(results["ema"], results["again"]) and not np.array_equal(results["ema"], results["raw"])
    assert results["raw"].shape == (64, 64, 3) and results["large"].shape == (128, 128, 3)
    assert json.loads((tmp_path / "ema" / "views.json").read_text())["model"].startswith("nvs-adapter")


def test_a_resolution_that_the_network_cannot_take_is_named_before_anything_is_read(
    script, released, image, monkeypatch
):
    monkeypatch.setattr("threedrec.views.load_pipeline", None)
    line = ["--input_image_path", image, "--elevations", 0, "--azimuths", 0, "--ckpt_path", released, "--steps", 1]
    code, (last,) = script(*line, "--resolution", 100)
    assert code == 2 and "--resolution is 100; use a multiple of 16" in last


@pytest.fixture
def sampled(monkeypatch) -> list:
    """Arguments and results of the pipeline's calls."""
    calls, original = [], NVSAdapterPipeline.__call__

    def spy(pipeline, *arguments, **options):
        result = original(pipeline, *arguments, **options)
        calls.append((pipeline, arguments, options, result[0]))
        return result

    monkeypatch.setattr(NVSAdapterPipeline, "__call__", spy)
    return calls


def test_the_script_samples_as_released(script, sampled, released, image, tmp_path):
    """The image raw with its alpha, neighbours in groups, float32, the fraction of a byte cut off."""
    line = ["--input_image_path", image, "--elevations", *[0] * 5, "--azimuths", *range(0, 150, 30)]
    assert script(*line, "--ckpt_path", released, "--steps", 1, "--logdir", tmp_path / "log")[0] == 0
    ((pipeline, arguments, options, views),) = sampled
    assert arguments[0].mode == "RGBA" and np.array_equal(arguments[0], Image.open(image))
    assert options["rotating_groups"] is False and options["num_query"] is None
    assert options["guidance_scale"] == 3.0 and options["prompt"] == ""
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    written = np.stack([pixels(tmp_path / "log", i) for i in range(5)])
    assert np.array_equal(written, np.floor(views * 255)) and not np.array_equal(written, np.rint(views * 255))
    record = json.loads((tmp_path / "log" / "views.json").read_text())
    assert record["weights"] == str(released) and record["use_ema"] is False and record["resolution"] == 64


def test_the_command_rounds_and_frames_with_released_weights_too(command, sampled, released):
    code, _, folder = command("--count", "2", "--model", str(released))
    ((_, arguments, options, views),) = sampled
    assert code == 0 and options["rotating_groups"] is True
    assert arguments[0].mode == "RGB" and arguments[0].size == (512, 512)
    assert np.array_equal(pixels(folder, 1), np.floor(views[1] * 255 + np.float32(0.5)))
    assert json.loads((folder / "views.json").read_text())["use_ema"] is True


def test_the_scripts_other_flags(script, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["-n", "spin", "-c", 1, "--num_query", 2, "--resolution", 40, "--prompt", "", "--seed", 4, "--steps", 1]
    code, _ = script("--input_image_path", image, "--elevations", -10, 0, 10, "--azimuths", -30, 0, 400, *flags)
    folder = tmp_path / "logs_viz" / "spin_box"
    assert code == 0 and names(folder) == ["000.png", "001.png", "002.png", *OTHERS]
    assert pixels(folder, 2).shape == (40, 40, 3)


def test_the_scripts_mistakes_end_in_one_line(script, image):
    line = ["--input_image_path", image, "--elevations", 0, "--azimuths", 0]
    for more, words in (
        (["--ckpt_path", "base.ckpt"], "--ckpt_path base.ckpt: no such file"),
        (["--ckpt_path", ""], "--ckpt_path : no such file"),
        (["--config_path", "base.yaml"], "--config_path base.yaml: no such file"),
        (["--azimuths", 0, 30], "1 given beside 2"),
        (["--input_image_path", "none.png"], "none.png: no such file"),
        (["--num_query", 0], "num_query is 0"),
        (["--config_path", image], f"configuration {image}: goes with a released checkpoint alone"),
    ):
        code, (last,) = script(*line, *more)
        assert code == 2 and last.startswith("error: ") and words in last


def test_only_released_weights_outside_the_script_are_halved_and_only_on_a_gpu():
    job, script_job, cuda = ViewsJob("a", "b"), ViewsJob("a", "b", as_released=True), torch.device("cuda")
    assert choose_dtype(job, "released", cuda) == torch.float16
    for case in ((script_job, "released", cuda), (job, "mini", cuda), (job, "released", torch.device("cpu"))):
        assert choose_dtype(*case) == torch.float32


def test_angles_left_out_are_spread_around():
    assert check_views(ViewsJob("a", "b", count=4)) == ([0.0] * 4, [0.0, 90.0, 180.0, 270.0])
    assert check_views(ViewsJob("a", "b", azimuths=[5, 6])) == ([0.0, 0.0], [5, 6])
    assert check_views(ViewsJob("a", "b", elevations=[10, 20])) == ([10, 20], [0.0, 180.0])
    with pytest.raises(InputError):
        check_views(ViewsJob("a", "b", elevations=[], azimuths=[]))


def test_the_orbit_goes_around_or_back_and_forth():
    assert orbit_order([90, 0, 270, 180]) == [1, 0, 3, 2]
    assert orbit_order([30, 60, 90, 120]) == [0, 1, 2, 3, 2, 1]
    # Across azimuth 0: the widest gap lies behind the object.
    assert orbit_order([30, -30, 0]) == [1, 2, 0, 2]
    assert orbit_order([10]) == [0]
