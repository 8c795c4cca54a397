"""What all tests share: the checkout, the marks, and small machines' manners."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# Tests are many and tiny: two threads of one test wait for each other more than they help.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine cannot run, with the reason."""
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of ``benchmarks/`` by its name; in the end its modules, whose names are short, are forgotten."""
    folder, before = repository / "benchmarks", set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if folder in Path(getattr(sys.modules[name], "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random draws."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> None:
    """Hugging Face libraries must not try to reach a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
