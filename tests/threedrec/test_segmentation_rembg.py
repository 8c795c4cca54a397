"""rembg is used when it is there and works, and replaced when it does not."""

import builtins
import importlib.util
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threedrec.errors import InputError
from threedrec.preprocess import cut_out, read_rgba

SIZE = 64


def picture(background: float | None = 1.0) -> np.ndarray:
    """A dark square; before noise when there is no background."""
    noise = np.random.default_rng(0).random((SIZE, SIZE, 3))
    rgba = np.ones((SIZE, SIZE, 4), dtype=np.float32)
    rgba[..., :3] = noise if background is None else background
    rgba[16:48, 16:48, :3] = 0.2
    return rgba


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """Commands that ran before may have taken the log away from the root logger, where caplog listens."""
    monkeypatch.setattr(logging.getLogger("threedrec"), "propagate", True)


@pytest.fixture
def fake_rembg(monkeypatch):
    """A rembg that marks the upper left quarter; ``calls`` records what it was asked."""
    calls = []

    def new_session(name, **options):
        calls.append((name, options, os.environ.get("U2NET_HOME")))
        return "session"

    def remove(image, session, only_mask):
        assert isinstance(image, Image.Image) and session == "session" and only_mask
        mask = np.zeros((image.height, image.width), dtype=np.uint8)
        mask[: image.height // 2, : image.width // 2] = 255
        return Image.fromarray(mask)

    module = types.ModuleType("rembg")
    module.new_session, module.remove, module.calls = new_session, remove, calls
    monkeypatch.setitem(sys.modules, "rembg", module)
    return module


@pytest.fixture
def no_rembg(monkeypatch):
    monkeypatch.delitem(sys.modules, "rembg", raising=False)
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "rembg":
            raise ModuleNotFoundError("No module named 'rembg'", name="rembg")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("method", ["auto", "rembg"])
def test_its_mask_is_used(fake_rembg, method):
    alpha = cut_out(picture(), method, "x.jpg")[..., 3]
    assert alpha[:32, :32].min() == 1 and alpha.mean() == 0.25
    assert [call[:2] for call in fake_rembg.calls] == [("u2net", {})]


def test_networks_in_files_go_through_its_custom_model(fake_rembg, tmp_path, monkeypatch):
    """Its custom models must lie in its home, which is moved there for the moment."""
    monkeypatch.delenv("U2NET_HOME", raising=False)
    folder = tmp_path.resolve()
    with pytest.raises(InputError, match=r"data\.rembg_model: .*net\.onnx: no such file"):
        cut_out(picture(), "rembg", "x.jpg", rembg_model=str(tmp_path / "net.onnx"))
    (tmp_path / "net.onnx").write_bytes(b"")
    cut_out(picture(), "rembg", "x.jpg", rembg_model=str(tmp_path / "net.onnx"))
    assert fake_rembg.calls == [("dis_custom", {"model_path": str(folder / "net.onnx")}, str(folder))]
    assert "U2NET_HOME" not in os.environ


def test_alpha_goes_before_rembg_unless_told_otherwise(fake_rembg):
    rgba = picture()
    rgba[:8, :, 3] = 0
    np.testing.assert_array_equal(cut_out(rgba, "auto", "x.png"), rgba)
    assert not fake_rembg.calls
    assert cut_out(rgba, "rembg", "x.png")[..., 3].mean() == 0.25


@pytest.mark.parametrize("failure", [ConnectionError("no route\nto host"), SystemExit(1)])
def test_its_failure_falls_back_with_a_warning(fake_rembg, caplog, failure):
    """Offline its models cannot be downloaded; without onnxruntime it exits the process."""

    def fail(*_arguments, **_options):
        raise failure

    fake_rembg.new_session = fail
    with caplog.at_level(logging.WARNING):
        alpha = cut_out(picture(), "auto", "x.jpg")[..., 3]
    assert alpha[20:44, 20:44].min() == 1 and alpha[:10].max() == 0
    (record,) = caplog.records
    assert type(failure).__name__ in record.getMessage() and "falling back" in record.getMessage()
    with pytest.raises(InputError, match=r"x\.jpg: rembg failed with its model 'u2net'") as raised:
        cut_out(picture(), "rembg", "x.jpg")
    assert "\n" not in str(raised.value)


def test_missing_rembg_is_silent_when_optional_and_named_when_asked_for(no_rembg, caplog):
    assert cut_out(picture(), "auto", "x.jpg")[30, 30, 3] == 1
    assert not caplog.records
    with pytest.raises(InputError, match=r"rembg; in the checkout: pip install -e '\.\[segment\]'"):
        cut_out(picture(), "rembg", "x.jpg")


def test_without_any_way_the_error_says_how_to_give_a_mask(no_rembg):
    with pytest.raises(InputError, match=r"busy\.jpg: the background is not plain.*RGBA PNG.*data\.mask_path"):
        cut_out(picture(background=None), "auto", "busy.jpg")


def test_real_rembg_with_a_network_from_a_file(repository):
    """Runs where rembg, onnxruntime and an ISNet file are: ``THREEDREC_ISNET`` or shared/assets beside the checkout."""
    for package in ("rembg", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assets = repository.parent / "shared" / "assets"
    network = Path(os.environ.get("THREEDREC_ISNET", assets / "models" / "isnet_small.onnx"))
    photo, truth = assets / "photos" / "coffee.jpg", assets / "photos" / "apple.jpg"
    if not (network.exists() and photo.exists() and truth.exists()):
        pytest.skip(f"no network at {network}, or no photographs beside it")
    alpha = cut_out(read_rgba(photo), "rembg", str(photo), rembg_model=str(network))[..., 3]
    height, width = alpha.shape
    assert alpha[height // 2, width // 2] > 0.9 and alpha[:20, :20].max() < 0.1
    assert 0.2 < (alpha > 0.5).mean() < 0.7
