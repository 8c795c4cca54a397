"""``3drec render`` and ``3drec evaluate``: files, exit codes, going on, mistakes in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from threedrec import cli


@pytest.fixture(scope="module")
def model(repository, tmp_path_factory) -> Path:
    """A folder with a tiny model."""
    sys.path.insert(0, str(repository / "tests" / "nvsadapter_guidance"))
    from tiny_nvs import tiny_nvs_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_nvs_model().save(folder)
    return folder


@pytest.fixture
def command(capsys):
    """Run ``3drec``; returns the exit code and the lines of stderr."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.strip().splitlines()

    return run


@pytest.fixture
def meshes(tmp_path) -> Path:
    folder = tmp_path / "meshes"
    folder.mkdir()
    trimesh.creation.box((1.0, 2.0, 0.5)).export(folder / "box.glb")
    trimesh.creation.cone(0.5, 1.0).export(folder / "cone.glb")
    return folder


def needs_vtk():
    pytest.importorskip("vtk", reason="needs VTK (the extra render)")


def test_render_writes_folders_and_says_what_it_skipped(command, meshes, tmp_path):
    needs_vtk()
    line = ("render", meshes, "-o", tmp_path / "out", "--views", 2, "--size", 32)
    code, _ = command(*line)
    assert code == 0 and (tmp_path / "out" / "cone" / "001.npy").is_file()
    (meshes / "broken.glb").write_bytes(b"no mesh")
    code, said = command(*line)
    assert code == 1 and "skipped: " in said[-1] and "broken.glb" in said[-1]
    assert any("2 were there" in text for text in said)
    code, said = command(*line[:-1], 64)
    assert code == 2 and said[-1].startswith("error: ") and "another size" in said[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--views", 0), "views is 0"), (("--processes", 0), "--processes 0"), (("--distances", 1, 0.5), "distances are"),
     (("--renderer", "gl"), "renderer 'gl' is unknown"), (("--colour", 1), "unknown argument --colour")],
)  # fmt: skip
def test_renders_mistakes_are_one_line(command, meshes, tmp_path, more, words):
    code, said = command("render", meshes, "-o", tmp_path / "out", *more)
    assert code == 2 and said[-1].startswith("error: ") and words in said[-1]
    assert not (tmp_path / "out").exists()


def test_views_are_evaluated_whole(command, meshes, model, tmp_path):
    (meshes / "zz.glb").write_bytes(b"no mesh")
    out = tmp_path / "out"
    line = ("evaluate", "views", "--objects", meshes, "-o", out, "--weights", model, "--gpu", "cpu", "--steps", 1)
    line = (*line, "--views", 4, "--renderer", "torch")
    code, said = command(*line)
    assert code == 1 and "zz.glb" in said[-1]
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "metrics.json", "objects", "settings.json"]
    found = json.loads((out / "metrics.json").read_text())
    assert set(found) == {"settings", "mean", "baselines", "objects", "skipped"}
    assert set(found["mean"]) == {"psnr", "ssim", "mask_iou", "one_step_psnr"}
    assert set(found["baselines"]) == {"copy-reference", "mean-image"}
    assert all(isinstance(row["psnr"], float) for row in found["baselines"].values())
    assert [row["name"] for row in found["objects"]] == ["box", "cone"]
    assert [(v["azimuth"], v["elevation"]) for v in found["objects"][0]["views"]] == [(180.0, 0.0), (180.0, 30.0)]
    assert found["mean"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in found["objects"]]), abs=1e-4)
    assert [entry["name"] for entry in found["skipped"]] == ["zz"]
    assert Image.open(out / "grid.png").size == (150 + 4 * 96, 20 + 2 * (2 * 96 + 6))
    stamp = (out / "objects" / "box" / "pred_001.png").stat().st_mtime_ns
    renderings = tmp_path / "renderings"
    assert command("render", meshes / "box.glb", "-o", renderings, "--size", 32, "--renderer", "torch")[0] == 0
    code, _ = command(*line, "--training-views", renderings)
    again = json.loads((out / "metrics.json").read_text())
    assert (out / "objects" / "box" / "pred_001.png").stat().st_mtime_ns == stamp, "objects are not imagined again"
    assert again["mean"] == found["mean"] and again["baselines"]["nearest-training-object"]["psnr"] > 5
    code, said = command(*line, "--seed", 1)
    assert code == 2 and "holds an evaluation with another seed" in said[-1]


def test_pairs_are_scored(command, tmp_path):
    (tmp_path / "pairs" / "a").mkdir(parents=True)
    pixels = np.full((16, 16, 3), 100, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "pairs" / "a" / "target.png")
    Image.fromarray(pixels + 51).save(tmp_path / "pairs" / "a" / "pred.png")
    code, _ = command("evaluate", "views", "--pairs", tmp_path / "pairs", "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert code == 0 and found["mean"]["psnr"] == pytest.approx(-20 * np.log10(0.2), abs=1e-3)


def test_meshes_are_scored(command, meshes, tmp_path):
    (tmp_path / "found").mkdir()
    trimesh.creation.box((2.0, 4.0, 1.0)).export(tmp_path / "found" / "box.glb")
    line = ("evaluate", "mesh", "--predictions", tmp_path / "found", "--truth", meshes, "-o", tmp_path / "out")
    code, said = command(*line, "--no-aligned")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert code == 1 and "cone" in said[-1]
    assert found["mean"]["volume_iou"] == 1.0 and found["mean"]["f_score"]["0.02"] == 1.0
    assert found["mean"]["chamfer"] < 0.005 and [entry["name"] for entry in found["skipped"]] == ["cone"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("views --objects none -o out", "none: no such file or folder"),
        ("views --objects meshes -o out --views 5", "number of views is 5"),
        ("views --objects meshes -o out --limit 0", "--limit 0"),
        ("views --objects meshes -o out --steps 0", "num_inference_steps is 0"),
        ("views --objects meshes -o out --scheduler heun", "--scheduler heun: unknown"),
        ("views --objects meshes -o out --weights none.ckpt", "none.ckpt"),
        ("views --objects meshes -o out --training-views none", "none: no such file or folder"),
        ("views --objects meshes -o out --training-views meshes", "no folder in it holds a 000.png"),
        ("views --pairs meshes -o out", "no folder below it holds a target.png"),
        ("views -o out", "one of the arguments --objects --pairs is required"),
        ("mesh --predictions none --truth meshes -o out", "--predictions none: no such folder"),
        ("mesh --predictions meshes --truth none -o out", "none: holds no mesh"),
    ],
)
def test_evaluations_mistakes_are_one_line(command, meshes, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    if "--training-views" in line:
        needs_vtk()
    code, said = command("evaluate", *line.split())
    assert code == 2 and said[-1].startswith("error: ") and words in said[-1]
    assert not (tmp_path / "out").exists()
