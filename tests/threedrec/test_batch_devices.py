"""Several workers of the local engine: which device each has, what it reads ahead, and what a failure leaves alone."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import spheres  # noqa: F401 - registers the guidance that the config names
import torch
from batch_fakes import FAKE
from tiny_run import CONFIG

from threedrec.batch import BatchOptions, Outcome, Task, engine_local, run_batch
from threedrec.batch.dispatch import GPU, SIDE, Dispatcher, Interrupts
from threedrec.batch.engine_local import LocalPool, environment, worker_devices
from threedrec.errors import InputError
from threedrec.threads import PINNED


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "gpu, share, devices",
    [
        ("auto", None, ["0"]),
        ("auto", 0.5, ["0", "0"]),
        ("1", None, ["1"]),
        ("0,1", None, ["0", "1"]),
        ("1,0,1,", 0.3, ["1", "1", "1", "0", "0", "0"]),
        ("cpu", None, ["cpu"]),
        ("cpu", 1, ["cpu"]),
    ],
)
def test_every_gpu_that_is_named_gets_workers(two_gpus, gpu, share, devices):
    assert worker_devices(gpu, share) == devices


def test_gpus_left_idle_are_told_of(two_gpus, caplog):
    with caplog.at_level("INFO", "threedrec"):
        worker_devices("auto", None)
    assert "2 GPUs, of which one is used; --gpu 0,1 uses all" in caplog.text


@pytest.mark.parametrize(
    "gpu, share, words",
    [
        ("0,2", None, "no GPU 2"),
        ("cpu,0", None, "--gpu cpu,0: expected"),
        ("x", None, "--gpu x: expected"),
        ("cpu", 0.5, "there is no GPU to share"),
    ],
)
def test_devices_that_are_not_there(two_gpus, gpu, share, words):
    with pytest.raises(InputError, match=words):
        worker_devices(gpu, share)


def test_a_worker_sees_its_gpu_alone_and_takes_its_part_of_the_cores(monkeypatch):
    monkeypatch.delenv(PINNED, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert environment("1", 4) == {"CUDA_VISIBLE_DEVICES": "1", PINNED: "4"}
    assert environment("cpu", 1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    monkeypatch.setenv(PINNED, "2")
    assert environment("1", 4) == {"CUDA_VISIBLE_DEVICES": "GPU-5f"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("IMAGE", "image.png"))
    (tmp_path / "in").mkdir()
    return tmp_path


def test_two_workers_share_a_batch_and_one_that_dies_costs_its_own_image(folder, monkeypatch):
    monkeypatch.setattr("threedrec.batch.batch.worker_devices", lambda gpu, share: ["cpu", "cpu"])
    for name in ("slow-1.png", "slow-2.png", "crash.png", "3.png", "4.png"):
        (folder / "in" / name).write_bytes(name.encode())
    options = BatchOptions([str(folder / "in")], folder / "out", str(folder / "tiny.yaml"), gpu="cpu", function=FAKE)
    options.max_retries = 0
    report = run_batch(options)
    assert [line.input for line in report.done] == ["3.png", "4.png", "slow-1.png", "slow-2.png"]
    assert [line.kind for line in report.failed] == ["crash"]
    visits = {line.input: (folder / "out" / line.output / "visits.txt").read_text().split() for line in report.done}
    assert visits["slow-1.png"][1] != visits["slow-2.png"][1]
    assert sorted(path.name for path in (folder / "out" / "workers").iterdir()) == ["0.log", "1.log"]


class Recorder:
    """A pool whose workers end in the order in which they began."""

    def __init__(self, lanes):
        self._lanes, self._busy, self.given = lanes, [], []

    def lanes(self):
        return self._lanes

    def free(self):
        return [number for number in self._lanes if number not in self._busy]

    def submit(self, worker, task):
        self._busy.append(worker)
        self.given.append((worker, task.image, task.next_image))

    def wait(self, seconds):
        worker = self._busy.pop(0)
        return [(worker, Outcome("done"))]

    def progress(self, worker):
        return "fake", 0, 1

    def close(self):
        pass


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_read_ahead_what_they_will_be_given(workers):
    pool = Recorder(dict.fromkeys(range(workers), GPU))
    tasks = [Task(str(number), f"{number}.png", "", "", "", "") for number in range(8)]
    Dispatcher(pool, lambda task, outcome: None, Interrupts()).run(tasks)
    expected = {}
    for worker, image, ahead in pool.given:
        assert expected.get(worker, image) == image
        expected[worker] = ahead
    assert len(pool.given) == 8 and set(expected.values()) == {""}


def test_a_finisher_on_every_device(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        engine_local, "Process", lambda function, log, variables: started.append(variables) or SimpleNamespace()
    )
    pool = LocalPool(FAKE, tmp_path / "logs", ["0", "1"], overlap=True)
    assert list(pool.lanes().values()) == [GPU, GPU, SIDE, SIDE]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in started] == ["0", "1", "0", "1"]


@pytest.fixture(scope="module")
def benchmark(repository):
    folder = repository / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_of_batches", folder / "batch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


def test_images_an_hour_are_counted_after_the_pipeline_is_full(benchmark):
    whole = benchmark.Setting.parse("2x2")
    assert (whole.gpus, whole.per_gpu, whole.finisher, str(whole)) == (2, 2, False, "2x2")
    assert benchmark.seconds_an_image([50.0, 50.0, 52.0, 60.0], whole) == 15.0
    # Two GPUs: the first two images fill the pipelines, then each GPU gives one every 30 s.
    assert benchmark.seconds_an_image([48.0, 48.0, 78.0, 78.0], benchmark.Setting.parse("2x1+")) == 15.0


def test_efficiency_is_against_one_gpu_that_works_the_same_way(benchmark):
    def result(gpus, per_gpu, rate):
        return {"gpus": gpus, "per_gpu": per_gpu, "finisher": False, "images_per_hour": rate}

    results = [result(1, 1, 100.0), result(2, 1, 190.0), result(2, 2, 250.0)]
    assert [benchmark.efficiency(entry, results) for entry in results] == [1.0, 0.95, None]


def test_which_workers_a_setting_has(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_local, "Process", lambda function, log, variables: SimpleNamespace())
    devices = ["0", "0", "1", "1"]
    pool = LocalPool(FAKE, tmp_path / "logs", devices, overlap=True)
    bench = benchmark.Bench(pool, devices, tmp_path, tmp_path / "a.png", Interrupts(), 0.0)
    parse = benchmark.Setting.parse
    assert bench.workers(parse("1x1")) == [0] and bench.workers(parse("2x1")) == [0, 2]
    assert bench.workers(parse("2x2")) == [0, 1, 2, 3] and bench.workers(parse("2x1+")) == [0, 2, 4, 5]
