"""Meshes into Zero-1-to-3 folders: fitting, cameras that match the pictures, resuming, broken meshes."""

import json

import numpy as np
import pytest
import trimesh

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_files import find_meshes, load_parts, whole_mesh
from nvsadapter_guidance.training.novel_view_data import FolderViews
from nvsadapter_guidance.training.render_check import check_rendering
from nvsadapter_guidance.training.render_folder import RenderOptions, render_folder, sphere_cameras
from nvsadapter_guidance.training.render_meshes import FOVY, MeshRenderer, corner_colours, world_from_gltf
from nvsadapter_guidance.training.shards import read_paths
from nvsadapter_guidance.training.zero123 import SampleOptions, stored_folder

OPTIONS = RenderOptions(views=3, size=48)


def brick(path, shift=0.0):
    """A red brick of 4 x 2 x 1, off the origin."""
    mesh = trimesh.creation.box((4.0, 2.0, 1.0), trimesh.transformations.translation_matrix([shift, 3, 0]))
    mesh.visual.vertex_colors = (200, 30, 20, 255)
    mesh.export(path)
    return path


def test_meshes_are_found_by_name(tmp_path):
    (tmp_path / "in" / "side").mkdir(parents=True)
    for name in ("a.glb", "b.v2.obj", "side/a.ply", "index.json"):
        (tmp_path / "in" / name).touch()
    assert list(find_meshes([tmp_path / "in"])) == ["a", "b_v2", "side_a"]
    assert list(find_meshes([tmp_path / "in" / "a.glb"])) == ["a"]
    for paths, words in (
        (["in", "in/a.glb"], "would be called 'a'"),
        (["none"], "no such file or folder"),
        (["in/index.json"], "no mesh file"),
    ):
        with pytest.raises(InputError, match=words):
            find_meshes(tmp_path / path for path in paths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no mesh below it"):
        find_meshes([tmp_path / "empty"])


def test_fits_by_hand(tmp_path):
    path = brick(tmp_path / "a.glb", shift=10.0)
    np.testing.assert_allclose(whole_mesh(load_parts(path, "cube")).extents, [1, 0.5, 0.25], atol=1e-6)
    sphere = whole_mesh(load_parts(path, "sphere"))
    assert np.linalg.norm(sphere.vertices, axis=1).max() == pytest.approx(0.5)
    np.testing.assert_allclose(sphere.bounds.sum(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(whole_mesh(load_parts(path, "none")).bounds[0], [8, 2, -0.5], atol=1e-5)
    with pytest.raises(InputError, match="fit 'box' is unknown"):
        load_parts(path, "box")


def test_meshes_that_are_none_are_named(tmp_path):
    (tmp_path / "text.glb").write_bytes(b"no mesh")
    trimesh.PointCloud([[0.0, 0, 0], [1, 1, 1]]).export(tmp_path / "cloud.ply")
    trimesh.Trimesh(np.ones((3, 3)), [[0, 1, 2]], process=False).export(tmp_path / "point.ply")
    trimesh.Trimesh(np.diag([1.0, np.nan, 1]), [[0, 1, 2]], process=False).export(tmp_path / "nan.ply")
    for name, words in (("text.glb", "cannot be read"), ("cloud.ply", "no faces"), ("point.ply", "no extent")):
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            load_parts(tmp_path / name)
    with pytest.raises(InputError, match=r"nan\.ply: .*(not finite|no faces)"):
        load_parts(tmp_path / "nan.ply")


def test_colours_of_vertices_and_faces_reach_the_corners():
    mesh = trimesh.creation.box()
    assert corner_colours(mesh) is None
    mesh.visual.face_colors = np.arange(12 * 4, dtype=np.uint8).reshape(12, 4)
    assert corner_colours(mesh).reshape(12, 3, 3)[5].tolist() == [[20, 21, 22]] * 3
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.arange(32, dtype=np.uint8).reshape(8, 4))
    expected = [[4 * v, 4 * v + 1, 4 * v + 2] for v in mesh.faces[3]]
    assert corner_colours(mesh).reshape(12, 3, 3)[3].tolist() == expected


def test_cameras_are_uniform_on_the_sphere_and_repeatable():
    options = RenderOptions(views=1000)
    cameras = np.array(sphere_cameras("chair", options))
    assert np.array_equal(sphere_cameras("chair", options), cameras)
    assert not np.allclose(sphere_cameras("table", options), cameras)
    assert abs(np.sin(np.radians(cameras[:, 1])).mean()) < 0.06
    assert 1.5 <= cameras[:, 2].min() < 1.51 and 2.19 < cameras[:, 2].max() <= 2.2
    low = np.array(sphere_cameras("chair", RenderOptions(views=100, lowest=10, highest=20)))[:, 1]
    assert 10 <= low.min() and low.max() <= 20


@pytest.mark.parametrize(
    ("values", "words"),
    [({"views": 0}, "views is 0"), ({"nearest": 0.9}, "distances are"), ({"nearest": 3.0}, "distances are"),
     ({"lowest": -91.0}, "elevations are"), ({"fit": "box"}, "fit 'box'"), ({"size": 2}, "size is 2")],
)  # fmt: skip
def test_options_out_of_range_are_named(values, words):
    with pytest.raises(InputError, match=words):
        RenderOptions(**values)


def test_missing_vtk_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rendering meshes needs VTK.*pip install -e '\.\[render\]'"):
        check_rendering()


def test_without_anything_to_draw_with_there_is_one_line(monkeypatch):
    pytest.importorskip("vtk", reason="needs VTK (the extra render)")
    monkeypatch.setattr("nvsadapter_guidance.training.render_check._PROBE", "import os; os.abort()")
    with pytest.raises(InputError, match="VTK finds no library to draw with"):
        check_rendering()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    pytest.importorskip("vtk", reason="needs VTK (the extra render)")
    folder = tmp_path_factory.mktemp("rendered")
    brick(folder / "a.glb")
    brick(folder / "b.ply")
    (folder / "broken.glb").write_bytes(b"no mesh")
    outcomes = list(render_folder(find_meshes([folder]), folder / "out", OPTIONS))
    return folder, outcomes


def test_the_layout_is_zero_1_to_3s(rendered):
    folder, outcomes = rendered
    assert [(o.name, o.problem is None, o.was_there) for o in outcomes] == [
        ("a", True, False), ("b", True, False), ("broken", False, False)]  # fmt: skip
    out = folder / "out"
    assert sorted(p.name for p in out.iterdir()) == ["a", "b", "broken.json", "render.json", "valid_paths.json"]
    assert sorted(p.name for p in (out / "a").iterdir()) == [
        f"00{i}.{kind}" for i in range(3) for kind in ("npy", "png")
    ]
    assert read_paths(out / "valid_paths.json") == ["a", "b"]
    listed = json.loads((out / "broken.json").read_text())
    assert [entry["name"] for entry in listed] == ["broken"] and "cannot be read as a mesh" in listed[0]["reason"]
    views = stored_folder(out / "a", count=3)
    views.check()
    assert views.world_to_camera(0).shape == (3, 4) and views.image(0).size == (48, 48)
    assert FolderViews(out, SampleOptions(2, 32), views=3)[0]["c2w"].shape == (3, 4, 4)


def test_cameras_match_the_pictures(rendered):
    """The mesh's corners, projected by the stored matrices, bound the silhouette; its colour is the mesh's."""
    folder, _ = rendered
    views = stored_folder(folder / "out" / "a", count=3)
    corners = world_from_gltf(np.asarray(whole_mesh(load_parts(folder / "a.glb", "cube")).vertices))
    focal = 24 / np.tan(np.radians(FOVY / 2))
    for index in range(3):
        camera = views.world_to_camera(index)
        points = corners @ camera[:, :3].T + camera[:, 3]
        assert (points[:, 2] < 0).all(), "in front of a camera that looks along -z"
        u = 24 + focal * points[:, 0] / -points[:, 2]
        v = 24 - focal * points[:, 1] / -points[:, 2]
        rgba = np.asarray(views.image(index))
        rows, columns = np.nonzero(rgba[..., 3] > 127)
        found = (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1)
        np.testing.assert_allclose(found, (u.min(), u.max(), v.min(), v.max()), atol=1.0)
        colour = rgba[rgba[..., 3] == 255][:, :3].mean(axis=0)
        assert colour[0] > 100 and colour[1] < 40 and colour[2] < 40


def test_a_second_call_renders_nothing_and_mends_what_is_missing(rendered):
    folder, _ = rendered
    before = (folder / "out" / "a" / "000.png").stat().st_mtime_ns
    picture = (folder / "out" / "b" / "001.png").read_bytes()
    for file in (folder / "out" / "b").iterdir():
        file.unlink()
    (folder / "out" / "b").rmdir()
    outcomes = list(render_folder(find_meshes([folder]), folder / "out", OPTIONS))
    assert [o.was_there for o in outcomes] == [True, False, False]
    assert (folder / "out" / "a" / "000.png").stat().st_mtime_ns == before
    assert (folder / "out" / "b" / "001.png").read_bytes() == picture
    with pytest.raises(InputError, match="was rendered with another size; choose another folder"):
        list(render_folder(find_meshes([folder]), folder / "out", RenderOptions(views=3, size=64)))


def test_textures_of_obj_files_are_drawn(tmp_path):
    pytest.importorskip("vtk", reason="needs VTK (the extra render)")
    from PIL import Image

    Image.new("RGB", (4, 4), (20, 210, 30)).save(tmp_path / "green.png")
    (tmp_path / "a.mtl").write_text("newmtl green\nmap_Kd green.png\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nusemtl green\nv -1 -1 0\nv 1 -1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"
    )
    renderer = MeshRenderer(32, 2)
    renderer.show(load_parts(tmp_path / "a.obj"))
    red, green, blue, alpha = renderer.render(0.0, 0.0)[16, 16].tolist()
    assert alpha == 255 and green > 150 and red < 40 and blue < 40
