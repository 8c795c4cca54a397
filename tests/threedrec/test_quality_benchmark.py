"""benchmarks/quality.py: the comparison by hand, and a tiny whole table in sittings."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import trimesh


@pytest.fixture
def quality(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("quality")


def test_differences_are_judged_against_the_spread(quality: ModuleType) -> None:
    near = quality.compared("a", "chamfer", [1.0, 1.2, 1.1], [1.1, 1.3, 1.0], 0.05)
    assert near["difference"] == pytest.approx(-1 / 30) and near["within_noise"]
    assert near["fast_std"] == pytest.approx(0.1)
    far = quality.compared("a", "chamfer", [1.0, 1.01, 1.02], [2.0, 2.01, 2.02], 0.05)
    assert far["p"] < 1e-6 and not far["within_noise"]
    assert quality.compared("a", "chamfer", [1.0, 1.0], [1.0, 1.0], 0.05)["within_noise"]
    assert not quality.compared("a", "chamfer", [1.0, 1.0], [1.1, 1.1], 0.05)["within_noise"]


def test_all_objects_together_show_a_small_common_shift(quality: ModuleType) -> None:
    rows = {}
    for name, level in (("a", 1.0), ("b", 10.0), ("c", 100.0)):
        for seed in range(5):
            noise = 0.01 * (seed - 2)
            rows[quality.Case(name, "fast", seed)] = dict.fromkeys(quality.METRICS, level + noise + 0.03)
            rows[quality.Case(name, "plain", seed)] = dict.fromkeys(quality.METRICS, level + noise)
    table = {(row["object"], row["metric"]): row for row in quality.summary(rows)}
    assert len(table) == 12
    assert table["all", "chamfer"]["difference"] == pytest.approx(0.03)
    assert table["all", "chamfer"]["fast"] == pytest.approx(37.03, abs=0.02)
    assert table["b", "chamfer"]["within_noise"] and not table["all", "chamfer"]["within_noise"]


def test_a_tiny_table_in_sittings(quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    trimesh.creation.box((1.0, 1.0, 1.0)).export(objects / "cube.glb")
    arguments = ["--objects", str(objects), "--device", "cpu", "--steps", "tiny", "--seeds", "1"]
    arguments += ["--folder", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert quality.main([*arguments, "--seconds", "0.001"]) == 3  # the first run is begun, no other
    assert "1 of 2 runs are left" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "work" / "rows").iterdir()] == ["cube-fast-0.json"]
    assert quality.main(arguments) == 0  # on a CPU both paths are the same
    record = json.loads((tmp_path / "quality.jsonl").read_text())
    assert [row["object"] for row in record["rows"]] == ["cube", "all"] * 3
    assert all(row["difference"] == 0.0 for row in record["rows"])
    assert "| cube | chamfer |" in (tmp_path / "quality.md").read_text()
    assert not (tmp_path / "work" / "run").exists()


def test_an_object_that_is_not_there_is_named(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trimesh.creation.box().export(tmp_path / "cube.glb")
    assert quality.main(["--objects", str(tmp_path), "--object", "vase", "--device", "cpu"]) == 2
    assert "holds no mesh vase (known: cube)" in capsys.readouterr().err
