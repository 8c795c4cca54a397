"""``3drec doctor``: what it finds, and what it says about installations that are not whole."""

import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nvsadapter_guidance.weight_files import RELEASED_CHECKPOINT
from threedrec import cli, doctor


@pytest.fixture(autouse=True)
def _nothing_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "weights"))


@pytest.fixture
def run(capsys):
    """Run ``3drec doctor``; returns exit code, stdout and the last line of stderr."""

    def run(*arguments):
        code = cli.main(["doctor", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


def without(monkeypatch, *names, versions=None):
    """Pretend that some distributions are missing, or of other versions."""
    real = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return (versions or {}).get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_whole_installation_is_ready(run):
    code, out, _ = run()
    assert code == 0
    for words in ("Python", "torch", "GPU", "packages", "extras", "backends", "weights", "embedded model", "mini-"):
        assert words in out
    assert RELEASED_CHECKPOINT in out and "missing: 3drec weights download released" in out


def test_json_holds_the_same(run):
    code, out, _ = run("--json")
    report = json.loads(out)
    assert code == 0 and report["problems"] == []
    assert set(report["choice"]) == {"model", "recipe", "device", "field and renderer"}
    packages = {package["name"]: package for package in report["packages"]}
    assert packages["torch"]["group"] == "required" and packages["torch"]["state"] == "ok"
    for backend in ("triton", "tinycudann", "nerfacc", "imageio-ffmpeg", "rembg", "vtk"):
        assert backend in packages


def test_released_weights_that_are_found_would_be_used(run, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / RELEASED_CHECKPOINT).touch()
    choice = json.loads(run("--json")[1])["choice"]
    assert str(tmp_path / "weights" / RELEASED_CHECKPOINT) in choice["model"] and choice["recipe"].startswith("full")


def test_a_missing_package_is_named_with_what_to_do(run, monkeypatch):
    without(monkeypatch, "xatlas", "gradio")
    code, out, line = run()
    assert code == 2 and line == "error: 3drec cannot run here: xatlas (missing); get them with: pip install -e '.'"
    assert "gradio [demo]" in out and "pip install -e '.[demo]'" in out and "a run would use" not in out


def test_an_old_package_is_a_problem(run, monkeypatch):
    without(monkeypatch, versions={"diffusers": "0.9.1"})
    code, _, line = run()
    assert code == 2 and "diffusers (older than 0.35)" in line


def test_a_torch_that_cannot_be_imported_is_a_problem(run, monkeypatch):
    monkeypatch.setattr(doctor, "_import_torch", lambda: (None, "libcudart.so.12: cannot open shared object file"))
    code, out, line = run("--json")
    assert code == 2 and "torch cannot be imported (libcudart.so.12" in line
    assert json.loads(out)["choice"] == {}


def fake_torch(devices, cuda="12.8"):
    """As much of torch as tells about GPUs."""
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(devices),
            device_count=lambda: len(devices),
            mem_get_info=lambda index: (10**10, devices[index]),
            get_device_name=lambda index: "Some GPU",
        ),
    )


def test_gpus_are_named_with_their_memory(monkeypatch):
    assert doctor._gpus(fake_torch([24 * 10**9])) == "0: Some GPU, 10.0 of 24.0 GB memory free"
    assert doctor._gpus(fake_torch([])) == "no CUDA device"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "this torch is a CPU build" in doctor._gpus(fake_torch([], cuda=None))


def test_an_installed_wheel_knows_its_requirements(monkeypatch):
    monkeypatch.setattr(doctor, "repository_root", lambda: None)
    lines = ["torch>=2.6", "imageio[ffmpeg]>=2.34", 'gradio>=5; extra == "demo"', "rembg>=2.0.57 ; extra == 'segment'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert doctor.requirements() == [
        ("torch", "2.6", ""),
        ("imageio", "2.34", ""),
        ("gradio", "5", "demo"),
        ("rembg", "2.0.57", "segment"),
    ]
    without(monkeypatch, "gradio")
    assert "missing: pip install '3drec[demo]'" in [package.state for package in doctor._packages()]


def test_it_needs_nothing_but_the_standard_library(repository, tmp_path):
    """Without any package installed, it still says what is missing."""
    code = "from threedrec.cli import main; raise SystemExit(main(['doctor']))"
    path = os.pathsep.join((str(repository / "3drec"), str(repository)))
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {path.split(os.pathsep)!r}; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: 3drec cannot run here: torch (missing), accelerate (missing)"
    )
    assert "rich" in done.stdout
