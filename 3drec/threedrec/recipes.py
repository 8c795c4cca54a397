"""Named sets of config values, made for one model on one kind of device (``configs/recipes``)."""

import logging
from pathlib import Path
from typing import Any

from threedrec.errors import InputError
from threedrec.lookup import configs_dir
from threedrec.registry import find, nearest

logger = logging.getLogger(__name__)

NONE, AUTO = "none", "auto"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in (configs_dir() / "recipes").glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        InputError: no recipe of that name.
    """
    known = [AUTO, NONE, *recipe_names()]
    if name not in recipe_names():
        raise InputError(f"unknown recipe '{name}'{nearest(name, known)} (known: {', '.join(known)})")
    return configs_dir() / "recipes" / f"{name}.yaml"


def choose_recipe(guidance_type: str, pretrained: str, device_type: str) -> str:
    """Return the recipe for the model that ``system.guidance.pretrained`` leads to, on ``device_type``.

    A guidance tells its model by a static method ``model_family(pretrained) -> "mini" | "released"``; one without it
    is taken to be of full size.
    """
    family = _model_family(find("guidance", guidance_type), pretrained)
    if family == "mini":
        return "mini-gpu" if device_type == "cuda" else "mini-cpu"
    if device_type != "cuda":
        logger.warning("recipe full-gpu: a full-size model on the CPU takes days; use a CUDA GPU, or pretrained=mini")
    return "full-gpu"


def _model_family(guidance: Any, pretrained: str) -> str:
    tell = getattr(guidance, "model_family", None)
    return tell(pretrained) if tell is not None else "released"
