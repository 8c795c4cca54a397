"""Where files named by people are found, in a checkout and in an installed wheel."""

import os
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent


def repository_root() -> Path | None:
    """Return the root of the checkout that this package runs from, or None when it is installed from a wheel."""
    root = PACKAGE_DIR.parent.parent
    return root if (root / "setup.py").is_file() and (root / "configs").is_dir() else None


def configs_dir() -> Path:
    """Return the folder of the shipped YAML files (a wheel carries it inside the package)."""
    root = repository_root()
    return root / "configs" if root else PACKAGE_DIR / "configs"


def find_path(path: str | Path) -> Path:
    """Return ``path`` as it is when it exists from the current folder, otherwise from the repository's root.

    In a wheel the package's own folder stands for the root, so ``configs/nvsadapter.yaml`` is found there too. A path
    found nowhere comes back unchanged: who opens it says that it is missing.
    """
    path = Path(path).expanduser()
    # os.path takes a name that is too long for any file as one that is missing; Path.exists raises.
    if path.is_absolute() or os.path.exists(path):
        return path
    beside = (repository_root() or PACKAGE_DIR) / path
    return beside if os.path.exists(beside) else path


def output_root(path: str | Path) -> Path:
    """Return the folder that results go to: from the current folder, or the repository's own when inside it.

    ``./outputs`` said in ``<checkout>/3drec`` means ``<checkout>/outputs``, unless ``3drec/outputs`` exists.
    """
    path = Path(path).expanduser()
    root = repository_root()
    if path.is_absolute() or os.path.exists(path) or root is None or not Path.cwd().is_relative_to(root):
        return path
    return root / path
