"""The Ray engine on a cluster of this machine, with workers on the CPU."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import spheres  # noqa: F401 - registers the guidance that the config names
from batch_fakes import FAKE, TINY
from mixed_images import picture
from test_batch_local import visits, wait_for
from tiny_run import CONFIG

from nvsadapter_guidance.model import MINI_MODEL
from threedrec.batch import BatchOptions, Manifest, run_batch
from threedrec.batch.engine_ray import connect, device_type
from threedrec.batch.weight_share import SharedWeights, place, shared_weights
from threedrec.config import dump_config, load_config
from threedrec.errors import InputError

without_ray = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(without_ray, reason="the package ray is not installed (extra `cluster`)")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    (tmp_path / "in").mkdir()
    # Ray counts cores; on a small machine the workers of a test share them.
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
    return tmp_path


def options_for(folder: Path, **values) -> BatchOptions:
    common = {"config": str(folder / "tiny.yaml"), "engine": "ray", "gpus_per_task": 0, "function": FAKE, "workers": 4}
    return BatchOptions([str(folder / "in")], folder / "out", **{**common, **values})


@needs_ray
@pytest.mark.slow
def test_images_that_kill_their_worker_are_tried_again_elsewhere(folder):
    names = ["1.png", "2.png", "3.png", "4.png", "hang-once.png", "killed-once.png", "raise.png"]
    for name in names:
        (folder / "in" / name).write_bytes(name.encode())
    report = run_batch(options_for(folder, max_retries=1, timeout=25.0))
    done = {line.input: line.attempt for line in report.done}
    assert done == {**dict.fromkeys(names[:4], 1), "hang-once.png": 2, "killed-once.png": 2}
    assert {line.input: line.kind for line in report.failed} == {"raise.png": "error"}
    tried = [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]
    kinds = {line["input"]: line["kind"] for line in tried if line["status"] == "failed"}
    assert kinds == {"hang-once.png": "timeout", "killed-once.png": "crash", "raise.png": "error"}
    first, second = visits(folder, "killed-once.png")
    assert first[1] != second[1]
    # The manifest outlives the cluster: another one goes on, and finds nothing left to do but what has failed.
    lines = (folder / "out" / "manifest.jsonl").read_text()
    again = run_batch(options_for(folder, max_retries=1, resume=True))
    assert len(again.done) == 6 and (folder / "out" / "manifest.jsonl").read_text() == lines


def own_worker() -> int:
    """The process of the only worker of the cluster that this process has started; others may have clusters too."""
    (worker,) = [number for number in processes(b"ray::Worker") if os.getpid() in ancestors(number)]
    return worker


def processes(name: bytes) -> list[int]:
    """Processes with this in the name of their program."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name in command.read_bytes().split(b"\0")[0]:
                found.append(int(command.parent.name))
    return found


def ancestors(process: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found = []
    with contextlib.suppress(OSError):  # it has just ended
        while process > 1:
            process = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{process}/status").read_text())[1])
            found.append(process)
    return found


@needs_ray
@pytest.mark.slow
def test_a_worker_killed_in_the_middle_goes_on_from_its_checkpoint(folder):
    picture(1).save(folder / "in" / "a.png")
    overrides = [
        "trainer.max_steps=400",
        "system.guidance.warm_start.fit_steps=200",
        "checkpoint.every_n_train_steps=2",
    ]
    checkpoint = folder / "out" / "objects" / "a.png" / "ckpts" / "last.ckpt"
    killed = []

    def kill_the_worker() -> None:
        wait_for(checkpoint, 120.0)
        time.sleep(1.0)
        killed.append(own_worker())
        os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_worker)
    thread.start()
    report = run_batch(options_for(folder, function=TINY, workers=1, overrides=overrides))
    thread.join()
    (line,) = report.done
    assert line.attempt == 2
    log = (folder / "out" / "objects" / "a.png" / "log.txt").read_text()
    assert "attempt 2, on cpu, resumed" in log and log.count("stage views\n") == 1


@needs_ray
@pytest.mark.slow
def test_a_cluster_without_room_and_an_address_without_cluster(folder):
    (folder / "in" / "a.png").write_bytes(b"a")
    with pytest.raises(InputError, match="no room for a worker now; with --workers N"):
        run_batch(options_for(folder, gpus_per_task=1, workers=None))
    import ray

    ray.shutdown()
    with pytest.raises(InputError, match="--address 127.0.0.1:1: no Ray cluster there"):
        run_batch(options_for(folder, address="127.0.0.1:1"))


def test_without_ray_the_engine_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--engine ray: the package 'ray' is not installed; pip install -e"):
        connect(options_for(folder))


def test_the_device_is_what_the_workers_get(folder):
    assert device_type(options_for(folder, gpus_per_task=0)) == "cpu"
    assert device_type(options_for(folder, gpus_per_task=0.25)) == "cuda"


def test_weights_reach_a_machine_without_them(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in ("model.ckpt", "model.yaml"):
        (tmp_path / "here" / name).write_bytes(name.encode() * 100)
    files = (("model.ckpt", 1000), ("model.yaml", 1000))
    shared = SharedWeights(str(tmp_path / "here" / "model.ckpt"), str(tmp_path / "here"), files, "pretrained")
    assert shared.is_here()
    contents = list(shared.contents())
    (tmp_path / "here").rename(tmp_path / "away")
    assert not shared.is_here()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
    for _ in range(2):
        values = place(shared, contents)
        target = Path(values["system"]["guidance"]["pretrained"])
        assert target.read_bytes() == b"model.ckpt" * 100 and target.is_relative_to(tmp_path / "disk")
    assert target.with_name("model.yaml").read_bytes() == np.asarray(contents[1]).tobytes()


def test_which_weights_travel(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((MINI_MODEL / name).read_bytes())

    def config(pretrained: str) -> str:
        overrides = ["recipe=mini-cpu", f"system.guidance.pretrained={pretrained}"]
        dump_config(load_config("configs/nvsadapter.yaml", overrides), tmp_path / "config.yaml")
        return str(tmp_path / "config.yaml")

    assert shared_weights(config("mini")) is None  # every machine has the package
    shared = shared_weights(config(str(folder)))
    assert shared is not None and shared.source == str(folder)
    assert "model.safetensors" in dict(shared.files) and shared.is_here()


@needs_ray
@pytest.mark.slow
def test_an_interrupted_ray_batch_checkpoints(folder):
    for name in ("slow-1.png", "slow-2.png"):
        (folder / "in" / name).write_bytes(name.encode())

    def interrupt() -> None:
        wait_for(folder / "out" / "objects" / "slow-1.png" / "visits.txt")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    report = run_batch(options_for(folder, workers=2))
    thread.join()
    assert report.interrupted and set(report.left) == {"slow-1.png", "slow-2.png"}
    assert not Manifest(folder / "out" / "manifest.jsonl").last


@needs_ray
@pytest.mark.slow
def test_a_connection_of_before_is_left_as_it_was(folder):
    import ray

    (folder / "in" / "a.png").write_bytes(b"a")
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    ray.init(address="local", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        assert len(run_batch(options_for(folder, workers=1)).done) == 1
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    run_batch(options_for(folder, workers=1, resume=True, gpus_per_task=None))
    assert not ray.is_initialized()


RUNNER = """
import sys, spheres
from threedrec.batch import BatchOptions, run_batch
folder = sys.argv[1]
run_batch(BatchOptions([folder + "/in"], folder + "/out", folder + "/tiny.yaml", engine="ray", gpus_per_task=0,
                       workers=2, function="batch_fakes:fake", resume=True))
"""


def start(folder: Path) -> subprocess.Popen:
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    # So soon a process ends whose cluster has lost its head; Ray's own default is a minute.
    environment = {**os.environ, "PYTHONPATH": path, "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    return subprocess.Popen([sys.executable, "-c", RUNNER, str(folder)], env=environment, stderr=subprocess.PIPE)


@needs_ray
@pytest.mark.slow
def test_a_batch_whose_head_dies_is_gone_on_with_on_another(folder):
    names = ["1.png", "2.png", "slow-3.png", "slow-4.png"]
    for name in names:
        (folder / "in" / name).write_bytes(name.encode())
    process = start(folder)
    wait_for(folder / "out" / "objects" / "slow-3.png" / "visits.txt")
    head = [number for number in processes(b"gcs_server") if process.pid in ancestors(number)]
    os.kill(head[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    done = {line.input for line in Manifest(folder / "out" / "manifest.jsonl").last.values()}
    assert done == {"1.png", "2.png"}
    process = start(folder)
    process.communicate(timeout=120)
    assert process.returncode == 0
    manifest = (folder / "out" / "manifest.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["input"] for line in manifest) == names
    assert len(visits(folder, "1.png")) == 1 and len(visits(folder, "slow-3.png")) == 2
