import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from omegaconf import OmegaConf
from torch import Tensor

from threedrec.errors import InputError
from threedrec.mesh import MeshExporter, MeshExporterConfig, export_mesh


def egg(points: Tensor) -> Tensor:
    """Reaches 0.5 to the front (+x), 0.4 to the sides and 0.3 up."""
    stretched = points / torch.tensor([0.5, 0.4, 0.3])
    return 300 * torch.sigmoid(60 * (1 - stretched.norm(dim=-1, keepdim=True)))


def position_color(points: Tensor) -> Tensor:
    return points * 0.9 + 0.5


def small(**changes: Any) -> MeshExporterConfig:
    return MeshExporterConfig(**{"isosurface_resolution": 40, "texture_size": 256, "face_budget": 4000, **changes})


def test_every_format_is_written_and_agrees(tmp_path: Path) -> None:
    report = export_mesh(egg, position_color, small(), tmp_path / "save", "egg")
    assert [file.name for file in report.files] == ["egg.glb", "egg.mtl", "egg.obj", "egg.ply", "egg.png"]
    assert sorted(report.files) == sorted((tmp_path / "save").iterdir())
    assert report.watertight and 1000 < report.faces <= 4000
    assert set(report.seconds) == {"isosurface", "simplify", "unwrap", "bake", "write"}
    extents = []
    for suffix in ("glb", "obj", "ply"):
        mesh = trimesh.load_mesh(tmp_path / "save" / f"egg.{suffix}", process=False)
        assert len(mesh.faces) == report.faces and mesh.volume > 0
        extents.append(mesh.extents)
    np.testing.assert_allclose(extents, [[0.8, 0.6, 1.0]] * 3, rtol=0.1)  # y up, front along z; the shell is soft
    np.testing.assert_allclose(extents[1:], extents[:1] * 2, atol=1e-5)
    assert len(mesh.vertices) == report.vertices and mesh.is_watertight


def test_a_mark_at_the_front_of_the_world_ends_at_the_front_of_the_glb(tmp_path: Path) -> None:
    export_mesh(egg, position_color, small(fmt="glb"), tmp_path)
    mesh = trimesh.load_mesh(tmp_path / "model.glb", process=False)
    image = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"))
    uv = mesh.visual.uv[mesh.vertices[:, 2].argmax()]
    red, green, blue = image[int((1 - uv[1]) * 255), int(uv[0] * 255)] / 255.0
    assert red > 0.9 and green == pytest.approx(0.5, abs=0.06) and blue == pytest.approx(0.5, abs=0.06)


def test_the_same_field_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("a", "b"):
        export_mesh(egg, position_color, small(), tmp_path / run)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fmt": "obj"}, ["model.obj"]),
        ({"fmt": "obj-mtl", "texture_format": "jpg"}, ["model.jpg", "model.mtl", "model.obj"]),
        ({"fmt": "glb, ply", "save_texture": False}, ["model.glb", "model.ply"]),
        ({"fmt": "ply", "save_name": "chair"}, ["chair.ply"]),
    ],
)
def test_formats_can_be_chosen(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    report = MeshExporter(small(**changes))(egg, position_color, tmp_path)
    assert [file.name for file in report.files] == expected
    mesh = trimesh.load_mesh(report.files[-1] if "obj" in changes["fmt"] else report.files[0], process=False)
    assert mesh.visual.defined


def test_an_empty_field_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the field is empty"):
        export_mesh(lambda p: torch.zeros(len(p), 1), position_color, small(), tmp_path / "save")
    assert not (tmp_path / "save").exists()


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("threedrec.mesh.exporter.write_glb", full)
    with pytest.raises(InputError, match="save: cannot be written: the disk is full"):
        export_mesh(egg, position_color, small(), tmp_path / "save")
    assert list((tmp_path / "save").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fmt": "fbx"}, "fmt: unknown format 'fbx'; choose from glb, obj-mtl, obj, ply or all"),
        ({"fmt": "obj,obj-mtl"}, "fmt: obj and obj-mtl write the same file"),
        ({"texture_format": "tga"}, "texture_format: unknown format 'tga'; choose png or jpg"),
        ({"texture_size": 0}, "texture_size: 0 is out of range; give a value from 16 to 16384"),
        ({"face_budget": 3}, "face_budget: 3 is out of range"),
        ({"keep_components": 2.0}, "keep_components: 2.0 is out of range; give a value from 0 to 1"),
        ({"isosurface_resolution": 4}, "isosurface_resolution: 4 is out of range"),
        ({"isosurface_threshold": "high"}, "isosurface_threshold: 'high' is neither auto nor a positive"),
        ({"isosurface_threshold": -1.0}, "isosurface_threshold: -1.0 is neither auto nor a positive density"),
        ({"xatlas_pack_options": {"pading": 1}}, "xatlas_pack_options.pading: unknown option; xatlas knows"),
        ({"save_name": "a/b"}, "save_name: 'a/b' is not a plain file name"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MeshExporter(small(**changes))


@pytest.mark.parametrize("threshold", ["auto", 10, 25.5])
def test_the_config_is_one_that_omegaconf_takes(threshold: float | str) -> None:
    merged = OmegaConf.merge(OmegaConf.structured(MeshExporterConfig), {"isosurface_threshold": threshold})
    MeshExporter(OmegaConf.to_object(merged))
