"""The renderer in plain PyTorch: its twin in VTK, hand-made triangles, textures, and banks of views from meshes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.lights import AMBIENT, LIGHTS
from nvsadapter_guidance.training.mesh_bank import render_bank
from nvsadapter_guidance.training.mesh_dataset import object_generator, shape_of, training_views
from nvsadapter_guidance.training.render_folder import RenderOptions, open_renderer, render_folder
from nvsadapter_guidance.training.render_meshes import FOVY, MeshRenderer
from nvsadapter_guidance.training.render_torch import (
    TorchMeshRenderer,
    barycentric,
    bilinear,
    nearest_faces,
    project,
)

CAMERAS = [(0.0, 0.0, 1.5), (50.0, 20.0, 1.5), (200.0, 60.0, 1.9), (300.0, -10.0, 1.4)]


def coloured_parts() -> list[trimesh.Trimesh]:
    """A ball with a picture on it, a brick of coloured vertices that cuts into it, and a tube with holes."""
    ball = trimesh.creation.icosphere(3, 0.3)
    angles = np.arctan2(ball.vertices[:, 0], ball.vertices[:, 2]) / np.pi
    coordinates = np.stack([2.0 * angles, ball.vertices[:, 1] / 0.6 + 0.5], axis=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)).resize((96, 64))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=picture)
    ball.visual = trimesh.visual.TextureVisuals(uv=coordinates, material=material)
    brick = trimesh.creation.box((0.2, 0.5, 0.2), trimesh.transformations.translation_matrix([0.2, 0.0, 0.1]))
    brick.visual.vertex_colors = np.random.default_rng(1).integers(0, 255, (len(brick.vertices), 4), dtype=np.uint8)
    tube = trimesh.creation.annulus(0.15, 0.2, 0.2, transform=trimesh.transformations.translation_matrix([-0.3, 0, 0]))
    tube.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=(20, 160, 90, 255))
    )
    tube.update_faces(np.arange(len(tube.faces)) % 5 != 0)
    return [ball, brick, tube]


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255.0
    return rgba[..., :3] / 255.0 * alpha + 1.0 - alpha


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_draws_what_vtk_draws(device) -> None:
    pytest.importorskip("vtk", reason="needs VTK (the extra render)")
    twin, renderer = MeshRenderer(64, 2), TorchMeshRenderer(64, 2, device)
    parts = coloured_parts()
    twin.show(parts)
    renderer.show(parts)
    expected, found = twin.render_all(CAMERAS).numpy(), renderer.render_all(CAMERAS).cpu().numpy()
    assert found.shape == expected.shape == (4, 64, 64, 4)
    assert np.abs(found[..., 3].astype(int) - expected[..., 3]).mean() < 0.1
    assert -10 * np.log10(np.square(on_white(found) - on_white(expected)).mean()) > 45.0


@pytest.mark.gpu
def test_devices_agree() -> None:
    images = []
    for device in ("cpu", "cuda"):
        renderer = TorchMeshRenderer(64, 2, device)
        renderer.show(coloured_parts())
        images.append(on_white(renderer.render_all(CAMERAS).cpu().numpy()))
    assert -10 * np.log10(np.square(images[0] - images[1]).mean()) > 45.0


def test_projection_by_hand() -> None:
    # A camera at azimuth 90 stands on +y and looks down it: +z is up, and +x lies to its left.
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.1]]])
    corners = project(points, torch.tensor([[90.0, 0.0, 2.0]]), 100)[0, 0]
    step = 0.1 / 2.0 * 50.0 / np.tan(np.radians(FOVY) / 2)
    expected = [[50.0, 50.0, 0.5], [50.0 - step, 50.0, 0.5], [50.0, 50.0 - step, 0.5]]
    torch.testing.assert_close(corners, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)


def test_the_nearest_face_wins_and_of_equals_the_last() -> None:
    far = torch.tensor([[0.0, 0.0, 0.5], [4.0, 0.0, 0.5], [0.0, 4.0, 0.5]])
    near = torch.tensor([[0.0, 0.0, 0.8], [2.0, 0.0, 0.8], [0.0, 2.0, 0.8]])
    background = -1
    found = nearest_faces(torch.stack([near, far, far])[None], 4).view(4, 4)
    expected = [[0, 0, 2, 2], [0, 2, 2, background], [2, 2, background, background], [2] + 3 * [background]]
    assert found.tolist() == expected


def test_chunks_change_nothing(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 50, 3, 3, generator=generator) * torch.tensor([20.0, 20.0, 1.0]) - 2.0
    corners[..., 2] = corners[..., 2].abs()
    whole = nearest_faces(corners, 16)
    monkeypatch.setattr("nvsadapter_guidance.training.render_torch.CANDIDATES", {"cpu": 7})
    assert torch.equal(nearest_faces(corners, 16), whole)
    assert (whole >= 0).any() and (whole < 0).any()


def test_weights_of_corners_by_hand() -> None:
    corners = torch.tensor([[[0.5, 0.5, 1.0], [4.5, 0.5, 1.0], [0.5, 4.5, 1.0]]]).expand(3, 3, 3)
    weights, inside = barycentric(corners, torch.tensor([[0, 0], [1, 2], [4, 4]]))
    torch.testing.assert_close(weights[:2], torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]))
    assert inside.tolist() == [True, True, False]


def test_textures_repeat_and_run_upwards() -> None:
    picture = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [1.0, 1.0, 1.0]]])
    centres = torch.tensor([[0.25, 0.75], [0.75, 0.75], [0.25, 0.25], [1.75, -0.75], [0.5, 0.75]])
    colours = bilinear(picture, centres)
    expected = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0]]
    torch.testing.assert_close(colours, torch.tensor(expected))


def test_a_wall_shows_its_light() -> None:
    wall = trimesh.Trimesh([[-9, -9, 0], [9, -9, 0], [9, 9, 0], [-9, 9, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    wall.visual.face_colors = (100, 200, 50, 255)
    renderer = TorchMeshRenderer(8, 1)
    renderer.show([wall], scale=0.5)
    light = AMBIENT + sum(source.intensity * max(source.direction[0], 0.0) for source in LIGHTS)
    pixel = renderer.render_all([(0.0, 0.0, 1.5)])[0, 4, 4].tolist()
    assert pixel == [round(100 * light), round(200 * light), round(50 * light), 255]
    assert renderer.render_all([]).shape == (0, 8, 8, 4)


def test_a_renderer_without_a_mesh_sees_nothing() -> None:
    assert not TorchMeshRenderer(8, 1).render_all(CAMERAS).any()


def folder_of_meshes(folder: Path) -> Path:
    folder.mkdir()
    for index, part in enumerate(coloured_parts()[1:]):
        part.export(folder / f"part{index}.glb")
    (folder / "index.json").write_text(json.dumps([{"file": f"part{index}.glb"} for index in range(2)]))
    return folder


def test_a_bank_of_views_from_meshes(tmp_path) -> None:
    folder = folder_of_meshes(tmp_path / "meshes")
    bank = render_bank(folder, 5, torch.device("cpu"), seed=3, size=16, supersample=1)
    assert bank.rgba.shape == (2, 5, 16, 16, 4) and bank.names == ("part0", "part1")
    cameras = training_views(object_generator("part1", 3), 5)
    assert bank.azimuth[1].tolist() == pytest.approx(cameras.azimuth)
    renderer = TorchMeshRenderer(16, 1)
    renderer.load(folder / "part1.glb", cameras.scale)
    angles = zip(cameras.azimuth, cameras.elevation, strict=True)
    assert torch.equal(bank.rgba[1], renderer.render_all([(a, e, 1.5) for a, e in angles]))
    other = render_bank(folder, 5, torch.device("cpu"), seed=4, size=16, supersample=1, limit=1)
    assert len(other) == 1 and not torch.equal(other.azimuth[0], bank.azimuth[0])
    bent = render_bank(folder, 5, torch.device("cpu"), seed=3, size=16, supersample=1, bent=True)
    assert torch.equal(bent.azimuth, bank.azimuth) and not torch.equal(bent.rgba, bank.rgba)
    renderer.show(shape_of(folder / "part1.glb", 1, seed=3), cameras.scale)
    angles = zip(cameras.azimuth, cameras.elevation, strict=True)
    assert torch.equal(bent.rgba[1], renderer.render_all([(a, e, 1.5) for a, e in angles]))


def test_folders_are_rendered_without_vtk(tmp_path) -> None:
    folder = folder_of_meshes(tmp_path / "meshes")
    options = RenderOptions(views=2, size=16, supersample=1, renderer="torch")
    meshes = {"part0": folder / "part0.glb"}
    assert [outcome.problem for outcome in render_folder(meshes, tmp_path / "out", options)] == [None]
    assert Image.open(tmp_path / "out" / "part0" / "001.png").size == (16, 16)
    assert isinstance(open_renderer("torch", 8, 1), TorchMeshRenderer)
    with pytest.raises(InputError, match="renderer 'gl' is unknown; use one of vtk, torch"):
        RenderOptions(renderer="gl")
