"""A killed run goes on as if nothing had happened."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from tiny_run import Reconstruction, tiny_config, write_inputs

from threedrec.errors import InputError
from threedrec.loop import LoopRunner
from threedrec.stages import plan


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_inputs(folder)
    Reconstruction(tiny_config(config), folder / "run", "cpu").train()
    return config, folder / "run"


def finish(config: Path, run_dir: Path) -> None:
    last = run_dir / "ckpts" / "last.ckpt"
    Reconstruction(tiny_config(config, f"resume={last}"), run_dir, "cpu").train()


def assert_same(run_dir: Path, expected: Path) -> None:
    for name in ("model.ply", "model.obj", "model.png", "fine-val.png", "turntable.png"):
        assert (run_dir / "save" / name).read_bytes() == (expected / "save" / name).read_bytes(), name
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (run_dir, expected))
    for values in (ours, theirs):
        del values["mesh"]["seconds"]
    for key in ("reference", "mesh", "losses", "model"):
        assert ours[key] == theirs[key], key
    assert set(ours["stages"]) == set(theirs["stages"])


# "fit" 3 and "coarse" 1 lie between checkpoints, "fine" 4 is a checkpoint's last step before it is written.
@pytest.mark.parametrize(("stage", "step"), [("fit", 0), ("fit", 3), ("coarse", 1), ("fine", 3), ("fine", 4)])
def test_killed_within_a_stage(uninterrupted, tmp_path, monkeypatch, stage, step):
    config, expected = uninterrupted
    descend = LoopRunner._descend

    def die(self, loop, result, index):
        descend(self, loop, result, index)
        if (loop.stage, index) == (stage, step):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LoopRunner, "_descend", die)
        with pytest.raises(Killed):
            Reconstruction(tiny_config(config), tmp_path / "run", "cpu").train()
    finish(config, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("stage", ["views", "fit", "coarse", "fine", "test", "mesh"])
def test_killed_between_stages(uninterrupted, tmp_path, monkeypatch, stage):
    config, expected = uninterrupted

    def stop(run):
        names = [entry.name for entry in plan(run)]
        return plan(run)[: names.index(stage)]

    with monkeypatch.context() as patch:
        patch.setattr("threedrec.reconstruct.plan", stop)
        Reconstruction(tiny_config(config), tmp_path / "run", "cpu").train()
    finish(config, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


def test_killed_by_the_system_while_a_checkpoint_is_written(uninterrupted, tmp_path):
    config, expected = uninterrupted
    program = [sys.executable, str(Path(tiny_run.__file__)), str(config), str(tmp_path / "run"), "fine", "4"]
    killed = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "save" / "model.glb").exists()
    finish(config, tmp_path / "run")
    assert_same(tmp_path / "run", expected)


@pytest.mark.gpu
def test_a_checkpoint_is_read_on_the_cpu_and_copied_to_the_device(uninterrupted, tmp_path):
    config, run_dir = uninterrupted
    resume = f"resume={run_dir / 'ckpts' / 'last.ckpt'}"
    run = Reconstruction(tiny_config(config, resume), tmp_path / "run", "cuda")._open()
    assert all(value.device.type == "cpu" for value in run.resumed.model.values())
    assert all(value.device.type == "cuda" for value in run.scene.state_dict().values())


def test_a_finished_run_has_nothing_left_to_do(uninterrupted, tmp_path, monkeypatch):
    config, run_dir = uninterrupted
    monkeypatch.setattr(LoopRunner, "run", lambda *_: pytest.fail("a step was done again"))
    before = (run_dir / "save" / "model.glb").stat().st_mtime_ns
    finish(config, run_dir)
    assert (run_dir / "save" / "model.glb").stat().st_mtime_ns == before


def test_another_config_is_refused(uninterrupted, tmp_path):
    config, run_dir = uninterrupted
    other = tiny_config(
        config, f"resume={run_dir / 'ckpts' / 'last.ckpt'}", "system.geometry.mlp_network_config.n_neurons=9"
    )
    with pytest.raises(InputError, match=r"another shape of `renderer.geometry.*parsed"):
        Reconstruction(other, tmp_path / "run", "cpu").train()
