"""The command ``3drec doctor``: what is installed, what is found, and what a run would use.

It has to work where little else does, so it needs the standard library alone; ``rich`` only makes it prettier.
"""

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nvsadapter_guidance
from threedrec import __version__
from threedrec.errors import InputError
from threedrec.lookup import repository_root
from threedrec.weights_command import file_states

PYTHON = (3, 11)
DISTRIBUTION = "3drec"
OK = "ok"

BACKENDS: tuple[tuple[str, str, str], ...] = (
    ("triton", "compiled kernels on CUDA", "comes with torch for CUDA"),
    (
        "tinycudann",
        "hash grid of tiny-cuda-nn",
        "pip install 'git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch'",
    ),
    ("nerfacc", "ray marching of nerfacc", "pip install nerfacc"),
    ("imageio-ffmpeg", "turntable videos", "pip install imageio-ffmpeg"),
    ("rembg", "cutting objects out of a background", "pip install rembg onnxruntime"),
    ("vtk", "rendering training meshes", "pip install vtk"),
)
"""(distribution, what it does, how to get it)."""


@dataclass
class Package:
    """One distribution that this project needs or can use."""

    name: str
    group: str
    """``required``, ``backend``, or the name of an extra."""
    version: str | None
    state: str
    """``ok``, or what is wrong and what to do."""
    purpose: str = ""


@dataclass
class Report:
    """Everything that the doctor finds."""

    system: dict[str, str]
    packages: list[Package] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    choice: dict[str, str] = field(default_factory=dict)
    """What ``3drec run`` would use, and why; empty when it cannot run."""
    problems: list[str] = field(default_factory=list)
    """What keeps ``3drec run`` from running; empty when nothing does."""


def run(as_json: bool = False) -> None:
    """Examine, print, and refuse when a run on the embedded model would fail.

    Raises:
        InputError: something that every run needs is missing; says what and how to get it.
    """
    report = examine()
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n")
    else:
        from threedrec.doctor_tables import show

        show(report)
    if report.problems:
        raise InputError(f"3drec cannot run here: {'; '.join(report.problems)}")


def examine() -> Report:
    """Look at the machine; imports torch and, when all is there, what chooses weights and recipes."""
    torch, torch_problem = _import_torch()
    report = Report(_system(torch), _packages(), file_states())
    if sys.version_info < PYTHON:
        report.problems.append(f"Python {platform.python_version()} is older than {'.'.join(map(str, PYTHON))}")
    broken = [package for package in report.packages if package.group == "required" and package.state != OK]
    if broken:
        names = ", ".join(f"{package.name} ({package.state.split(':')[0]})" for package in broken)
        report.problems.append(f"{names}; get them with: {broken[0].state.split(': ')[1]}")
    if torch_problem and all(package.name != "torch" for package in broken):
        report.problems.append(f"torch cannot be imported ({torch_problem}); install it again")
    embedded = Path(nvsadapter_guidance.__file__).parent / "pretrained" / "mini"
    for name in ("config.json", "model.safetensors"):
        if not (embedded / name).is_file():
            report.problems.append(f"{embedded / name} is missing; install 3drec again")
    if not report.problems:
        report.choice = _choice()
    return report


def _import_torch() -> tuple[Any, str]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken installation fails in many ways, and all are findings
        lines = str(error).splitlines()
        return None, lines[0] if lines else type(error).__name__
    return torch, ""


def _system(torch: Any) -> dict[str, str]:
    system = {
        "3drec": f"{__version__} in {repository_root() or Path(__file__).parent}",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "CPU": f"{_usable_cores()} usable cores",
        "memory": _memory(),
    }
    if torch is not None:
        system["torch"] = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU build'}"
        system["GPU"] = _gpus(torch)
    return system


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 1e9:.1f} GB"


def _gpus(torch: Any) -> str:
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            names.append(
                f"{index}: {torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB memory free"
            )
        return "; ".join(names)
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        return "none usable: this torch is a CPU build; install torch for CUDA (pytorch.org)"
    return "no CUDA device"


def _packages() -> list[Package]:
    """Requirements by group, then backends."""
    checkout = repository_root() is not None
    packages = []
    for name, minimum, extra in requirements():
        what = f"-e '.{f'[{extra}]' if extra else ''}'" if checkout else f"'3drec{f'[{extra}]' if extra else ''}'"
        packages.append(_package(name, extra or "required", minimum, f"pip install {what}"))
    for name, purpose, how in BACKENDS:
        packages.append(_package(name, "backend", "", how, purpose))
    return packages


def _package(name: str, group: str, minimum: str, how: str, purpose: str = "") -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, group, None, f"missing: {how}", purpose)
    if _numbers(version) < _numbers(minimum):
        return Package(name, group, version, f"older than {minimum}: {how}", purpose)
    return Package(name, group, version, OK, purpose)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; the requirements here need no more than that."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def requirements() -> list[tuple[str, str, str]]:
    """(distribution, least version, extra) of all that this project can use; the extra is empty when always needed.

    Read from the checkout, or from what the installed wheel says of itself.
    """
    root = repository_root()
    if root is not None:
        import tomllib

        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return [(*_parse(line), extra) for extra, lines in groups.items() for line in lines]
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    found = ((line, re.search(r"extra == ['\"]([\w.-]+)['\"]", line)) for line in lines)
    return [(*_parse(line), extra[1] if extra else "") for line, extra in found]


def _parse(requirement: str) -> tuple[str, str]:
    """Name and least version of ``imageio[ffmpeg]>=2.34; extra == 'x'``."""
    text = requirement.split(";")[0].strip()
    name = re.match(r"[\w.-]+", text)
    least = re.search(r">=\s*([\d.]+)", text)
    return (name[0] if name else text), (least[1] if least else "0")


def _choice() -> dict[str, str]:
    """What ``3drec run`` with nothing but an image takes."""
    from nvsadapter_guidance.weights import choose_weights
    from threedrec.launch import choose_device
    from threedrec.recipes import choose_recipe

    device = choose_device("auto")
    on_gpu = device.type == "cuda"
    weights = choose_weights("auto")
    logging.disable(logging.WARNING)  # what it warns of is part of the reason below
    try:
        recipe = choose_recipe("nvsadapter-guidance", "auto", device.type)
    finally:
        logging.disable(logging.NOTSET)
    fit = f"made for this model on {'a GPU' if on_gpu else 'a CPU'}"
    if recipe == "full-gpu" and not on_gpu:
        fit = "which takes days on a CPU; add system.guidance.pretrained=mini for the embedded model"
    return {
        "model": weights.reason,
        "recipe": f"{recipe}, {fit}",
        "device": f"{device} ({'a' if on_gpu else 'no'} CUDA device is here)",
        "field and renderer": "torch",
    }
