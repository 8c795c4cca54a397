"""The mesh made in a process of its own: the same bytes, its messages, and what happens when it fails."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh import MeshExporter, MeshExporterConfig
from threedrec.mesh.isosurface import Grid, Samples
from threedrec.mesh.shape import ShapeOptions
from threedrec.mesh.side_process import SideProcess
from threedrec.mesh.unwrap import unwrap


def egg(points: Tensor) -> Tensor:
    stretched = points / torch.tensor([0.5, 0.4, 0.3])
    return 300 * torch.sigmoid(60 * (1 - stretched.norm(dim=-1, keepdim=True)))


def color(points: Tensor) -> Tensor:
    return points * 0.9 + 0.5


def exporter(**changes: Any) -> MeshExporter:
    return MeshExporter(
        MeshExporterConfig(**{"isosurface_resolution": 40, "texture_size": 128, "face_budget": 2000, **changes})
    )


def samples(density: float = 100.0, side: int = 24) -> Samples:
    grid = Grid.covering(np.full(3, -0.6), np.full(3, 0.6), side)
    return Samples(grid, np.where(grid.distances() < 0.4, np.float32(density), np.float32(0.0)), 1.0, False)


def test_the_files_are_those_of_one_process(tmp_path: Path) -> None:
    plain = exporter()(egg, color, tmp_path / "plain")
    ahead = exporter().begin(egg, "cpu")
    report = exporter().finish(ahead, color, tmp_path / "ahead", "cpu")
    assert set(report.seconds) == set(plain.seconds) and report.threshold == plain.threshold
    for file in plain.files:
        assert file.read_bytes() == (tmp_path / "ahead" / file.name).read_bytes()


def test_an_empty_field_is_the_users_error() -> None:
    with SideProcess() as side:
        side.begin(samples(), ShapeOptions(threshold=300.0))
        with pytest.raises(InputError, match="largest density, 100, does not pass the threshold 300"):
            side.shape()


def test_warnings_are_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    noisy = samples(side=120)  # over a million crossings
    noisy.density[...] = 100.0 * np.random.default_rng(0).integers(0, 2, noisy.density.shape)
    with SideProcess() as side, caplog.at_level(logging.WARNING):
        side.begin(noisy, ShapeOptions(threshold=50.0, smoothing=0.0, face_budget=4000, texture_size=0))
        side.shape()
    assert "too rough to be meshed in full" in caplog.text


def test_a_failure_says_what_it_was_and_leaves_nothing() -> None:
    side = SideProcess()
    folder = Path(side._folder.name)
    side.begin(samples(), ShapeOptions(charts={"unheard_of": object.__name__}, face_budget=-1))
    with side, pytest.raises((RuntimeError, InputError)):
        side.shape()
    assert not folder.exists()


def test_a_process_that_was_killed_is_an_error_and_one_given_up_ends() -> None:
    with SideProcess() as side:
        side._process.kill()
        side.begin(samples(), ShapeOptions())
        with pytest.raises(RuntimeError, match="ended with -9"):
            side.shape()
    with SideProcess() as side:
        process = side._process
    assert process.poll() is not None


def test_the_process_needs_no_pytorch() -> None:
    code = "import sys, threedrec.mesh.side_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mesh_unwrapped_in_pieces_keeps_its_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = exporter()._sampled(egg, "cpu")
    from threedrec.mesh.shape import make_shape

    whole = make_shape(mesh.samples, ShapeOptions(face_budget=3000, texture_size=128))
    monkeypatch.setattr("threedrec.mesh.unwrap._MANY", 100)
    atlas = unwrap(whole.mesh, 128)
    assert (atlas.original[atlas.faces] == whole.mesh.faces).all()
    assert atlas.uv.min() >= 0.0 and atlas.uv.max() <= 1.0
    corners = atlas.uv[atlas.faces]
    u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    assert 0.1 < 0.5 * np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).sum() <= 1.0  # charts do not lie on each other
    again = unwrap(whole.mesh, 128)
    assert (again.uv == atlas.uv).all() and (again.faces == atlas.faces).all()
