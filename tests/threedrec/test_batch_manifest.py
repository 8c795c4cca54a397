"""The manifest is the truth, whatever happened to the process that wrote it."""

import json
from pathlib import Path

import pytest

from threedrec.batch.inputs import Input, Inputs
from threedrec.batch.manifest import Line, Manifest
from threedrec.batch.plan import Settings, fingerprint, make_plan
from threedrec.config_schema import ExperimentConfig
from threedrec.image import SingleImageConfig


def line(name="a.png", status="done", attempt=1, **values) -> Line:
    return Line(name, "h-" + name, status, 1.5, attempt, **{"config": "c", "output": f"objects/{name}", **values})


def settings(output: Path, **values) -> Settings:
    return Settings(
        output,
        "config.yaml",
        **{"fingerprint": "c", "max_retries": 1, "retry_failed": False, **values},
    )


def plan_of(output: Path, names, **values):
    images = [Input(name, f"/in/{name}") for name in names]
    hashes = values.pop("hashes", {name: f"h-{name}" for name in names})
    return make_plan(Inputs(Path("/in"), images), hashes, Manifest(output / "m.jsonl"), settings(output, **values))


def test_lines_come_back_and_the_last_one_counts(tmp_path):
    manifest = Manifest(tmp_path / "m.jsonl")
    manifest.append(line(status="failed", error="no", kind="crash"))
    manifest.append(line(attempt=2, metrics={"psnr": float("nan"), "ssim": 0.5}))
    manifest.append(line("ü/\udcff.png"))
    first = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])
    assert {"input", "hash", "status", "seconds", "attempt", "metrics", "error"} <= set(first)
    again = Manifest(tmp_path / "m.jsonl")
    assert again.last["a.png"] == line(attempt=2, metrics={"psnr": None, "ssim": 0.5})
    assert "ü/\udcff.png" in again.last
    assert again.attempts("a.png", "h-a.png", "c") == 1 and again.attempts("a.png", "h-a.png", "other") == 0


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_by_a_kill_is_no_line(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    Manifest(path).append(line())
    whole = path.read_bytes()
    Manifest(path).append(line("b.png"))
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    Manifest(path, repair=False)
    assert len(path.read_bytes()) == len(whole) + cut
    manifest = Manifest(path)
    assert list(manifest.last) == ["a.png"] and path.read_bytes() == whole
    manifest.append(line("b.png"))
    assert list(Manifest(path).last) == ["a.png", "b.png"]


def test_a_damaged_line_is_said_and_left_out(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    Manifest(path).append(line())
    path.write_bytes(b'garbage\n{"input": 3}\n' + path.read_bytes())
    assert list(Manifest(path).last) == ["a.png"]
    assert "line 1: not a line of a manifest" in caplog.text and "line 2" in caplog.text


def test_what_is_left_to_do(tmp_path):
    manifest = Manifest(tmp_path / "m.jsonl")
    for name in ("done", "lost", "changed"):
        manifest.append(line(name))
        if name != "lost":
            (tmp_path / "objects" / name).mkdir(parents=True)
    manifest.append(line("bad", "failed", kind="input"))
    manifest.append(line("crashed", "failed", kind="crash"))
    for attempt in (1, 2):
        manifest.append(line("spent", "failed", attempt, kind="timeout"))
    manifest.append(line("gone"))
    names = ["bad", "changed", "crashed", "done", "lost", "new", "spent"]
    hashes = {name: f"h-{name}" for name in names} | {"changed": "h-2"}
    plan = plan_of(tmp_path, names, hashes=hashes)
    assert {task.input: task.attempt for task in plan.tasks} == {"changed": 1, "crashed": 2, "lost": 1, "new": 1}
    assert (plan.finished, plan.given_up, plan.gone, plan.changed) == (
        ["done"],
        ["bad", "spent"],
        ["gone"],
        ["changed"],
    )
    again = plan_of(tmp_path, names, hashes=hashes, retry_failed=True)
    assert {task.input: task.attempt for task in again.tasks}["spent"] == 3
    more = plan_of(tmp_path, names, hashes=hashes, max_retries=2)
    assert "spent" in {task.input for task in more.tasks} and more.given_up == ["bad"]
    other = plan_of(tmp_path, names, hashes=hashes, fingerprint="d")
    assert len(other.tasks) == len(names) and "done" in other.changed


def test_a_retry_goes_on_after_a_crash_and_begins_anew_after_an_error(tmp_path):
    manifest = Manifest(tmp_path / "m.jsonl")
    manifest.append(line("crash", "failed", kind="crash"))
    manifest.append(line("error", "failed", kind="error"))
    tasks = {task.input: task.afresh for task in plan_of(tmp_path, ["crash", "error"]).tasks}
    assert tasks == {"crash": False, "error": True}


def test_equal_images_are_done_once(tmp_path):
    hashes = {"a": "same", "b": "same", "c": "other", "d": None, "e": None}
    plan = plan_of(tmp_path, "abcde", hashes=hashes)
    assert [task.input for task in plan.tasks] == ["a", "c", "d", "e"]
    assert [task.input for task in plan.copies["a"]] == ["b"]
    # A finished one leads, whatever its name.
    (tmp_path / "objects" / "b").mkdir(parents=True)
    Manifest(tmp_path / "m.jsonl").append(Line("b", "same", "done", 1.0, 1, config="c", output="objects/b"))
    assert [task.input for task in plan_of(tmp_path, "abcde", hashes=hashes).copies["b"]] == ["a"]


def test_the_fingerprint_is_of_what_matters():
    def config(**values) -> ExperimentConfig:
        return ExperimentConfig(data=SingleImageConfig(image_path="a.png"), **values)

    plain = fingerprint(config())
    assert fingerprint(config(tag="other", trial_dir="x", resume="y", exp_root_dir="z")) == plain
    assert fingerprint(config(seed=1)) != plain
