import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

import threedrec


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """A wheel built from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("3drec", "nvsadapter_guidance", "configs"):
        shutil.copytree(repository / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(repository / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_wheel_holds_both_packages_configs_and_weights(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ("threedrec/cli.py", "threedrec/py.typed", "nvsadapter_guidance/errors.py"):
        assert path in names
    for config in (repository / "configs").rglob("*.yaml"):
        assert f"threedrec/{config.relative_to(repository)}" in names
    for root, package in ((repository / "3drec", "threedrec"), (repository, "nvsadapter_guidance")):
        for module in (root / package).rglob("*.py"):
            assert str(module.relative_to(root)) in names
    pretrained = repository / "nvsadapter_guidance" / "pretrained"
    for file in (file for file in pretrained.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
        assert str(file.relative_to(repository)) in names
    assert not any("__pycache__" in name or name.startswith("tests/") for name in names)


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import threedrec, threedrec.lookup as l, threedrec.recipes as r; print(threedrec.__file__);"
        "print(l.repository_root(), l.find_path('configs/nvsadapter.yaml').is_file(), r.recipe_names())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    where, found = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert found == "None True ['full-gpu', 'mini-cpu', 'mini-gpu']"


def test_wheel_metadata(wheel):
    assert wheel.name == f"3drec-{threedrec.__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    info = f"3drec-{threedrec.__version__}.dist-info"
    assert "3drec = threedrec.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_every_dependency_is_pinned_within_its_range(repository, project):
    pins = dict(line.split("==") for line in (repository / "constraints.txt").read_text().splitlines() if "==" in line)
    requirements = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    for requirement in requirements:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is missing in constraints.txt"
        assert requirement.specifier.contains(pins[name]), name


def test_torchvision_is_no_hard_dependency(project):
    names = {Requirement(text).name for text in project["dependencies"]}
    assert not names & {"torchvision", "torchaudio", "ray", "gradio", "tinycudann", "nerfacc", "rembg"}


@pytest.mark.parametrize(("missing", "words"), [("git", "git is missing"), ("python3", "python3 is missing")])
def test_make_setup_names_a_missing_tool(repository, tmp_path, missing, words):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "bash", "git", "python3", "test", "echo", "env"):
        found = shutil.which(name)
        if found and name != missing:
            (tools / name).symlink_to(found)
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(repository / name, tmp_path)
    done = subprocess.run([make, "setup"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {words}; install it" in done.stderr
