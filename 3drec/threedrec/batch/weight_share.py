"""Weights for machines that lack them: the files travel through Ray's object store and are kept once on each disk."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from threedrec.files import atomic_path


@dataclass(frozen=True)
class SharedWeights:
    """Files that a guidance reads its weights from."""

    source: str
    """Path on the machine of the batch: a file, or a folder."""
    folder: str
    """The source itself or the folder around it."""
    files: tuple[tuple[str, int], ...]
    """Names relative to the folder, and sizes in bytes."""
    key: str
    """The config key under ``system.guidance`` that names them."""

    def is_here(self) -> bool:
        """Whether this machine has the files under the same path (a shared disk)."""
        return all(_size(Path(self.folder) / name) == size for name, size in self.files)

    def values(self, path: str) -> dict[str, Any]:
        """Config values that name the weights as ``path``."""
        return {"system": {"guidance": {self.key: path}}}

    def contents(self) -> Iterator[UInt8[np.ndarray, " bytes"]]:
        """Read the files, one after another."""
        for name, _ in self.files:
            yield np.fromfile(Path(self.folder) / name, dtype=np.uint8)


def shared_weights(config: str) -> SharedWeights | None:
    """Return the weight files of a batch's config, None where they are part of the package or cannot be told.

    Raises:
        InputError: the weights are missing here too.
    """
    from nvsadapter_guidance.model import MINI_MODEL
    from nvsadapter_guidance.weights import choose_weights
    from threedrec.config import load_config

    guidance = load_config(config, values={"data": {"image_path": "image.png"}}).system.guidance
    if not hasattr(guidance, "pretrained"):
        return None
    key = "pretrained_model_name_or_path" if getattr(guidance, "pretrained_model_name_or_path", "") else "pretrained"
    path = Path(os.path.abspath(choose_weights(getattr(guidance, key)).path))
    if path == MINI_MODEL:
        return None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        folder = path
    else:
        found = [path, *sorted(path.parent.glob(f"{path.stem.split('_step_')[0]}*.yaml"))]
        folder = path.parent
    files = tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in found)
    return SharedWeights(str(path), str(folder), files, key)


def place(shared: SharedWeights, contents: Sequence[UInt8[np.ndarray, " bytes"]]) -> dict[str, Any]:
    """Write the files to this machine's disk unless they are there; return the config values that name them."""
    digest = hashlib.sha256(repr((shared.source, shared.files)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"3drec-weights-{os.getuid()}" / digest
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("a", encoding="ascii") as lock:
        # The other workers of this machine wait here, and then find everything.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for (name, size), content in zip(shared.files, contents, strict=True):
            if _size(folder / name) != size:
                with atomic_path(folder / name) as temporary:
                    content.tofile(temporary)
    return shared.values(str(folder / Path(shared.source).relative_to(shared.folder)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
