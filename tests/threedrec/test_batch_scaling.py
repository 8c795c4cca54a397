"""The page about scaling, its recipes, and the replay behind its numbers."""

import importlib.util
import json
import random
import re
import shlex
import sys

import pytest
import yaml

from threedrec.batch_command import add_arguments
from threedrec.cli import Parser


@pytest.fixture(scope="module")
def scaling(repository):
    spec = importlib.util.spec_from_file_location("simulate_scaling", repository / "scripts" / "simulate_scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_equal_tasks_on_machines_that_stay_take_what_arithmetic_says(scaling):
    found = scaling.replay([10.0] * 12, 4, scaling.Failures(start_seconds=5.0))
    assert (found.seconds, found.useful, found.lost, found.failed) == (35.0, 120.0, 0.0, 0)
    assert found.efficiency == pytest.approx(120 / (4 * 35))


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_a_replay_stays_within_the_bounds_of_greedy_lists(scaling, workers):
    rng = random.Random(workers)
    durations = [rng.uniform(1, 100) for _ in range(50)]
    found = scaling.replay(durations, workers, scaling.Failures())
    least = max(sum(durations) / workers, max(durations))
    assert least <= found.seconds + 1e-9 and found.seconds <= sum(durations) / workers + max(durations)  # Graham 1966
    assert found.useful == pytest.approx(sum(durations))


def test_machines_that_vanish_cost_what_lies_after_checkpoints(scaling):
    durations = [600.0] * 40
    kept = scaling.replay(durations, 4, scaling.Failures(spot_hours=0.5, checkpoint_seconds=30))
    coarse = scaling.replay(durations, 4, scaling.Failures(spot_hours=0.5, checkpoint_seconds=600))
    assert kept.useful == coarse.useful == pytest.approx(sum(durations))
    assert 0 < kept.lost < coarse.lost and kept.failed == 0
    assert scaling.replay(durations, 4, scaling.Failures()).seconds < kept.seconds < coarse.seconds
    assert scaling.replay(durations, 4, scaling.Failures(spot_hours=0.5)) == kept  # the same seed, the same luck


def test_crashes_are_retried_so_often_and_no_more(scaling):
    always = scaling.replay([10.0] * 5, 2, scaling.Failures(crash_rate=1.0, max_retries=2))
    assert always.failed == 5 and always.useful == 0
    some = scaling.replay([10.0] * 200, 2, scaling.Failures(crash_rate=0.2, max_retries=50))
    assert some.failed == 0 and some.useful == pytest.approx(2000)


def test_costs_are_read_from_records_and_what_is_missing_is_said(scaling, tmp_path):
    record = {"device": "cpu, 2 threads", "recipe": "mini-cpu", "overrides": [], "stages": {}}
    record["stages"] = {
        "fit": {"seconds": 40.0, "peak_memory_gb": 1.0},
        "mesh": {"seconds": 10.0, "peak_memory_gb": 2.5},
    }
    slower = json.loads(json.dumps(record))
    slower["stages"]["fit"]["seconds"] = 60.0
    other = {**record, "overrides": ["trainer.max_steps=1"]}
    (tmp_path / "reconstruct.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (record, slower, other)))
    (cost,) = scaling.read_costs(tmp_path / "reconstruct.jsonl")
    assert (cost.seconds, cost.model_seconds, cost.memory_gb, cost.runs) == (60.0, 50.0, 2.5, 2)
    tables = scaling.page_tables(tmp_path)
    assert "| GPU | | not measured yet |" in tables["cost"] and "Sizes: not measured yet." in tables["cost"]
    assert "**not been measured yet** (`benchmarks/batch.py`)" in tables["throughput"]
    # 10^6 images of 60 s are 694.4 days of one worker, which 100 workers do in a week.
    assert "| 1,000,000 | cpu, 2 threads | 694.4 | 100 |" in tables["scales"]


def test_images_an_hour_come_from_the_newest_record_of_each_setting(scaling):
    def record(gpus, rate, date="2026-01-01", **values):
        common = {"device": "X", "gpus": gpus, "per_gpu": 1, "finisher": False, "overrides": [], "images": gpus}
        return {**common, "images_per_hour": rate, "date": date, "recipe": "r", "cores": 8, **values}

    records = [record(1, 50.0), record(1, 100.0), record(2, 190.0, "2026-02-02"), record(2, 1.0, overrides=["a=b"])]
    table = scaling.throughput_table([*records, record(2, 250.0, per_gpu=2)])
    assert "| 1 × X | 1 | 1 | 100 | 100 | 100.0% |" in table and "| 2 × X | 1 | 2 | 190 | 95 | 95.0% |" in table
    assert "| 2 × X | 2 | 2 | 250 | 125 |  |" in table and "recipe r, 8 CPU cores; 2026-02-02." in table


def test_a_worker_spends_what_is_outside_of_stages_once(scaling, tmp_path):
    record = {"device": "X", "recipe": "r", "stages": {"fit": {"seconds": 40.0, "peak_memory_gb": 1.0}}}
    (tmp_path / "r.jsonl").write_text(json.dumps({**record, "total_seconds": 52.0}) + "\n")
    (cost,) = scaling.read_costs(tmp_path / "r.jsonl")
    assert cost.outside == 12.0 and scaling.start_seconds(cost, {"start_seconds": 2.0}) == 14.0


def test_the_page_has_the_numbers_of_the_records(scaling, repository):
    page = (repository / "docs" / "scaling.md").read_text()
    assert scaling.with_tables(page, scaling.page_tables()) == page, (
        "run: python scripts/simulate_scaling.py --write docs/scaling.md"
    )
    assert page.count("<!-- end -->") == 4 and "<!-- end -->\n\n" in page


def command_words(text: str) -> list[str]:
    words = shlex.split(text)
    return words[words.index("batch") + 1 :]


def check_command(text: str) -> None:
    parser = Parser(prog="3drec batch")
    add_arguments(parser)
    options, rest = parser.parse_known_args(command_words(text))
    assert not [word for word in rest if "=" not in word], text
    assert options.engine in ("local", "ray")


def test_every_command_of_the_page_is_one(repository):
    page = (repository / "docs" / "scaling.md").read_text()
    commands = re.findall(r"3drec batch (?:[^`#\n]|\\\n)*", page.replace("objects/$", "$").replace("-o\n", "-o "))
    commands = [command for command in commands if " -o" in command]
    assert len(commands) >= 6
    for command in commands:
        check_command(command)


def test_the_kubernetes_file_is_a_whole_rayjob(repository):
    job = yaml.safe_load((repository / "docs" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    check_command(job["spec"]["entrypoint"])
    assert "--resume" in job["spec"]["entrypoint"] and job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    pods = [cluster["headGroupSpec"], workers]
    for pod in pods:
        assert all(isinstance(value, str) for value in pod["rayStartParams"].values())
        spec = pod["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    claims = {pod["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] for pod in pods}
    assert claims == {"threedrec-data"}
    gpus = int(pods[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    words = command_words(job["spec"]["entrypoint"])
    asked = float(words[words.index("--gpus-per-task") + 1]) * int(words[words.index("--workers") + 1])
    assert asked == gpus * workers["maxReplicas"]
