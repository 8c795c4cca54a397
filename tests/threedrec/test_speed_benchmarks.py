"""benchmarks/speed.py and recipe.py: the newest figures in one file, the recipe in sittings."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from threedrec.scene import Scene

VERSIONS = {"torch": "2.11.0"}
GPU = {"machine": "NVIDIA H200", "versions": VERSIONS}


@pytest.fixture
def speed(benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return benchmarks("speed")


def write(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def hash_row(work: str, milliseconds: float, **changes: Any) -> dict[str, Any]:
    row = {"date": "2026-01-01T00:00:00Z", **GPU, "points": 2**20, "backend": "triton", "work": work}
    row |= {"precision": "fp32", "order": "random", "fixed_sums": False, "milliseconds": milliseconds}
    return row | changes


def sitting(minutes: float, complete: bool, *medians: float | None, short: bool = False) -> dict[str, Any]:
    rows = [{"timed": 0 if ms is None else 50, "median_ms": ms, "pixels": 64} for ms in medians]
    line = {"date": "2026-01-02T00:00:00Z", **GPU, "recipe": "full-gpu", "overrides": [], "short": short}
    return line | {"minutes": minutes, "complete": complete, "by_resolution": rows} | {
        "max_steps": 8000, "peak_gpu_gb": 9.5, "device": "NVIDIA H200",
    }  # fmt: skip


def test_the_newest_record_of_each_figure_counts(speed: ModuleType, tmp_path: Path) -> None:
    guidance = {"date": "2026-01-01T00:00:00Z", **GPU, "views": 16, "dtype": "bf16", "rows": 36, "graphs": True}
    guidance |= {"unconditional": "fresh", "guidance_step_ms": 63.0, "unet_ms": 26.0, "vae_ms": 39.0}
    write(tmp_path / "guidance.jsonl", guidance, guidance | {"guidance_step_ms": 48.0, "date": "2026-02-02"})
    write(tmp_path / "guidance.jsonl", guidance | {"unconditional": "frozen", "guidance_step_ms": 1.0})
    rows = [hash_row("forward", 1.0), hash_row("forward", 0.8, order="ray"), hash_row("forward", 9.0, backend="torch")]
    rows += [hash_row("forward, backward", 2.7), hash_row("forward, backward", 4.1, fixed_sums=True)]
    write(tmp_path / "hashgrid.jsonl", *rows)
    found = speed.collect(tmp_path)
    assert set(speed.TARGETS) == set(found["about"]) and list(found)[: len(speed.TARGETS)] == list(speed.TARGETS)
    assert (found["guidance_step_ms"], found["hash_forward_ms"], found["mini_cpu_s"]) == (48.0, 1.0, None)
    about = found["about"]["guidance_step_ms"]
    assert (about["date"], about["machine"], about["versions"]) == ("2026-02-02", "NVIDIA H200", VERSIONS)
    assert about["record"] == "guidance.jsonl, line 2"
    about = found["about"]["hash_forward_backward_ms"]
    assert (about["point_order"], about["precision"], about["sums"]) == ("random", "fp32", "float")
    assert [row["milliseconds"] for row in about["variants"]] == [2.7, 4.1]


def test_minutes_are_null_until_the_recipe_is_complete(speed: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path / "recipe.jsonl",
        sitting(1.0, False, 90.0, 95.0, 200.0, short=True),
        sitting(5.0, False, 70.0, None, None),
    )
    found = speed.collect(tmp_path)
    assert found["recipe_minutes"] is None and found["recipe_progress"]["minutes"] == 5.0
    # The recipe itself where it has come that far, a short run for the rest.
    assert (found["stage1_iteration_ms"], found["stage3_iteration_ms"]) == (70.0, 200.0)
    assert found["about"]["stage3_iteration_ms"]["run"].startswith("short")
    write(tmp_path / "recipe.jsonl", sitting(21.5, True, 70.0, 80.0, 150.0))
    found = speed.collect(tmp_path)
    assert (found["recipe_minutes"], found["stage3_iteration_ms"], found["peak_gpu_gb"]) == (21.5, 150.0, 9.5)


def test_a_settled_object_has_figures_of_its_own(speed: ModuleType, tmp_path: Path) -> None:
    settled = sitting(1.0, False, 60.0, 61.0, 110.0, short=True) | {"settled": True, "settled_minutes": 10.55}
    write(tmp_path / "recipe.jsonl", sitting(21.5, True, 70.0, 80.0, 150.0), settled)
    found = speed.collect(tmp_path)
    assert (found["stage1_iteration_ms"], found["recipe_minutes"]) == (70.0, 21.5)
    assert (found["settled_stage1_iteration_ms"], found["settled_stage3_iteration_ms"]) == (60.0, 110.0)
    assert found["settled_recipe_minutes"] == 10.55


def test_figures_without_a_record_stay_as_they_were(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"unet_ms": 26.0, "about": {"unet_ms": {"date": "2025-12-31", "target": 18.0}}}
    (tmp_path / "speed.json").write_text(json.dumps(old))
    asked = []

    def run(command: list[str], check: bool) -> Any:
        asked.append(Path(command[1]).name)
        record = {"date": "2026-01-03", "machine": "x86_64, 2 threads", "versions": VERSIONS, "overrides": []}
        record |= {"device": "cpu, 2 threads", "recipe": "mini-cpu", "total_seconds": 170.0}
        write(tmp_path / "reconstruct.jsonl", record | {"stages": {"fit": {"seconds": 60.0}, "mesh": {"seconds": 9.0}}})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(speed.subprocess, "run", run)
    assert speed.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert asked == ["reconstruct.py"]
    assert (found["unet_ms"], found["mini_cpu_s"], found["mini_gpu_s"]) == (26.0, 170.0, None)
    assert found["about"]["unet_ms"]["date"] == "2025-12-31" and found["about"]["mini_cpu_s"]["date"] == "2026-01-03"


def test_a_part_that_fails_is_named(
    speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: True)
    arguments = ["--device", "cuda:0", "--recipe-seconds", "5", "--out", str(tmp_path)]
    assert speed.main(arguments) == 1
    assert f"failed: {', '.join(speed.PARTS[:5])}, mini, recipe" in capsys.readouterr().err
    assert list(speed.commands(speed.parse([*arguments, "--only", "mini"]))) == ["mini"]


TINY = """
data.height=16 data.width=16 data.resolution_milestones=[2,4] trainer.max_steps=6 trainer.val_check_interval=50
data.random_camera.height=8 data.random_camera.width=8 data.random_camera.batch_size=4
data.random_camera.eval_height=24 data.random_camera.eval_width=24 trainer.num_sanity_val_steps=0
data.random_camera.n_val_views=1 data.random_camera.n_test_views=2 system.ref_rays=64
system.renderer.num_samples_per_ray=16 system.renderer.occupancy_resolution=16 system.freq.guidance_eval=50
system.geometry.pos_encoding_config.n_levels=4 system.geometry.pos_encoding_config.log2_hashmap_size=10
system.guidance.warm_start.enabled=false system.exporter.isosurface_resolution=24 system.exporter.face_budget=400
system.exporter.texture_size=64 checkpoint.every_n_train_steps=50
"""


def test_sittings_add_up_to_the_whole_recipe(benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = benchmarks("recipe")

    class ShortClock(recipe.Clock):
        def over(self) -> bool:
            return self._last is not None and self._last[0] >= 3

    arguments = ["--device", "cpu", "--weights", "mini", "--folder", str(tmp_path / "sittings")]
    arguments += ["--out", str(tmp_path), *TINY.split()]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Clock", ShortClock)
        assert recipe.main(arguments) == 0
    assert recipe.main(arguments) == 0
    first, last = (json.loads(line) for line in (tmp_path / "recipe.jsonl").read_text().splitlines())
    assert not first["complete"] and last["complete"] and last["minutes"] > first["minutes"] > 0
    assert [row["iterations"] for row in last["by_resolution"]] == [[0, 2], [2, 4], [4, 6]]
    # Three steps in the first sitting: the first of a sitting has no beginning.
    assert [row["timed"] for row in first["by_resolution"]] == [1, 1, 0]
    assert [row["timed"] for row in last["by_resolution"]] == [1, 1, 2]
    assert last["by_resolution"][2]["median_ms"] > 0
    minutes = last["minutes"]
    assert recipe.main(arguments) == 0  # there is nothing left to do
    again = json.loads((tmp_path / "recipe.jsonl").read_text().splitlines()[-1])
    assert again["complete"] and again["minutes"] == pytest.approx(minutes, abs=0.05)


def test_a_settled_object_is_solid_and_does_not_change(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, configs, states = benchmarks("recipe"), [], []
    record = recipe.record

    def watched(config: Any, run_dir: Path, folder: Path) -> Any:
        configs.append(config)
        states.append(torch.load(run_dir / "ckpts" / "last.ckpt", weights_only=True)["model"])
        return record(config, run_dir, folder)

    monkeypatch.setattr(recipe, "record", watched)
    given = [text for text in TINY.split() if "steps=" not in text and "milestones" not in text]
    arguments = ["--device", "cpu", "--weights", "mini", "--settled", "--out", str(tmp_path), *given]
    assert recipe.main([*arguments, "data.resolution_milestones=[2,5]", "trainer.max_steps=6"]) == 0
    assert configs[0].system.geometry.density_blob_scale == 200.0 and configs[0].system.optimizer.args.lr < 1e-9
    first = Scene(configs[0].system, configs[0].seed).state_dict()
    changes = [(states[0][k] - v).abs().max() for k, v in first.items() if k.endswith(("table", "weight"))]
    assert len(changes) > 3 and max(changes) < 1e-9
    line = json.loads((tmp_path / "recipe.jsonl").read_text())
    medians = [row["median_ms"] for row in line["by_resolution"]]
    assert line["settled"] and line["short"] and not line["complete"]
    expected = (2 * medians[0] + 3 * medians[1] + medians[2]) / 60e3
    assert line["settled_minutes"] == pytest.approx(expected, abs=0.0051)
