import gc
import importlib.metadata
import os
import sys

import pytest
import torch

from threedrec.startup import quick_imports, wake_driver, warm_device


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()
    gc.enable()


def test_imports_are_not_searched_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with quick_imports():
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    assert gc.isenabled() and gc.get_freeze_count() >= len(kept)


def test_installed_packages_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    listing = importlib.metadata.packages_distributions
    with quick_imports():
        first = importlib.metadata.packages_distributions()
        assert importlib.metadata.packages_distributions() is first
        assert "torch" in first
    assert importlib.metadata.packages_distributions is listing


def test_a_later_job_leaves_the_collector_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.unfreeze()
    monkeypatch.setitem(sys.modules, "diffusers", sys)
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_an_error_switches_the_collector_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with pytest.raises(KeyError), quick_imports():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.parametrize("library", ["libno-such-driver.so", "libc.so.6"])
def test_a_machine_without_a_driver_goes_on(library: str) -> None:
    thread = wake_driver(library)
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("device", ["cpu", "cuda:63"])
def test_warming_ends_whatever_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.get_rng_state()
    thread = warm_device(torch.device(device))
    thread.join(timeout=30)
    assert not thread.is_alive() and torch.equal(torch.get_rng_state(), before)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's choice stays


@pytest.mark.gpu
def test_a_gpu_is_ready_afterwards() -> None:
    wake_driver().join(timeout=60)
    warm_device(torch.device("cuda")).join(timeout=60)
    assert torch.cuda.is_initialized()
