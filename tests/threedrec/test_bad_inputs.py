"""Everything that people get wrong ends in exit code 2 and a last line on stderr that names what to put right.

All cases go through the real command; what reaches a stage runs with a tiny model.
"""

import errno
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from threedrec import cli
from threedrec.checkpoint import Checkpoint, save_checkpoint

TINY = (
    "recipe=mini-cpu",
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "system.guidance.warm_start.enabled=false",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.geometry.pos_encoding_config.log2_hashmap_size=8",
)
as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, repository):
    """A tiny model with random weights, in the layout of the embedded one."""
    sys.path.insert(0, str(repository / "tests" / "nvsadapter_guidance"))
    from tiny_nvs import tiny_nvs_model

    folder = tmp_path_factory.mktemp("model")
    tiny_nvs_model().save(folder)
    return folder


@pytest.fixture
def launch(tmp_path, repository, model_folder, monkeypatch, capsys):
    """Run launch.py in this process and return the last line of stderr, after checking how it ended."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, config: str = "configs/nvsadapter.yaml", mode: tuple[str, ...] = ("--train",)) -> str:
        defaults = (
            f"data.image_path={repository / 'load' / 'images' / 'chair.png'}",
            f"exp_root_dir={tmp_path / 'outputs'}",
            f"system.guidance.pretrained={model_folder}",
        )
        gpu = () if "--gpu" in arguments else ("--gpu", "cpu")
        command = ["--config", config, *mode, *gpu, *defaults, *TINY, *arguments]
        return last_line(cli.launch_main, command, capsys)

    return run


def last_line(command: Callable[[list[str]], int], arguments: list[str], capsys) -> str:
    try:
        code: int | str | None = command(arguments)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.rstrip().splitlines()
    assert code == 2, lines
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


def encoded(size: tuple[int, int] = (64, 64), fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, fmt)
    return buffer.getvalue()


def busy() -> bytes:
    """A patchwork of colours, as unlike a plain background as can be."""
    patches = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(patches.repeat(12, axis=0).repeat(12, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


def rgba(alpha: np.ndarray | int) -> bytes:
    pixels = np.full((64, 64, 4), 90, dtype=np.uint8)
    pixels[..., 3] = alpha
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def nearly_full() -> np.ndarray:
    alpha = np.full((64, 64), 255)
    alpha[0, :4] = 0
    return alpha


def one_pixel() -> np.ndarray:
    alpha = np.zeros((64, 64))
    alpha[30, 30] = 255
    return alpha


IMAGES = {
    "empty file": (b"", "the file is empty"),
    "text renamed": (b"I am not a picture", "not an image"),
    "truncated PNG": (encoded()[:700], "damaged or cut short"),
    "truncated JPEG": (encoded(fmt="JPEG")[:700], "damaged or cut short"),
    "unsupported format": (encoded(fmt="GIF"), "GIF files are not supported"),
    "1x1": (encoded((1, 1)), "too few"),
    "8 pixels high": (encoded((200, 8)), "too few"),
    "aspect 30:1": (encoded((600, 20)), "narrower than 20:1"),
    "all transparent": (rgba(0), "covers 0.00%"),
    "faint everywhere": (rgba(100), "covers 0.00%"),
    "one pixel of object": (rgba(one_pixel()), "covers 0.02%"),
    "object everywhere": (rgba(nearly_full()), "covers 99.9%"),
    "no foreground": (rgba(255), "no object stands out"),
    "background not plain": (busy(), "the background is not plain"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(launch, tmp_path, case):
    content, words = IMAGES[case]
    image = tmp_path / "photo.png"
    image.write_bytes(content)
    plain = ["data.segmentation=plain"] if case in ("no foreground", "background not plain") else []
    line = launch(f"data.image_path={image}", *plain)
    assert line.startswith("error: ") and "photo.png" in line and words in line
    assert not list(tmp_path.glob("outputs/**/*.glb"))


def test_image_that_is_missing_or_a_folder(launch, tmp_path):
    assert "data.image_path: no/photo.png: no such file" in launch("data.image_path=no/photo.png")
    assert f"data.image_path: {tmp_path}: is a folder" in launch(f"data.image_path={tmp_path}")
    assert "data.image_path: no image given" in launch("data.image_path=")


@as_root
def test_image_that_may_not_be_read(launch, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded())
    (tmp_path / "photo.png").chmod(0)
    assert "photo.png: cannot be read: permission denied" in launch(f"data.image_path={tmp_path / 'photo.png'}")


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.requires_depth=true", "chair_depth.png: no such file"),
        ("system.loss.lambda_depth=0.1", "chair_depth.png: no such file"),
        ("data.requires_normal=true", "chair_normal.png: no such file"),
        ("data.mask_path=mask.png", "mask.png: no such file"),
        ("data.segmentation=alpha", "pear_on_grey.jpg: has no transparency"),
    ],
)
def test_files_beside_the_image(launch, repository, override, words):
    image = f"data.image_path={repository / 'load' / 'images' / 'pear_on_grey.jpg'}"
    assert words in launch(override, *([image] if "alpha" in override else []))


KEYS = {
    "misspelt at the top": ("sytem.seed=1", "sytem"),
    "misspelt inside": ("system.loss.lambda_sprase=1", "system.loss.lambda_sprase: unknown key, did you mean"),
    "misspelt in a component": ("system.geometry.n_feature=3", "system.geometry.n_feature: unknown key"),
    "not a number": ("trainer.max_steps=many", "trainer.max_steps: expected a whole number"),
    "fraction for a count": ("trainer.max_steps=1.5", "trainer.max_steps: expected a whole number"),
    "not a switch": ("data.recenter=perhaps", "data.recenter"),
    "group for a value": ("data.fill={a: 1}", "data.fill"),
    "value for a group": ("system.loss=3", "system.loss: expected a group of keys"),
    "too large": ("data.fill=3", "data.fill"),
    "too small": ("data.default_camera_distance=0", "data.default_camera_distance"),
    "negative steps": ("trainer.max_steps=-1", "trainer.max_steps"),
    "not a number at all": ("system.optimizer.args.lr=.nan", "system.optimizer.args.lr"),
    "not one of the choices": ("data.segmentation=magic", "data.segmentation"),
    "lists of different lengths": ("data.height=[64,96,128]", "data"),
    "range the wrong way round": ("data.random_camera.elevation_range=[80,-10]", "elevation_range"),
    "empty batch": ("data.random_camera.batch_size=0", "data.random_camera"),
    "short schedule": ("system.guidance.max_step_percent=[0,0.98]", "system.guidance.max_step_percent"),
    "schedule back in time": ("system.loss.lambda_sds=[9,1.0,0.5,3]", "system.loss.lambda_sds"),
    "unknown geometry": ("system.geometry_type=cube", "system.geometry_type: unknown geometry 'cube'"),
    "unknown material": ("system.material_type=wood", "system.material_type: unknown material 'wood'"),
    "unknown background": ("system.background_type=sky", "system.background_type: unknown background 'sky'"),
    "unknown renderer": ("system.renderer_type=ink", "system.renderer_type: unknown renderer 'ink'"),
    "unknown guidance": ("system.guidance_type=muse", "system.guidance_type: unknown guidance 'muse'"),
    "unknown exporter": ("system.exporter_type=stl", "system.exporter_type: unknown exporter 'stl'"),
    "unknown system": ("system_type=solar", "system_type: unknown system 'solar'"),
    "unknown data": ("data_type=video", "data_type: unknown data 'video'"),
    "unknown recipe": ("recipe=cake", "recipe: unknown recipe 'cake'"),
    "reference to nothing": ("tag=${no.such.key}", "tag"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys(launch, case):
    override, words = KEYS[case]
    line = launch(override)
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("text", ["oops", "=5", "trainer.max_steps", "--steps=4"])
def test_overrides_that_are_none(launch, text):
    assert text in launch(text)


CONFIGS = {
    "malformed": (b"data: [unclosed\nname: x", "not valid YAML"),
    "a list": (b"- data\n- system\n", "expected keys and values"),
    "plain text": (b"hello", "hello: unknown key"),
    "not text": (b"\xff\xfe\x00\x81" * 9, "not a text file"),
    "misspelt key": (b"traner:\n  max_steps: 3\n", "traner: unknown key, did you mean 'trainer'?"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_files(launch, tmp_path, case):
    content, words = CONFIGS[case]
    (tmp_path / "my.yaml").write_bytes(content)
    line = launch("recipe=none", config=str(tmp_path / "my.yaml"))
    assert "my.yaml" in line and words in line


def test_config_file_that_is_missing_or_a_folder(launch, tmp_path):
    assert "configs/nvsadaptor.yaml: no such config file" in launch(config="configs/nvsadaptor.yaml")
    assert f"{tmp_path}: is a folder" in launch(config=str(tmp_path))


def test_modes(launch):
    assert "--train" in launch(mode=())
    assert "--test" in launch(mode=("--train", "--test"))
    assert "resume: no checkpoint to export" in launch(mode=("--export",))


def test_command_lines_of_run(capsys, tmp_path, repository):
    image = str(repository / "load" / "images" / "chair.png")
    assert "IMG" in last_line(cli.main, ["run", "-o", str(tmp_path)], capsys)
    assert "-o" in last_line(cli.main, ["run", image], capsys)
    assert "no-such.png: no such file" in last_line(cli.main, ["run", "no-such.png", "-o", str(tmp_path)], capsys)
    assert "photo.png" in last_line(cli.main, ["run", image, "photo.png", "-o", str(tmp_path)], capsys)
    assert "'rnu'" in last_line(cli.main, ["rnu", image], capsys)


def test_devices(launch, monkeypatch):
    assert "--gpu first" in launch("--gpu", "first")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--gpu 7: no GPU 7" in launch("--gpu", "7")


def test_output_below_a_file(launch, tmp_path, capsys, repository):
    (tmp_path / "taken").write_text("")
    assert "taken" in launch(f"exp_root_dir={tmp_path / 'taken'}")
    image = str(repository / "load" / "images" / "chair.png")
    line = last_line(cli.main, ["run", image, "-o", str(tmp_path / "taken"), "--gpu", "cpu"], capsys)
    assert "taken: cannot be written" in line


@as_root
def test_output_without_permission(launch, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in launch(f"exp_root_dir={tmp_path / 'locked'}")


def test_output_that_holds_another_run(launch, tmp_path):
    (tmp_path / "mine" / "configs").mkdir(parents=True)
    (tmp_path / "mine" / "configs" / "parsed.yaml").write_text("name: x\n")
    assert f"{tmp_path / 'mine'}: holds a run already" in launch(f"trial_dir={tmp_path / 'mine'}")


@pytest.mark.parametrize("moment", ["at the first file", "at the checkpoint"])
def test_full_disk(launch, tmp_path, monkeypatch, moment):
    """Every file is flushed before it is renamed; there a full disk shows at the latest."""
    genuine, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        if moment == "at the first file" or ".ckpt" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell files by their handles")
    monkeypatch.setattr(os, "fsync", fsync)
    line = launch()
    assert str(tmp_path / "outputs") in line and "the disk is full" in line and calls
    assert not list(tmp_path.glob("outputs/**/*.tmp*"))


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def not_finite(path: Path) -> None:
    save_checkpoint(path, Checkpoint("prepare", 0, model={"geometry.table": torch.tensor([1.0, float("nan")])}))


def of_another_config(path: Path) -> None:
    save_checkpoint(path, Checkpoint("prepare", 0, model={"something.else": torch.zeros(3)}))


def cut_short(path: Path) -> None:
    not_finite(path)
    path.write_bytes(path.read_bytes()[:300])


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 99),
    "cut short": cut_short,
    "another program's": lambda path: torch.save({"state_dict": {}}, path),
    "hostile": lambda path: path.write_bytes(pickle.dumps(Payload())),
    "not finite": not_finite,
    "of another config": of_another_config,
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(launch, tmp_path, case):
    path = tmp_path / "run" / "ckpts" / "old.ckpt"
    path.parent.mkdir(parents=True)
    CHECKPOINTS[case](path)
    line = launch(f"resume={path}")
    assert line.startswith("error: ") and "old.ckpt" in line
    assert not (tmp_path / "owned").exists()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def nan_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "model.safetensors")


def renamed_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


WEIGHTS = {
    "missing": (without_weights, "model.safetensors"),
    "cut short": (cut_weights, "model.safetensors"),
    "not finite": (nan_weights, "model.safetensors"),
    "of another model": (renamed_weights, "model.safetensors"),
    "broken config": (broken_config, "config.json"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(launch, tmp_path, model_folder, case):
    spoil, name = WEIGHTS[case]
    spoil(Path(shutil.copytree(model_folder, tmp_path / "weights")))
    line = launch(f"system.guidance.pretrained={tmp_path / 'weights'}")
    assert line.startswith("error: ") and f"weights/{name}" in line


def test_released_weights_that_are_missing(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    line = launch("system.guidance.pretrained=released")
    for words in ("error: weights: ", "base_query_4_step_200000.ckpt", "GB", "3drec weights download"):
        assert words in line
    assert "weights: none at 'no/such'" in launch("system.guidance.pretrained=no/such")


def test_the_script_itself(repository, tmp_path):
    image = tmp_path / "cut.png"
    image.write_bytes(encoded()[:700])
    command = [sys.executable, "launch.py", "--config", "configs/nvsadapter.yaml", "--train", "--gpu", "cpu"]
    values = [f"data.image_path={image}", f"exp_root_dir={tmp_path}", "recipe=mini-cpu"]
    done = subprocess.run([*command, *values], cwd=repository / "3drec", capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {image}: the image is damaged or cut short")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "system.guidance.pretrained_config=a.yaml",
            "system.guidance.pretrained_config: goes with a released checkpoint",
        ),
        ("system.guidance.pose_convention=released-sampling", "model knows training alone"),
    ],
)
def test_a_guidance_that_is_refused_leaves_no_run_behind(launch, tmp_path, option, words):
    (tmp_path / "a.yaml").touch()
    assert words in launch(option)
    assert not list(tmp_path.glob("outputs/*/*"))
