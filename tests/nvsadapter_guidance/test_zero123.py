"""Zero-1-to-3 files: axes of the matrices, pictures as released, relative poses, damaged files."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from zero123_objects import write_object

from nvsadapter_guidance.cameras import PINHOLE, RELEASED, look_at, relative_to_support
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.novel_view_data import FolderViews
from nvsadapter_guidance.training.zero123 import (
    SampleOptions,
    StoredViews,
    camera_angles,
    camera_matrix,
    camera_to_world,
    draw_views,
    encode_views,
    make_sample,
    stored_folder,
)


def test_a_camera_in_front_by_hand():
    # at azimuth 0 from distance 2: image right is world y, image up is z, and the camera looks along -x
    matrix = camera_matrix(0.0, 0.0, 2.0)
    np.testing.assert_allclose(matrix, [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, -2]], atol=1e-7)
    np.testing.assert_allclose(matrix @ [0.5, 0.1, 0.2, 1], [0.1, 0.2, -1.5], atol=1e-7)


def test_a_camera_on_the_left_and_above_by_hand():
    matrix = camera_matrix(90.0, 30.0, 2.0)
    position = 2.0 * np.array([0.0, math.cos(math.radians(30)), 0.5])
    np.testing.assert_allclose(matrix @ [*position, 1], np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(matrix @ [0, 0, 0, 1], [0, 0, -2], atol=1e-6)
    np.testing.assert_allclose(matrix[0, :3], [-1, 0, 0], atol=1e-6)  # image right


def test_angles_come_back():
    angles = np.array([[10.0, -50.0, 1.5], [200.0, 80.0, 2.2], [359.0, 0.0, 1.7]])
    found = np.stack(camera_angles(np.stack([camera_matrix(*row) for row in angles])), axis=1)
    np.testing.assert_allclose(found, angles, atol=1e-4)


@pytest.mark.parametrize("convention", [RELEASED, PINHOLE])
def test_poses_are_those_of_the_models_convention(convention):
    angles = [(20.0, 10.0, 1.6), (250.0, -40.0, 2.1)]
    found = camera_to_world(np.stack([camera_matrix(*angle) for angle in angles]), convention)
    expected = torch.stack([look_at(*angle, convention) for angle in angles])
    # the released look_at divides by (norm + 1e-6)
    torch.testing.assert_close(found.float(), expected, atol=5e-6, rtol=0)


def test_released_poses_are_the_inverse_with_the_rotation_negated():
    matrix = camera_matrix(33.0, 12.0, 1.9)
    opengl = np.linalg.inv(np.vstack([matrix, [0, 0, 0, 1]]))
    expected = opengl * np.array([-1.0, -1, -1, 1])
    np.testing.assert_allclose(camera_to_world(matrix[None], RELEASED)[0].numpy(), expected, atol=1e-7)


def test_a_sample_is_prepared_as_released(tmp_path, generator):
    views = stored_folder(write_object(tmp_path / "a"))
    state = generator.get_state()
    sample = make_sample(views, SampleOptions(num_query=4, size=16), generator)
    chosen = draw_views(12, 4, generator.set_state(state)).tolist()
    assert sample["name"] == "a" and len(set(chosen)) == 5
    rgb = torch.cat([sample["support_rgb"][None], sample["query_rgb"]])
    assert rgb.shape == (5, 3, 16, 16) and sample["c2w"].dtype == torch.float32
    # pixels of alpha 0 are white; the others keep their colour, whose red is the number of the view
    assert (rgb[:, :, :2] == 1.0).all()
    torch.testing.assert_close(rgb[:, 0, 8, 8], torch.tensor([20.0 * i / 255 - 1 for i in chosen]))
    c2w = camera_to_world(np.stack([views.world_to_camera(i) for i in chosen]), RELEASED)
    torch.testing.assert_close(sample["c2w"][0], torch.eye(4), atol=1e-7, rtol=0)
    torch.testing.assert_close(sample["c2w"], relative_to_support(c2w).float())


def test_resizing_is_bicubic_and_keeps_its_overshoot(tmp_path, generator):
    sample = make_sample(stored_folder(write_object(tmp_path / "a", size=32)), SampleOptions(2, 24), generator)
    assert sample["query_rgb"].shape == (2, 3, 24, 24)
    assert sample["query_rgb"].max() > 1.0 and sample["query_rgb"].max() < 1.3


def test_relative_translations_have_the_sign_of_training():
    """The object's centre lies ahead (+z) of the support camera at its distance, and on every query's central ray."""
    cameras = np.stack([camera_matrix(40.0, 5.0, 1.7), camera_matrix(130.0, 25.0, 2.0)])
    support, query = relative_to_support(camera_to_world(cameras, RELEASED))
    centre = torch.tensor([0.0, 0.0, 1.7], dtype=torch.float64)
    torch.testing.assert_close(query[:3, 3] + 2.0 * query[:3, 2], centre, atol=1e-6, rtol=0)
    torch.testing.assert_close(support, torch.eye(4, dtype=torch.float64))


def test_a_folder_is_a_dataset_that_repeats_itself(tmp_path):
    for index, name in enumerate("bac"):
        write_object(tmp_path / name, seed=index)
    (tmp_path / "render.json").write_text("{}")
    data = FolderViews(tmp_path, SampleOptions(3, 16), seed=5)
    assert data.names == ["a", "b", "c"] and len(data) == 3
    batch = default_collate([data[0], data[1]])
    assert batch["query_rgb"].shape == (2, 3, 3, 16, 16) and batch["c2w"].shape == (2, 4, 4, 4)
    first = data[2]["query_rgb"]
    assert torch.equal(first, FolderViews(tmp_path, SampleOptions(3, 16), ["c"], seed=5)[0]["query_rgb"])
    data.set_epoch(1)
    assert not torch.equal(first, data[2]["query_rgb"])
    data.set_epoch(0)
    assert torch.equal(first, data[2]["query_rgb"])


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(InputError, match="no folder in it holds a 000.png"):
        FolderViews(tmp_path)
    write_object(tmp_path / "a", views=3)
    with pytest.raises(InputError, match=r"a: 003\.png is missing"):
        FolderViews(tmp_path)[0]
    with pytest.raises(InputError, match="num_query is 3, and objects have 3 views"):
        FolderViews(tmp_path, SampleOptions(3), views=3)[0]
    with pytest.raises(InputError, match="num_query is 0"):
        SampleOptions(0)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("000.png", b"\x89PNG\r\n\x1a\nrubbish", r"view 000\.png cannot be read"),
        ("001.npy", b"rubbish", r"camera 001\.npy cannot be read"),
        ("001.npy", np.eye(3), "of shape .3, 3., not a finite 3x4 matrix"),
        ("001.npy", np.full((3, 4), np.nan), "not a finite 3x4 matrix"),
        ("001.npy", 2 * np.eye(4)[:3], "has no rotation"),
        ("001.npy", np.diag([1.0, 1, -1, 1])[:3], "has no rotation"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, words):
    folder = write_object(tmp_path / "a")
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        np.save(folder / file, content)
    with pytest.raises(InputError, match=f"a: .*{words}"):
        stored_folder(folder).check()


def test_a_cut_picture_is_found(tmp_path):
    folder = write_object(tmp_path / "a")
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"003\.png cannot be read"):
        stored_folder(folder).check()


def test_pictures_must_be_square_rgba_of_one_size(tmp_path):
    folder = write_object(tmp_path / "a")
    Image.new("RGB", (16, 16)).save(folder / "000.png")
    with pytest.raises(InputError, match="several sizes or modes"):
        stored_folder(folder).check()
    cameras = np.stack([camera_matrix(0, 0, 2)])
    files = encode_views(np.zeros((1, 8, 12, 4), np.uint8), cameras)
    with pytest.raises(InputError, match="RGBA of 12x8 pixels, not square RGBA"):
        StoredViews("b", [files["000.png"]], [files["000.npy"]]).check()
