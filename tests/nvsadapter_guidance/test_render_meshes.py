"""Mesh renderings: frames, handedness, normals, lights, and the files of a split."""

import json
import math

import numpy as np
import pytest
import trimesh
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.mesh_dataset import (
    object_generator,
    read_index,
    render_split,
    shape_of,
    tile,
    training_views,
    untile,
    validation_views,
)
from nvsadapter_guidance.training.render_meshes import MeshRenderer, corner_normals, world_from_gltf
from nvsadapter_guidance.training.views import load_tar

RED, GREEN, BLUE = (230, 20, 20), (20, 230, 20), (20, 20, 230)


def textured_cube(path, half: float = 0.25) -> None:
    """A cube whose glTF front (+z) is half red (its left) half green (its right), other sides blue."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:32], pixels[:, 32:] = RED, GREEN, BLUE
    quads, coordinates = [], []
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
    for axis in range(3):
        for side in (1, -1):
            points = np.insert(square, axis, side, axis=1)
            quads.append(points if (axis != 1) == (side > 0) else points[::-1])
            # u runs along glTF x: left to right for someone in front
            front = axis == 2 and side > 0
            u = np.where(quads[-1][:, 0] < 0, 0.0, 0.5) if front else np.full(4, 0.75)
            coordinates.append(np.stack([u, np.full(4, 0.5)], axis=1))
    faces = np.concatenate([[[4 * i, 4 * i + 1, 4 * i + 2], [4 * i, 4 * i + 2, 4 * i + 3]] for i in range(6)])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(pixels))
    visual = trimesh.visual.TextureVisuals(uv=np.concatenate(coordinates), material=material)
    trimesh.Trimesh(half * np.concatenate(quads), faces, visual=visual, process=False).export(path)


@pytest.fixture(scope="module")
def renderer() -> MeshRenderer:
    pytest.importorskip("vtk")
    return MeshRenderer(size=32, supersample=2)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    path = tmp_path_factory.mktemp("cube") / "cube.glb"
    textured_cube(path)
    return path


def test_gltf_front_and_up_become_world_x_and_z():
    front_up_right = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(world_from_gltf(front_up_right), [[1, 0, 0], [0, 0, 1], [0, 1, 0]])


def test_front_view_is_upright_and_not_mirrored(renderer, cube):
    renderer.load(cube)
    view = renderer.render(0.0, 0.0).astype(int)
    left, right = view[16, 11], view[16, 21]
    assert left[0] > left[1] and left[0] > left[2], "image left shows glTF -x, world -y: red"
    assert right[1] > right[0] and right[1] > right[2], "image right shows glTF +x, world +y: green"
    assert view[16, 16, 3] == 255
    assert view[0, 0, 3] == 0


def test_camera_goes_round_counter_clockwise(renderer, cube):
    renderer.load(cube)
    view = renderer.render(40.0, 0.0).astype(int)
    row = view[16][view[16, :, 3] == 255]
    # from the +y side the front has turned to the left
    assert row[1, 1] + row[1, 0] > row[1, 2]
    assert row[-2, 2] > row[-2, 0] + row[-2, 1]


def test_silhouette_has_the_pinhole_size(renderer, cube):
    renderer.load(cube, scale=0.8)
    alpha = renderer.render(0.0, 0.0)[..., 3] / 255.0
    half = 0.2 / (1.5 - 0.2) / math.tan(math.radians(49.1 / 2)) * 16
    assert alpha[16].sum() == pytest.approx(2 * half, abs=0.6)


def test_lights_follow_the_documented_formula(renderer, cube):
    renderer.load(cube)
    view = renderer.render(180.0, 0.0).astype(float)
    shade = AMBIENT + sum(light.intensity * max(0.0, -light.direction[0]) for light in LIGHTS)
    assert view[16, 16, 2] == pytest.approx(230 * shade, abs=3)


def test_lights_never_clip():
    directions = np.random.default_rng(0).normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shade = AMBIENT + sum(light.intensity * (directions @ np.array(light.direction)).clip(0) for light in LIGHTS)
    assert shade.max() <= 1.0


def test_normals_are_sharp_over_cube_edges_and_smooth_over_a_ball():
    box = trimesh.creation.box()
    corners = corner_normals(np.asarray(box.vertices), np.asarray(box.faces))
    np.testing.assert_allclose(corners, np.repeat(box.face_normals[:, None], 3, axis=1), atol=1e-6)
    ball = trimesh.creation.icosphere(subdivisions=3)
    corners = corner_normals(np.asarray(ball.vertices), np.asarray(ball.faces))
    np.testing.assert_allclose(corners, np.asarray(ball.vertices)[ball.faces], atol=0.02)


def test_a_neighbour_wound_the_other_way_does_not_cancel_normals():
    points = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    corners = corner_normals(points, np.array([[0, 1, 2], [1, 2, 3]]))
    np.testing.assert_allclose(corners[0], [[0, 0, 1]] * 3, atol=1e-6)
    np.testing.assert_allclose(corners[1], [[0, 0, -1]] * 3, atol=1e-6)


def test_training_views_are_those_promised_and_repeatable():
    views = training_views(object_generator("chair"))
    assert views == training_views(object_generator("chair"))
    assert views != training_views(object_generator("table"))
    assert len(views.azimuth) == len(views.elevation) == 40
    assert views.elevation[:16] == [0.0] * 16
    assert views.elevation[16:24] == [30.0] * 8
    assert all(-10 <= value <= 80 for value in views.elevation)
    steps = np.diff(views.azimuth[:16]) % 360
    np.testing.assert_allclose(steps, 22.5)
    assert 0.85 <= views.scale <= 1.0


def test_fewer_training_views_keep_the_shares_of_the_rings():
    views = training_views(object_generator("chair"), 20)
    assert views.elevation[:12] == [0.0] * 8 + [30.0] * 4 and len(views.azimuth) == len(views.elevation) == 20
    np.testing.assert_allclose(np.diff(views.azimuth[:8]) % 360, 45, rtol=1e-5)
    assert all(-10 <= value <= 80 for value in views.elevation)
    with pytest.raises(InputError, match="12 views"):
        training_views(object_generator("chair"), 12)


def test_validation_views_are_fixed():
    views = validation_views()
    assert views.azimuth == [0, 45, 90, 135, 180, 225, 270, 315] * 2
    assert views.elevation == [0] * 8 + [30] * 8
    assert views.scale == 1.0


def test_tiles_come_back():
    views = np.random.default_rng(0).integers(0, 255, (10, 4, 4, 4), dtype=np.uint8)
    grid = tile(views)
    assert grid.shape == (8, 32, 4)
    np.testing.assert_array_equal(untile(grid, 10, 4), views)


def test_a_split_is_rendered_packed_and_resumed(tmp_path, cube):
    pytest.importorskip("vtk")
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.glb").write_bytes(cube.read_bytes())
    entries = [{"file": f"{name}.glb", "creator": "us", "licence": "CC0-1.0"} for name in ("a", "b")]
    (folder / "index.json").write_text(json.dumps(entries))
    output = tmp_path / "val.tar"
    assert list(render_split(folder, output, validation=True, size=32)) == ["a", "b"]
    first = output.read_bytes()
    bank = load_tar(output)
    assert bank.names == ("a", "b")
    assert bank.rgba.shape == (2, 16, 32, 32, 4)
    assert bank.azimuth[0].tolist() == validation_views().azimuth
    (tmp_path / "val" / "b.json").unlink()
    (folder / "a.glb").unlink()  # finished objects are not touched again
    assert list(render_split(folder, output, validation=True, size=32)) == ["a", "b"]
    assert output.read_bytes() == first
    with pytest.raises(InputError, match="val: was rendered with another size; choose another folder"):
        list(render_split(folder, output, validation=True, size=16))
    assert output.read_bytes() == first
    about = json.loads((tmp_path / "val" / "b.json").read_text())
    assert about["creator"] == "us" and about["licence"] == "CC0-1.0"


def test_a_split_of_bent_shapes(tmp_path, cube, renderer):
    pytest.importorskip("vtk")
    folder = tmp_path / "meshes"
    folder.mkdir()
    (folder / "a.glb").write_bytes(cube.read_bytes())
    (folder / "index.json").write_text(json.dumps([{"file": "a.glb"}]))
    assert list(render_split(folder, tmp_path / "bent.tar", views=5, size=32, variants=2)) == ["a-1", "a-2"]
    bank = load_tar(tmp_path / "bent.tar")
    for index in (0, 1):
        cameras = training_views(object_generator(f"a-{index + 1}"), 5)
        areas = []
        for variant in (index + 1, 0):
            renderer.show(shape_of(folder / "a.glb", variant), cameras.scale)
            areas.append(float(renderer.render_all(cameras.cameras)[..., 3].float().sum()))
        # The renderer's views are larger; a cube that was not bent covers another share of them.
        share = float(bank.rgba[index, ..., 3].float().mean()) * (renderer.size**2 * 5)
        assert share == pytest.approx(areas[0], rel=0.02) and abs(areas[0] - areas[1]) > 0.03 * areas[1]
    with pytest.raises(InputError, match="variants: must be 0 or more, got -1"):
        list(render_split(folder, tmp_path / "no.tar", variants=-1))
    with pytest.raises(InputError, match="variants: validation views show the meshes themselves"):
        list(render_split(folder, tmp_path / "no.tar", variants=1, validation=True))
    assert not (tmp_path / "no").exists()


def test_bad_input_is_named(tmp_path, renderer):
    with pytest.raises(InputError, match=r"index\.json"):
        read_index(tmp_path)
    broken = tmp_path / "broken.glb"
    broken.write_bytes(b"not a mesh")
    with pytest.raises(InputError, match=r"broken\.glb"):
        renderer.load(broken)
