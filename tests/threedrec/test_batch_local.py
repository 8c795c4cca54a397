"""The local engine: an image that misbehaves costs only itself, and an interrupted batch goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import spheres  # noqa: F401 - registers the guidance that the config names
from batch_fakes import FAKE
from tiny_run import CONFIG

from threedrec.batch import BatchOptions, Manifest, run_batch
from threedrec.batch.batch import _Sitting
from threedrec.batch.inputs import find_inputs
from threedrec.batch.plan import Plan, Settings
from threedrec.batch.view import printable
from threedrec.errors import InputError

RUNNER = """
import sys, spheres
from threedrec.batch import BatchOptions
from threedrec.batch_command import run
from threedrec.terminal import guarded, setup_logging
setup_logging()
images, output, config, *flags = sys.argv[1:]
options = BatchOptions([images], output, config, gpu="cpu", function="batch_fakes:fake", resume="resume" in flags)
code = 0
def go():
    global code
    code = run(options)
sys.exit(guarded(go, resume_hint="go on") or code)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    (tmp_path / "in").mkdir()
    return tmp_path


def images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / "in" / name).write_bytes(name.encode())


def batch(folder: Path, **values):
    options = {"config": str(folder / "tiny.yaml"), "gpu": "cpu", "function": FAKE, **values}
    return run_batch(BatchOptions([str(folder / "in")], folder / "out", **options))


def visits(folder: Path, name: str) -> list[list[str]]:
    return [line.split() for line in (folder / "out/objects" / name / "visits.txt").read_text().splitlines()]


def runner(folder: Path, *flags: str) -> subprocess.Popen:
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", RUNNER, str(folder / "in"), str(folder / "out"), str(folder / "tiny.yaml"), *flags]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_misbehaving_images_cost_only_themselves(folder):
    images(folder, "1.png", "crash.png", "exit.png", "hang.png", "killed.png", "raise.png", "same.png", "z.png")
    (folder / "in" / "same2.png").write_bytes(b"same.png")
    report = batch(folder, max_retries=0, timeout=6.0)
    assert [line.input for line in report.done] == ["1.png", "same.png", "same2.png", "z.png"]
    failures = {line.input: line for line in report.failed}
    assert {name: line.kind for name, line in failures.items()} == {
        "crash.png": "crash",
        "exit.png": "crash",
        "hang.png": "timeout",
        "killed.png": "memory",
        "raise.png": "error",
    }
    words = {
        "crash.png": "SIGSEGV",
        "exit.png": "ended with code 3",
        "hang.png": "no end after 6 s (stage fake, 1 of 3)",
        "killed.png": "lack of memory",
        "raise.png": "ValueError: a fault of the program (batch_fakes.py, line",
    }
    for name, text in words.items():
        assert text in failures[name].error and "\n" not in failures[name].error
    assert not report.left and not report.interrupted
    assert (folder / "out/objects/same2.png/visits.txt").read_text() == (
        folder / "out/objects/same.png/visits.txt"
    ).read_text()
    assert next(line for line in report.done if line.input == "same2.png").copy_of == "same.png"
    # One process served all images up to the first that ended it.
    assert visits(folder, "1.png")[0][1] == visits(folder, "crash.png")[0][1] != visits(folder, "exit.png")[0][1]


def test_an_attempt_that_failed_is_repeated_and_finished_work_is_not(folder):
    images(folder, "a.png", "crash-once.png", "raise-once.png")
    report = batch(folder, max_retries=1)
    assert len(report.done) == 3
    assert {line.input: line.attempt for line in report.done} == {"a.png": 1, "crash-once.png": 2, "raise-once.png": 2}
    lines = (folder / "out/manifest.jsonl").read_text()
    with pytest.raises(InputError, match="holds a batch already; add --resume"):
        batch(folder)
    again = batch(folder, resume=True)
    assert len(again.done) == 3 and (folder / "out/manifest.jsonl").read_text() == lines
    # Changed images and a changed config are done again.
    (folder / "in/a.png").write_bytes(b"new")
    batch(folder, resume=True)
    assert len(visits(folder, "a.png")) == 2 and len(visits(folder, "raise-once.png")) == 2
    batch(folder, resume=True, overrides=["seed=5"])
    assert len(visits(folder, "a.png")) == 3


def test_two_processes_share_the_work_on_each_image(folder):
    images(folder, "a.png", "b.png", "raise-once.png")
    report = batch(folder, overlap=True)
    assert [line.status for line in report.done] == ["done"] * 3
    for name in ("a.png", "b.png"):
        (first, second) = visits(folder, name)
        assert (first[2], second[2]) == ("optimise", "finish") and first[1] != second[1]


def test_memory_beyond_the_limit(folder):
    images(folder, "greedy.png", "z.png")
    report = batch(folder, max_retries=0, memory_gb=1.2)
    (failed,) = report.failed
    assert failed.kind == "memory" and "--memory 1.2 is the limit" in failed.error
    assert [line.input for line in report.done] == ["z.png"]


def test_one_interruption_checkpoints_and_two_stop_at_once(folder):
    images(folder, "slow-once.png", "z.png")
    process = runner(folder)
    wait_for(folder / "out/objects/slow-once.png/visits.txt")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopping: 1 tasks end with a checkpoint" in err
    assert err.splitlines()[-1] == "interrupted; go on" and (folder / "out/index.html").exists()
    assert not Manifest(folder / "out/manifest.jsonl").last  # interrupted is neither done nor failed

    (folder / "in/z.png").rename(folder / "in/hang.png")
    (folder / "in/slow-once.png").unlink()
    process = runner(folder, "resume")
    wait_for(folder / "out/objects/hang.png/visits.txt")
    worker = int(visits(folder, "hang.png")[0][1])
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # a task that hangs does not checkpoint
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not alive(worker)


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers end with their batch on Linux only")
def test_a_killed_batch_takes_its_worker_along_and_frees_its_folder(folder):
    images(folder, "hang-once.png")
    process = runner(folder)
    wait_for(folder / "out/objects/hang-once.png/visits.txt")
    with pytest.raises(InputError, match="another batch is at work here"):
        batch(folder, resume=True)
    worker = int(visits(folder, "hang-once.png")[0][1])
    process.kill()
    process.communicate()
    end = time.monotonic() + 5
    while alive(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(worker)
    (folder / "in/hang-once.png").rename(folder / "in/a.png")
    assert [line.input for line in batch(folder, resume=True).done] == ["a.png"]


def test_a_full_disk_ends_the_batch_and_is_what_is_told(folder, monkeypatch):
    def refuse(*values):
        raise InputError("no room for the gallery")

    monkeypatch.setattr("threedrec.batch.batch.write_gallery", refuse)
    images(folder, "full.png")
    with pytest.raises(InputError, match="the disk is full"):
        batch(folder)
    assert not Manifest(folder / "out/manifest.jsonl").last


def test_an_order_to_stop_is_not_kept_waiting_by_the_gallery(folder, monkeypatch):
    def interrupted(self, tasks):
        raise KeyboardInterrupt

    monkeypatch.setattr("threedrec.batch.batch.Dispatcher.run", interrupted)
    monkeypatch.setattr("threedrec.batch.batch.LocalPool", lambda *values: None)
    images(folder, "a.png")
    with pytest.raises(KeyboardInterrupt):
        batch(folder)
    assert not (folder / "out/index.html").exists()


def test_pages_that_take_long_are_written_seldom(folder, monkeypatch):
    monkeypatch.setattr("threedrec.batch.batch.SECONDS_BETWEEN_PAGES", 0.0)
    monkeypatch.setattr("threedrec.batch.batch.write_gallery", lambda *values: time.sleep(0.1))
    images(folder, "a.png")
    sitting = _Sitting(
        find_inputs([str(folder / "in")], folder / "out"),
        {"a.png": None},
        Manifest(folder / "manifest.jsonl"),
        Settings(folder, "", "", 0, False),
        Plan(),
    )
    sitting.write_pages()
    assert sitting._next_pages > time.monotonic() + 4.0


def test_names_are_shown_on_one_line():
    assert printable("a\nb\x1b[31m\udcff ü写.png") == "a�b�[31m� ü写.png"


def test_a_dry_run_writes_nothing(folder):
    images(folder, "a.png", "b.png")
    report = batch(folder, dry_run=True)
    assert report.left == ["a.png", "b.png"] and not (folder / "out").exists()


def test_workers_that_cannot_start_end_the_batch(folder):
    images(folder, "a.png")
    with pytest.raises(InputError, match="workers cannot be started"):
        batch(folder, function="batch_fakes:no_such_function")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"engine": "slurm"}, "--engine slurm: expected local or ray"),
        ({"address": "auto"}, "--address: is of the engine for many workers; add --engine ray"),
        ({"gpus_per_task": 0.5}, "--gpus-per-task 0.5: there is no GPU to share"),
        ({"gpus_per_task": 2}, "--gpus-per-task 2: expected 1 or a share such as 0.5"),
        ({"gpus_per_task": float("nan"), "engine": "ray"}, "--gpus-per-task nan"),
        ({"timeout": float("nan")}, "--timeout nan"),
        ({"memory_gb": float("inf")}, "--memory inf"),
        ({"retry_failed": True}, "--retry-failed: is about a batch that has been begun"),
        ({"gpus_per_task": 1.5, "engine": "ray"}, "--gpus-per-task 1.5: expected a share"),
        ({"max_retries": -1}, "--max-retries -1"),
        ({"timeout": -1}, "--timeout -1"),
        ({"memory_gb": 0.0}, "--memory 0"),
        ({"overrides": ["resume=auto"]}, "resume: is set for every image by the batch; use --resume"),
        ({"overrides": ["trainer.max_step=3"]}, "trainer.max_step: unknown key, did you mean"),
        ({"overrides": ["checkpoint.save_last=false"]}, "checkpoint.save_last"),
        ({"gpu": "first"}, "--gpu first"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(folder, values, words):
    images(folder, "a.png")
    with pytest.raises(InputError) as mistake:
        batch(folder, **values)
    assert words in str(mistake.value) and not (folder / "out").exists()
