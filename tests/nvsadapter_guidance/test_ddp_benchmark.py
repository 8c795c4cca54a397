"""benchmarks/ddp.py: one device against several, from the logs of real runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_nvs import tiny_nvs_model


@pytest.fixture
def benchmark_ddp(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    spec = importlib.util.spec_from_file_location("ddp_benchmark", repository / "benchmarks" / "ddp.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ddp.py", *map(str, words)])
    return int(module.main())


def log(losses: list[float], speeds: list[float]) -> list[dict[str, Any]]:
    return [{"train/loss": loss, "samples_per_second": each} for loss, each in zip(losses, speeds, strict=True)]


def test_curves_and_speeds_by_hand(
    benchmark_ddp: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    logs = {
        "one": log([1.0, 0.5, 0.25, 0.25], [1.0, 10.0, 12.0, 10.0]),
        "shared": log([1.0, 0.51, 0.25, 0.25], [1.0, 16.0, 14.0, 15.0]),
        "each": log([1.0, 0.5, 0.25, 0.25], [1.0, 19.0, 19.0, 30.0]),
    }
    asked = {}

    def run(arguments: Any, folder: Path, name: str, devices: int, batch: int) -> list[dict[str, Any]]:
        asked[name] = (devices, batch)
        return logs[name]

    monkeypatch.setattr(benchmark_ddp, "run", run)
    assert call(benchmark_ddp, monkeypatch, "--batch", 8, "--results", tmp_path) == 1
    assert asked == {"one": (1, 8), "shared": (2, 4), "each": (2, 8)}
    record = json.loads((tmp_path / "ddp.jsonl").read_text())
    assert record["max_loss_difference"] == pytest.approx(0.01)
    assert record["samples_per_second"] == {"one": 10.0, "shared": 15.0, "each": 19.0}
    assert (record["efficiency_shared_batch"], record["efficiency_batch_each"]) == (0.75, 0.95)
    assert call(benchmark_ddp, monkeypatch, "--batch", 8, "--results", tmp_path, "--tolerance", 0.02) == 0
    assert json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")["devices"] == 2


def test_a_run_that_fails_leaves_no_record(
    benchmark_ddp: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ("--base", tmp_path / "none", "--workers", 0, "--results", tmp_path / "results")
    assert call(benchmark_ddp, monkeypatch, *words) == 2
    assert "one run ended with 2: error: " in capsys.readouterr().err and not (tmp_path / "results").exists()
    assert call(benchmark_ddp, monkeypatch, "--batch", 3) == 2


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    benchmark_ddp: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny_nvs_model().save(tmp_path / "base")
    words = ("--base", tmp_path / "base", "--batch", 4, "--steps", 10, "--workers", 0, "--tolerance", 1e-4)
    assert call(benchmark_ddp, monkeypatch, *words, "--results", tmp_path) == 0
    record = json.loads((tmp_path / "ddp.jsonl").read_text())
    assert len(record["loss_one_device"]) == len(record["loss_shared_batch"]) == 2
    # The runs did learn: equal curves that never move would say nothing.
    assert record["loss_one_device"][0] != record["loss_one_device"][1]
