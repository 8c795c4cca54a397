"""Whole batches of real, tiny reconstructions: killed, resumed, warm, and looked at."""

import csv
import html.parser
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import spheres
from batch_fakes import TINY
from mixed_images import GOOD_NAMES, write_mixed_images
from PIL import Image
from tiny_run import CONFIG, write_inputs

from threedrec.batch import BatchOptions, Line, Task, reconstruct, run_batch
from threedrec.batch.gallery import write_gallery
from threedrec.batch.hosting import WarmHost
from threedrec.batch.summary import write_summary
from threedrec.config import dump_config, load_config
from threedrec.host import GuidancePool, Host, Interrupted
from threedrec.loop import LoopRunner

SMALL = ("trainer.max_steps=5", "system.guidance.warm_start.fit_steps=3", "system.exporter.isosurface_resolution=16")
RUNNER = """
import sys, spheres
from threedrec.batch import BatchOptions, run_batch
images, output, config, *values = sys.argv[1:]
run_batch(BatchOptions([images], output, config, values, gpu="cpu", function="batch_fakes:tiny", resume=True))
"""


def start(folder: Path, output: Path) -> subprocess.Popen:
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", RUNNER, str(folder / "in"), str(output), str(folder / "tiny.yaml"), *SMALL]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def settled(output: Path) -> list[dict]:
    path = output / "manifest.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def final(output: Path) -> dict[str, dict]:
    """The last line of each input, without what no two runs share."""
    last = {}
    for line in settled(output):
        line.pop("seconds")
        line["metrics"].pop("stages", None)
        line["metrics"].pop("peak_memory_gb", None)
        last[line["input"]] = line
    return last


def kill_and_resume(folder: Path, output: Path, kills: int, rng: random.Random, count: int) -> None:
    """Kill -9 the batch at random moments, each time after it has settled some more images; then let it end."""
    for number in range(kills):
        process = start(folder, output)
        goal = (number + 1) * count // (kills + 1) - rng.randrange(2)
        while len(settled(output)) < goal:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        time.sleep(rng.random())
        process.kill()
        process.communicate()
    process = start(folder, output)
    _, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err


def check_killed_batch(folder: Path, good: int, bad: int, kills: int) -> None:
    write_mixed_images(folder / "in", good, bad)
    (folder / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    kill_and_resume(folder, folder / "out", kills, random.Random(0), good + bad)
    lines = settled(folder / "out")
    done = [line["input"] for line in lines if line["status"] == "done"]
    assert len(done) == good and len(set(done)) == good  # nothing done twice, nothing lost
    failed = [line for line in lines if line["status"] == "failed"]
    assert len({line["input"] for line in failed}) == len(failed) == bad
    assert all(line["error"] and line["kind"] == "input" for line in failed)
    process = start(folder, folder / "straight")
    assert process.communicate(timeout=3600) and process.returncode == 0
    assert final(folder / "out") == final(folder / "straight")
    for name in done:
        ours, theirs = (folder / out / "objects" / name / "save" / "model.ply" for out in ("out", "straight"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_killed_batch_ends_as_if_nothing_had_happened(tmp_path):
    check_killed_batch(tmp_path, good=2, bad=10, kills=1)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("THREEDREC_LONG"), reason="takes five minutes; THREEDREC_LONG=1 runs it")
def test_a_hundred_images_killed_three_times(tmp_path):
    check_killed_batch(tmp_path, good=80, bad=20, kills=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The resolved config of a batch, beside the image of four spheres."""
    folder = tmp_path_factory.mktemp("config")
    loaded = load_config(write_inputs(folder), SMALL)
    loaded.data.image_path, loaded.tag = "", "batch"
    dump_config(loaded, folder / "config.yaml")
    return folder / "config.yaml"


def task_of(config: Path, folder: Path, **values) -> Task:
    image = str(config.parent / "spheres.png")
    task = Task("spheres.png", image, "h", str(folder), str(config), "c", device="cpu")
    return replace(task, **values)


def test_one_guidance_serves_many_images(config, tmp_path, monkeypatch):
    prepared = []
    prepare = spheres.SphereGuidance.prepare
    monkeypatch.setattr(spheres.SphereGuidance, "prepare", lambda self, view: (prepared.append(1), prepare(self, view)))
    host = Host()
    meshes = []
    for name in ("first", "second"):
        outcome = reconstruct(task_of(config, tmp_path / name), host)
        assert outcome.status == "done", outcome.error
        meshes.append((tmp_path / name / "save" / "model.ply").read_bytes())
    assert host.guidances.loads == 1 and len(prepared) == 2
    assert meshes[0] == meshes[1]


def test_another_guidance_takes_the_place_of_the_first():
    pool, device = GuidancePool(), "cpu"
    first = pool.get("spheres-guidance", spheres.SphereGuidance.Config(), device)
    assert pool.get("spheres-guidance", spheres.SphereGuidance.Config(), device) is first
    assert pool.get("spheres-guidance", spheres.SphereGuidance.Config(noise=0.1), device) is not first
    assert pool.loads == 2


def test_an_interrupted_task_goes_on_from_the_step_it_had_reached(config, tmp_path, monkeypatch):
    steps = []
    descend = LoopRunner._descend

    def counted(self, loop, result, index):
        steps.append((loop.stage, index))
        descend(self, loop, result, index)

    monkeypatch.setattr(LoopRunner, "_descend", counted)
    assert reconstruct(task_of(config, tmp_path / "whole"), Host()).status == "done"
    expected, steps[:] = list(steps), []
    stopped = reconstruct(task_of(config, tmp_path / "run"), Host(stop=lambda: ("fit", 1) in steps))
    assert stopped.status == "interrupted" and steps[-1] == ("fit", 1)
    assert reconstruct(task_of(config, tmp_path / "run"), Host()).status == "done"
    assert steps == expected
    runs = [(tmp_path / name / "save" / "model.ply").read_bytes() for name in ("whole", "run")]
    assert runs[0] == runs[1]


def test_two_halves_make_a_whole(config, tmp_path):
    assert reconstruct(task_of(config, tmp_path / "run", part="optimise"), Host()).status == "halfway"
    assert not (tmp_path / "run/save/model.ply").exists() and not (tmp_path / "run/save/turntable.png").exists()
    host = Host()
    outcome = reconstruct(task_of(config, tmp_path / "run", part="finish"), host)
    assert outcome.status == "done" and host.guidances.loads == 0
    assert (tmp_path / "run/save/model.ply").exists() and {"coarse", "mesh"} <= set(outcome.metrics["stages"])


@pytest.mark.parametrize("change", [{"hash": "other"}, {"fingerprint": "other"}, {"afresh": True}])
def test_a_checkpoint_of_something_else_is_not_gone_on_from(config, tmp_path, change):
    reconstruct(task_of(config, tmp_path / "run", part="optimise"), Host())
    (tmp_path / "run" / "leftover").write_text("")
    host = Host(stop=lambda: True)
    assert reconstruct(task_of(config, tmp_path / "run", **change), host).status == "interrupted"
    assert not (tmp_path / "run" / "leftover").exists()


def test_a_folder_of_somebody_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    outcome = reconstruct(task_of(config, tmp_path / "run"), Host())
    assert outcome.status == "failed" and "holds files that are not of a batch" in outcome.error
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("leftover", [".task.json.0bbfd16a-1394.tmp.json", ".writable-k3v9"])
def test_a_folder_whose_claim_was_cut_by_a_kill_is_taken(config, tmp_path, leftover):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / leftover).write_text("")
    host = Host(stop=lambda: True)
    assert reconstruct(task_of(config, tmp_path / "run"), host).status == "interrupted"
    assert not (tmp_path / "run" / leftover).exists()


def test_the_next_image_is_read_ahead(config, tmp_path):
    given = []

    def function(task: Task, host: Host):
        given.append(host.support.path if host.support else None)
        raise Interrupted

    image = str(config.parent / "spheres.png")
    host = WarmHost(function, lambda stage, done, total: None)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for upcoming in (image, str(tmp_path / "bad.png"), ""):
        assert host.work(task_of(config, tmp_path, next_image=upcoming)).status == "interrupted"
    assert given == [None, image, None]


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]


def test_the_gallery_needs_no_network_and_all_its_links_lead_somewhere(tmp_path):
    (tmp_path / "in" / "<b>").mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 4), 128, np.uint8)).save(tmp_path / "in" / "<b>" / "a#1?.png")
    save = tmp_path / "out" / "objects" / "a#1?.png" / "save"
    save.mkdir(parents=True)
    for name in ("turntable.mp4", "model.glb"):
        (save / name).write_bytes(b"x")
    metrics = {"psnr": 21.234, "faces": 50000, "stages": {"fine": 2.5, "mesh": 1.0}, "watertight": True}
    lines = [
        Line("<b>/a#1?.png", "ab" * 32, "done", 3.25, 1, metrics, output="objects/a#1?.png"),
        Line("bad & ugly.png", None, "failed", 0.1, 3, error="<script>alert(1)</script>", kind="input"),
    ]
    write_summary(lines, tmp_path / "out" / "summary.csv")
    (tmp_path / "out" / "manifest.jsonl").write_text("")
    write_gallery(lines, tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "2 images: 1 done, 1 failed" in text and "21.23 dB" in text and "50,000" in text
    assert "<script" not in text and "&lt;script&gt;" in text and "://" not in text
    parser = Links()
    parser.feed(text)
    assert len(parser.links) == 5
    for link in parser.links:
        assert (tmp_path / "out" / unquote(link)).is_file(), link
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open(newline="")))
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert rows[0]["psnr"] == "21.234" and rows[0]["seconds_fine"] == "2.5" and rows[1]["psnr"] == ""


def test_a_long_gallery_has_pages(tmp_path):
    lines = [Line(f"{number}.png", None, "failed", 0.0, 1, error="no") for number in range(1001)]
    write_gallery(lines, tmp_path, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["index-2.html", "index-3.html", "index.html"]
    assert len(re.findall('class="card', (tmp_path / "index-3.html").read_text())) == 1


def test_the_command_ends_with_1_when_an_image_failed(tmp_path):
    write_mixed_images(tmp_path / "in", 0, 2)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    code = "import sys, spheres\nfrom threedrec.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--gpu", "cpu"]
    command += ["--config", str(tmp_path / "tiny.yaml"), "trainer.max_steps=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1, ended.stderr
    assert "0 done, 2 failed, 0 left" in ended.stderr
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert again.returncode == 1 and "2 failed before (--retry-failed tries them again)" in again.stderr


def test_names_of_good_images_are_what_people_have():
    assert any(not name.isascii() for name in GOOD_NAMES) and any("/" in name for name in GOOD_NAMES)


def test_options_of_a_batch_in_python(tmp_path):
    write_mixed_images(tmp_path / "in", 1, 0)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    options = BatchOptions([str(tmp_path / "in")], tmp_path / "out", str(tmp_path / "tiny.yaml"), SMALL, gpu="cpu")
    options.function = TINY
    report = run_batch(options)
    (line,) = report.done
    assert line.metrics["model"] == "true views of four spheres" and line.seconds > 0
    assert (tmp_path / "out" / line.output / "save" / "model.glb").is_file()
    assert "turntable" in (tmp_path / "out" / "index.html").read_text()
