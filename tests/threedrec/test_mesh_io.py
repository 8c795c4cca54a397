import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from threedrec.errors import InputError
from threedrec.mesh.bake import bake_texture
from threedrec.mesh.preview import render_mesh_preview
from threedrec.mesh.types import Mesh, vertex_normals
from threedrec.mesh.unwrap import unwrap
from threedrec.mesh.write import TexturedMesh, to_file_frame, write_glb, write_obj, write_ply


@pytest.fixture(scope="module")
def model() -> TexturedMesh:
    """An egg that reaches furthest to the front (+x), coloured by position."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    vertices = np.asarray(ball.vertices, dtype=np.float64) * [1.2, 1.0, 0.8]
    mesh = Mesh(vertices, np.asarray(ball.faces))
    atlas = unwrap(mesh, 256)
    return TexturedMesh(mesh, vertices + 0.5, atlas, bake_texture(mesh, atlas, lambda p: p + 0.5, 256))


def sampled_colors(mesh: trimesh.Trimesh, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points on the surface and what a viewer would show there."""
    weights = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], size=len(mesh.faces))[:, :, None]
    points = (mesh.vertices[mesh.faces] * weights).sum(axis=1)
    uv = (mesh.visual.uv[mesh.faces] * weights).sum(axis=1)
    rows, columns = ((1 - uv[:, 1]) * 256).astype(int).clip(0, 255), (uv[:, 0] * 256).astype(int).clip(0, 255)
    return points, image[rows, columns] / 255.0


def glb_json(path: Path) -> dict:
    data = path.read_bytes()
    assert data[:4] == b"glTF"
    length = struct.unpack("<I", data[12:16])[0]
    return json.loads(data[20 : 20 + length])


def test_the_front_of_the_world_is_the_front_of_the_file() -> None:
    world = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # front, right as seen, up
    np.testing.assert_array_equal(to_file_frame(world), [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def test_glb_round_trip(model: TexturedMesh, tmp_path: Path) -> None:
    write_glb(tmp_path / "a.glb", model)
    mesh = trimesh.load_mesh(tmp_path / "a.glb", process=False)
    np.testing.assert_allclose(mesh.vertices, to_file_frame(model.mesh.vertices)[model.atlas.original], atol=1e-6)
    np.testing.assert_allclose(mesh.extents, [0.8, 0.64, 0.96], atol=0.01)  # 0.96 along z: the front
    np.testing.assert_allclose(mesh.visual.uv, model.atlas.uv, atol=1e-6)
    assert mesh.volume > 0
    assert ((mesh.vertex_normals * mesh.vertices).sum(axis=1) > 0).all()
    image = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"))
    np.testing.assert_array_equal(image, model.texture)
    points, colors = sampled_colors(mesh, image)
    np.testing.assert_allclose(colors, points[:, [2, 0, 1]] + 0.5, atol=0.03)


def test_glb_says_rough_and_not_metallic_and_carries_normals(model: TexturedMesh, tmp_path: Path) -> None:
    write_glb(tmp_path / "a.glb", model)
    content = glb_json(tmp_path / "a.glb")
    material = content["materials"][0]["pbrMetallicRoughness"]
    assert material["metallicFactor"] == 0.0 and material["roughnessFactor"] == 1.0
    assert material["baseColorTexture"] == {"index": 0}
    attributes = content["meshes"][0]["primitives"][0]["attributes"]
    assert {"POSITION", "NORMAL", "TEXCOORD_0"} <= set(attributes)
    write_glb(tmp_path / "b.glb", model, normals=False)
    assert "NORMAL" not in glb_json(tmp_path / "b.glb")["meshes"][0]["primitives"][0]["attributes"]


def test_obj_round_trip(model: TexturedMesh, tmp_path: Path) -> None:
    written = write_obj(tmp_path / "a.obj", model)
    assert [file.name for file in written] == ["a.png", "a.mtl", "a.obj"]
    text = (tmp_path / "a.obj").read_text()
    assert "\nmtllib a.mtl\n" in text and "/" not in next(line for line in text.splitlines() if "mtllib" in line)
    assert "map_Kd a.png" in (tmp_path / "a.mtl").read_text().splitlines()
    mesh = trimesh.load_mesh(tmp_path / "a.obj", process=False)
    image = np.asarray(mesh.visual.material.image.convert("RGB"))
    points, colors = sampled_colors(mesh, image)
    np.testing.assert_allclose(colors, points[:, [2, 0, 1]] + 0.5, atol=0.03)
    np.testing.assert_allclose(mesh.extents, [0.8, 0.64, 0.96], atol=0.01)
    assert mesh.volume > 0


def test_obj_positions_are_not_split_at_seams(model: TexturedMesh, tmp_path: Path) -> None:
    write_obj(tmp_path / "a.obj", model)
    lines = (tmp_path / "a.obj").read_text().splitlines()
    corners = np.array([[c.split("/") for c in line.split()[1:]] for line in lines if line.startswith("f ")], dtype=int)
    np.testing.assert_array_equal(corners[:, :, 0] - 1, model.mesh.faces)
    np.testing.assert_array_equal(corners[:, :, 1] - 1, model.atlas.faces)
    np.testing.assert_array_equal(corners[:, :, 2], corners[:, :, 0])
    directions = np.array([line.split()[1:] for line in lines if line.startswith("vn ")], dtype=float)
    np.testing.assert_allclose(directions, to_file_frame(vertex_normals(model.mesh)), atol=1e-4)


def test_obj_without_texture_has_vertex_colours(model: TexturedMesh, tmp_path: Path) -> None:
    assert write_obj(tmp_path / "a.obj", TexturedMesh(model.mesh, model.colors), normals=False) == [tmp_path / "a.obj"]
    mesh = trimesh.load_mesh(tmp_path / "a.obj", process=False)
    np.testing.assert_allclose(mesh.visual.vertex_colors[:, :3] / 255.0, model.colors, atol=0.01)


def test_ply_round_trip(model: TexturedMesh, tmp_path: Path) -> None:
    write_ply(tmp_path / "a.ply", model)
    mesh = trimesh.load_mesh(tmp_path / "a.ply", process=False)
    assert mesh.is_watertight and mesh.volume > 0
    np.testing.assert_allclose(mesh.vertices, to_file_frame(model.mesh.vertices), atol=1e-6)
    np.testing.assert_allclose(mesh.visual.vertex_colors[:, :3] / 255.0, model.colors, atol=0.003)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_a_preview_looks_at_the_right_side(model: TexturedMesh, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    {".glb": write_glb, ".obj": write_obj, ".ply": write_ply}[suffix](path, model)
    # Colour is position + 0.5 with red along the world's x (front), green along y, blue along z (up).
    for azimuth, elevation, expected in [
        (0, 0, (0.98, 0.5, 0.5)),
        (90, 0, (0.5, 0.9, 0.5)),
        (180, 0, (0.02, 0.5, 0.5)),
        (0, 89, (0.5, 0.5, 0.82)),
    ]:
        image = render_mesh_preview(path, azimuth, elevation, size=65)
        torch.testing.assert_close(image[32, 32], torch.tensor(expected), atol=0.04, rtol=0)
        assert (image[0, 0] == 1).all()
    image = render_mesh_preview(path, 0, 0, size=65)
    assert image[32, 44, 1] > image[32, 20, 1]  # the world's y is to the right
    assert image[22, 32, 2] > image[42, 32, 2]  # its z is up


def test_a_preview_shows_an_inside_out_mesh_as_such(model: TexturedMesh, tmp_path: Path) -> None:
    mesh = Mesh(model.mesh.vertices, model.mesh.faces[:, ::-1])
    write_ply(tmp_path / "a.ply", TexturedMesh(mesh, model.colors))
    centre = render_mesh_preview(tmp_path / "a.ply", size=65)[32, 32]
    torch.testing.assert_close(centre, torch.tensor([0.02, 0.5, 0.5]), atol=0.04, rtol=0)  # the far side's inside


@pytest.mark.parametrize("name", ["a.glb", "a.obj", "a.ply"])
def test_files_that_are_no_meshes_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such mesh file"):
        render_mesh_preview(tmp_path / name)
    (tmp_path / name).write_bytes(b"glTF not at all")
    with pytest.raises(InputError, match=f"{name}: cannot be read as a mesh"):
        render_mesh_preview(tmp_path / name)
