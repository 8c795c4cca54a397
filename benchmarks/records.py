"""What every record of a benchmark says of its origin, and where it is kept."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def now() -> str:
    """The time of a measurement, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages, and of Python."""
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def cpu() -> str:
    """The processor, and how many of its threads are used."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def machine(device: str) -> str:
    """The GPU's name, or :func:`cpu`."""
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else cpu()


def append(folder: Path, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to ``folder/name``, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
