"""A run whose mesh is begun before the turntable: the same files, and no process left behind."""

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

from threedrec import results, stages
from threedrec.errors import InputError
from threedrec.host import Host, Interrupted
from threedrec.mesh.exporter import Sampled
from threedrec.mesh.side_process import SideProcess
from threedrec.reconstruct import Reconstruction
from threedrec.run import Run


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sampled]]:
    """Begin meshes on the CPU too; what was given up or finished, in the end."""
    found: list[Sampled] = []

    def begin(run: Run) -> None:
        with torch.no_grad():
            run.mesh_ahead = results._exporter(run).begin(run.scene.density, run.device)

    def close(self: Sampled, usual: Any = Sampled.close) -> None:
        usual(self)
        found.append(self)

    monkeypatch.setattr(stages, "begin_export", begin)
    monkeypatch.setattr(Sampled, "close", close)
    yield found


def test_a_mesh_made_ahead_is_the_same(tmp_path: Path, closed: list[Sampled], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.write_inputs(tmp_path)
    Reconstruction(tiny_run.tiny_config(config), tmp_path / "ahead", "cpu").train()
    (ahead,) = closed
    assert ahead.side is not None and ahead.side._process.poll() == 0
    monkeypatch.setattr(stages, "begin_export", lambda run: None)
    Reconstruction(tiny_run.tiny_config(config), tmp_path / "plain", "cpu").train()
    names = sorted(file.name for file in (tmp_path / "plain" / "save").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "ahead" / "save").iterdir())
    for name in ("model.glb", "model.obj", "model.ply", "model.png", "turntable.png"):
        assert (tmp_path / "plain" / "save" / name).read_bytes() == (tmp_path / "ahead" / "save" / name).read_bytes()


def test_a_run_that_stops_in_between_ends_the_process(tmp_path: Path, closed: list[Sampled]) -> None:
    config = tiny_run.write_inputs(tmp_path)
    begun: list[str] = []
    host = Host(stop=lambda: "test" in begun, progress=lambda stage, done, total: begun.append(stage))
    with pytest.raises(Interrupted):
        Reconstruction(tiny_run.tiny_config(config), tmp_path / "run", "cpu", host).train()
    (given_up,) = closed
    assert given_up.side is not None and given_up.side._process.poll() is not None
    assert not (tmp_path / "run" / "save" / "model.glb").exists()


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", ["cuda"])])
def test_only_a_gpu_leaves_the_processors_free(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]
) -> None:
    begun: list[str] = []
    exporter = SimpleNamespace(begin=lambda density, where: begun.append(where.type))
    monkeypatch.setattr(results, "_exporter", lambda run: exporter)
    run: Any = SimpleNamespace(device=torch.device(device), mesh_ahead=None, scene=SimpleNamespace(density=None))
    results.begin_export(run)
    assert begun == expected


def test_a_field_without_a_surface_is_left_to_the_stage_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(density: Any, where: Any) -> None:
        raise InputError("the field is empty")

    monkeypatch.setattr(results, "_exporter", lambda run: SimpleNamespace(begin=begin))
    run: Any = SimpleNamespace(device=torch.device("cuda"), mesh_ahead=None, scene=SimpleNamespace(density=None))
    results.begin_export(run)
    assert run.mesh_ahead is None


def test_without_room_for_a_process_the_mesh_is_made_in_its_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(density: Any, where: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "_exporter", lambda run: SimpleNamespace(begin=begin))
    run: Any = SimpleNamespace(device=torch.device("cuda"), mesh_ahead=None, scene=SimpleNamespace(density=None))
    results.begin_export(run)
    assert run.mesh_ahead is None and "made after the turntable" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_the_mesh_is_begun_before_the_turntable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, begun = tiny_run.write_inputs(tmp_path), []

    def begin(self: Any, samples: Any, options: Any, usual: Any = SideProcess.begin) -> None:
        begun.append((tmp_path / "run" / "save" / "turntable.mp4").exists())
        usual(self, samples, options)

    monkeypatch.setattr(SideProcess, "begin", begin)
    Reconstruction(tiny_run.tiny_config(config), tmp_path / "run", "cuda").train()
    assert begun == [False]
    assert (tmp_path / "run" / "save" / "model.glb").is_file()
