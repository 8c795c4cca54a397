"""Packages of two roots in one distribution; everything else about it is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

# `threedrec` lies under 3drec/, whose name no module can have; the shipped configs become part of it, so that an
# installed `3drec run` finds its recipes.
config_packages = {
    "threedrec.configs": "configs",
    **{
        f"threedrec.configs.{folder.relative_to(ROOT / 'configs').as_posix().replace('/', '.')}": str(
            folder.relative_to(ROOT)
        )
        for folder in sorted((ROOT / "configs").rglob("*"))
        if folder.is_dir()
    },
}

setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "3drec/threedrec/__init__.py").read_text()).group(1),
    packages=[
        *find_namespace_packages("3drec", include=["threedrec", "threedrec.*"], exclude=["*.__pycache__*"]),
        *find_namespace_packages(
            ".", include=["nvsadapter_guidance", "nvsadapter_guidance.*"], exclude=["*.__pycache__*"]
        ),
        *config_packages,
    ],
    package_dir={"threedrec": "3drec/threedrec", "nvsadapter_guidance": "nvsadapter_guidance", **config_packages},
    package_data={
        "threedrec": ["py.typed"],
        **{package: ["*.yaml", "*.json"] for package in config_packages},
        "nvsadapter_guidance": ["py.typed"],
        "nvsadapter_guidance.pretrained.mini": ["*", "*/*"],
    },
)
